"""Wrong recipes: each problem at its line and column, with a fix, and all of them at once."""

import re
from contextlib import suppress

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mergetool.errors import RecipeError
from mergetool.recipe import load_recipe

SOUND = """\
base: ./base
models:
  math: ./math
  code: ./code
merge:
  method: ties
  density: 0.2
"""


def problems(tmp_path, text, *sets):
    """(place, what, fix) of everything that is wrong with a recipe."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, sets)
    assert caught.value.exit_code == 2
    str(caught.value).encode()
    found = [(problem.where.replace(str(path), "r"), problem.what, problem.fix) for problem in caught.value.problems]
    assert all(what and fix for _, what, fix in found)
    return found


def one(tmp_path, text, *sets):
    (found,) = problems(tmp_path, text, *sets)
    return found


def density(value):
    return SOUND.replace("0.2", value)


def ended(*lines):
    return SOUND + "".join(f"{line}\n" for line in lines)


# -------------------------------------------------------------------- files and YAML

BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)
NOT_YAML = {
    "flow never closed": ("models: [", "r:1:10", "not valid YAML"),
    "tab": ("models:\n\ta: b", "r:2:1", "not valid YAML"),
    "two colons": ("a: b: c", "r:1:5", "not valid YAML"),
    "undefined alias": ("a: *x", "r:1:4", "undefined alias"),
    "two documents": (ended("---", "a: 1"), "r:9:1 name", "there are two documents without a name"),
    "key given twice": (ended("base: ./other"), "r:8:1 base", "key 'base' is given twice (first on line 1)"),
    "model given twice": ("models: {a: x, a: y}", "r:1:16 models.a", "given twice"),
    "merge key": ("x: &x {a: 1}\ny:\n  <<: *x", "r:3:3", "merge keys (<<) are not supported"),
    "list as a key": ("? [a]\n: 1", "r:1:3", "a key must be text"),
    "python tag": ("models: !!python/object/apply:os.getcwd []", "r:1:1 models", "is not allowed"),
    "own tag": ("models: !mine x", "r:1:1 models", "tag '!mine' is not allowed"),
    "set tag": ("models: !!set {a, b}", "r:1:1 models", "is not allowed"),
    "text tag": ("version: !!str 1", "r:1:1 version", "is not allowed"),
    "tag on a key": ("!!python/name:os.getcwd x: 1", "r:1:1", "a key must be text"),
    "alias in itself": ("a: &a [*a]", "r:1:1", "nested deeper than 50 levels"),
    "alias bomb": (BOMB, "r:1:26", "unfolds to more than 100000 nodes"),
    "deep": ("a: " + "[" * 60 + "]" * 60, "r:1:1", "nested deeper than 50 levels"),
    "very deep": ("- " * 5000, "r", "nested deeper than 50 levels"),
    "control character": (ended("\x01"), "r", "not valid YAML"),
    "half of a surrogate pair": ('models: {a: "\\ud800"}', "r:1:10 models.a", "is not valid Unicode"),
    "Latin-1": (ended("# é").encode("latin-1"), "r", "is not UTF-8 text"),
    "UTF-16": (SOUND.encode("utf-16"), "r", "is not UTF-8 text"),
    "too large": (b"#" * 1_000_001, "r", "more than 1000000 bytes"),
    "empty": ("", "r", "a recipe is a mapping with `models` and `merge`"),
    "a list": ("- 1", "r:1:1", "a recipe is a mapping with `models` and `merge`"),
    "text": ("hello", "r:1:1", "a recipe is a mapping with `models` and `merge`"),
}


@pytest.mark.parametrize("case", NOT_YAML)
def test_a_file_that_is_no_plain_yaml_is_refused_where_it_stops_being_so(tmp_path, case):
    text, place, message = NOT_YAML[case]
    where, what, _ = one(tmp_path, text)
    assert message in what
    assert where.startswith(place)
    assert len(where) < 60


@pytest.mark.parametrize(
    ("name", "message"), [("gone.yaml", "No such file"), (".", "Is a directory"), ("x" * 300, "too long")]
)
def test_a_path_that_holds_no_file_is_refused(tmp_path, name, message):
    with pytest.raises(RecipeError, match=f"cannot be read: .*{message}"):
        load_recipe(tmp_path / name)


def test_a_device_is_not_read_for_ever():
    with pytest.raises(RecipeError, match="more than 1000000 bytes"):
        load_recipe("/dev/zero")


# -------------------------------------------------------------------- one problem each

WRONG = {
    # sections
    "unknown section": (ended("modls: {}"), "r:8:1 modls", "unknown key 'modls'", "did you mean 'models'?"),
    "no models": ("merge: {method: linear}", "r:1:1", "required key 'models' is missing", "add models:"),
    "no merge": ("models: {a: x}", "r:1:1", "required key 'merge' is missing", "add merge:"),
    "another version": (ended("version: 2"), "r:8:1 version", "2 is not one of 1", "write 1"),
    "version as text": (ended("version: '1'"), "r:8:1 version", "found the text '1'", "without quotes"),
    "section is empty": (ended("compute:"), "r:8:1 compute", "expected a mapping, found None", "key: value"),
    "section is a list": (ended("check: [1]"), "r:8:1 check", "expected a mapping, found [1]", "key: value"),
    "section is text": (ended("output: out"), "r:8:1 output", "expected a mapping, found 'out'", "key: value"),
    # models
    "models are a list": ("models: [x]\nmerge: {method: linear}", "r:1:1 models", "expected a mapping", "key: value"),
    "models are none": ("models: {}\nmerge: {method: linear}", "r:1:1 models", "at least 1 entry", "write more"),
    "model is a number": (
        "models: {a: 3}\nmerge: {method: linear}",
        "r:1:10 models.a",
        "expected a path or a mapping with `source`, found 3",
        "path of a folder",
    ),
    "model is nothing": ("models: {a: }\nmerge: {method: linear}", "r:1:10 models.a", "found None", "path of a folder"),
    "model path is empty": ("models: {a: ''}\nmerge: {method: linear}", "r:1:10 models.a", "at least 1 char", "write"),
    "model path holds NUL": (
        'models: {a: "x\\0y"}\nmerge: {method: linear}',
        "r:1:10 models.a",
        "expected characters that a path can hold",
        "another path",
    ),
    "model has no source": (
        "models: {a: {}}\nmerge: {method: linear}",
        "r:1:10 models.a.source",
        "this key is required",
        "add source:",
    ),
    "unknown key of a model": (
        "models: {a: {source: x, sourc: y}}\nmerge: {method: linear}",
        "r:1:25 models.a.sourc",
        "unknown key 'sourc'",
        "did you mean 'source'?",
    ),
    "model is called base": (
        "models: {base: x}\nmerge: {method: linear}",
        "r:1:10 models.base",
        "cannot be",
        "another",
    ),
    "model is called gradient": ("models: {gradient: x}\nmerge: {method: linear}", "r:1:10 ", "cannot be", "another"),
    "model name is blank": ("models: {' ': x}\nmerge: {method: linear}", "r:1:10 ", "cannot be called ' '", "another"),
    "base is missing": (SOUND.replace("base: ./base\n", ""), "r:5:3 merge.method", "common ancestor", "add base: PATH"),
    "base is empty": (SOUND.replace("./base", ""), "r:1:1 base", "expected a path", "path of a folder"),
    "base without use": (
        "base: x\nmodels: {a: x}\nmerge: {method: linear}",
        "r:1:1 base",
        "linear does not use a base, so this would have no effect",
        "remove `base`",
    ),
    "too few models": ("models: {a: x}\nmerge: {method: slerp}", "r:1:1 models", "at least 2 models, not 1", "add one"),
    "too many models": (
        "models: {a: x, b: y, c: z}\nmerge: {method: slerp}",
        "r:1:1 models",
        "at most 2 models, not 3",
        "mergetool methods",
    ),
    # method
    "merge is text": (
        "models: {a: x}\nmerge: ties",
        "r:2:1 merge",
        "expected a mapping",
        "write merge: {method: linear}",
    ),
    "no method": ("models: {a: x}\nmerge: {}", "r:2:1 merge", "required key 'method' is missing", "mergetool methods"),
    "unknown method": (
        SOUND.replace("ties", "tiess"),
        "r:6:3 merge.method",
        "no method 'tiess'",
        "did you mean 'ties'?",
    ),
    "method is a list": (
        SOUND.replace("ties", "[ties]"),
        "r:6:3 merge.method",
        "there is no method",
        "did you mean",
    ),
    "method is a mapping": (SOUND.replace("ties", "{a: b}"), "r:6:3 merge.method", "there is no", "mergetool methods"),
    "unknown field": (ended("  densty: 0.3"), "r:8:3 merge.densty", "unknown key 'densty'", "did you mean 'density'?"),
    "unknown choice": (
        ended("  scope: modle"),
        "r:8:3 merge.scope",
        "not one of tensor, model",
        "did you mean 'model'?",
    ),
    "switch is a number": (ended("  normalize: 1"), "r:8:3 merge.normalize", "expected true or false", "true or false"),
    # numbers
    "number is text": (density("no"), "r:7:3 merge.density", "found the text 'no'", "without quotes"),
    "number in quotes": (density("'0.2'"), "r:7:3 merge.density", "found the text '0.2'", "without quotes"),
    "number is counted": (density("recover"), "r:7:3 merge.density", "expected a number", "only a scale"),
    "number is true": (density("true"), "r:7:3 merge.density", "expected a number, found True", "write a number"),
    "number is nothing": (density(""), "r:7:3 merge.density", "expected a number, found None", "write a number"),
    "number is a list": (density("[0.2]"), "r:7:3 merge.density", "expected a number, found [0.2]", "write a number"),
    "NaN": (density(".nan"), "r:7:3 merge.density", "nan is not a finite number", "finite"),
    "infinity": (density("-.inf"), "r:7:3 merge.density", "-inf is not a finite number", "finite"),
    "too large": (density("1.5"), "r:7:3 merge.density", "less than or equal to 1 (found 1.5)", "schema"),
    "too small": (density("0"), "r:7:3 merge.density", "greater than 0 (found 0)", "schema"),
    "integer of 350 digits": (density("9" * 350), "r:7:3 merge.density", "expected a number", "write a number"),
    "integer of 5000 digits": (density("9" * 5000), "r:7:3 merge.density", "not a finite number", "finite"),
    # per model
    "unknown model": (
        density("{math: 0.1, code: 0.2, chat: 0.3}"),
        "r:7:35 merge.density.chat",
        "there is no model 'chat'",
        "the models are: math, code",
    ),
    "model left out": (
        density("{math: 0.1}"),
        "r:7:3 merge.density",
        "no value for model 'code'",
        "add code: to density",
    ),
    "one model's value": (density("{math: 2, code: 0.1}"), "r:7:13 merge.density.math", "(found 2)", "schema"),
    "per model where shared": (
        ended("  scale: {math: 1, code: 2}"),
        "r:8:3 merge.scale",
        "expected a number or {gradient: [...]}",
        "{gradient: [...]}",
    ),
    # gradients
    "one knot": (density("{gradient: [0.1]}"), "r:7:13 merge.density.gradient", "at least 2 entries", "write more"),
    "no knots": (density("{gradient: []}"), "r:7:13 merge.density.gradient", "at least 2 entries", "write more"),
    "no list": (density("{gradient: 0.1}"), "r:7:13 merge.density.gradient", "expected a list", "write [...]"),
    "a knot out of range": (density("{gradient: [1, 2]}"), "r:7:27 merge.density.gradient.1", "(found 2)", "schema"),
    "a knot that is text": (density("{gradient: [1, x]}"), "r:7:27 merge.density.gradient.1", "text 'x'", "quotes"),
    "more than knots": (density("{gradient: [1, 1], x: 1}"), "r:7:31 merge.density.x", "unknown key 'x'", "gradient"),
    "knots of one model": (
        density("{math: {gradient: [0.1]}, code: 0.1}"),
        "r:7:20 merge.density.math.gradient",
        "at least 2 entries",
        "write more",
    ),
    # overrides
    "overrides are a mapping": (ended("  overrides: {match: x}"), "r:8:3 merge.overrides", "expected a list", "[...]"),
    "override is text": (ended("  overrides: [x]"), "r:8:15 merge.overrides.0", "expected a mapping", "key: value"),
    "override without match": (
        ended("  overrides: [{use: base}]"),
        "r:8:15 merge.overrides.0.match",
        "this key is required",
        "add match:",
    ),
    "override of nothing": (
        ended("  overrides: [{match: x}]"),
        "r:8:15 merge.overrides.0",
        "this override changes nothing",
        "add `use: MODEL` or a setting",
    ),
    "use and settings": (
        ended("  overrides: [{match: x, use: base, density: 0.1}]"),
        "r:8:15 merge.overrides.0",
        "`use` copies tensors, so density would have no effect",
        "keep `use`, or the settings",
    ),
    "use of an unknown model": (
        ended("  overrides: [{match: x, use: maths}]"),
        "r:8:26 merge.overrides.0.use",
        "there is no model 'maths'",
        "did you mean 'math'?",
    ),
    "unknown field of an override": (
        ended("  overrides:", "    - {match: x, density: 0.3}", "    - {match: y, densty: 0.3}"),
        "r:10:18 merge.overrides.1.densty",
        "unknown key 'densty'",
        "did you mean 'density'?",
    ),
    "override out of range": (ended("  overrides: [{match: x, density: 2}]"), "r:8:26 ", "(found 2)", "schema"),
    "override leaves a model out": (
        ended("  overrides: [{match: x, density: {math: 1}}]"),
        "r:8:26 merge.overrides.0.density",
        "no value for model 'code'",
        "add code: to density",
    ),
    # the other sections
    "unknown dtype": (
        ended("compute: {dtype: float8}"),
        "r:8:11 compute.dtype",
        "not one of float32, float64",
        "float",
    ),
    "negative seed": (ended("compute: {seed: -1}"), "r:8:11 compute.seed", "(found -1)", "schema"),
    "seed is a float": (
        ended("compute: {seed: 1.0}"),
        "r:8:11 compute.seed",
        "expected a whole number",
        "whole number",
    ),
    "unknown check": (ended("check: {mising: skip}"), "r:8:9 check.mising", "unknown key", "did you mean 'missing'?"),
    "unknown policy": (ended("check: {missing: skp}"), "r:8:9 check.missing", "'skp' is not one of", "'skip'"),
    "base for missing tensors without a base": (
        "models: {a: x}\nmerge: {method: linear}\ncheck: {missing: base}",
        "r:3:9 check.missing",
        "`base` needs a base",
        "write missing: skip",
    ),
    "extra tensors without a base": (
        "models: {a: x}\nmerge: {method: linear}\ncheck: {extra: drop}",
        "r:3:9 check.extra",
        "would have no effect",
        "remove `extra`",
    ),
    "tokenizer of nobody": (ended("tokenizer: {source: codes}"), "r:8:13 ", "no model 'codes'", "did you mean 'code'?"),
    "row of nobody": (
        ended("tokenizer: {source: union, tokens: {x: cod}}"),
        "r:8:37 ",
        "no model 'cod'",
        "did you mean 'code'?",
    ),
    "token of nobody": (
        ended("tokenizer: {source: union, tokens: {x: {from: cod, token: y}}}"),
        "r:8:41 tokenizer.tokens.x.from",
        "no model 'cod'",
        "did you mean 'code'?",
    ),
    "row of two meanings": (
        ended("tokenizer: {source: union, tokens: {x: {from: code, token: y, id: 3}}}"),
        "r:8:37 tokenizer.tokens.x",
        "token and id may be two different rows",
        "",
    ),
    "row of zeros and of a model": (
        ended("tokenizer: {source: union, tokens: {x: {from: code, zero: true}}}"),
        "r:8:37 tokenizer.tokens.x",
        "two different rows",
        "",
    ),
    "id of no model": (ended("tokenizer: {source: union, tokens: {x: {id: 3}}}"), "r:8:37 ", "add from: MODEL", ""),
    "padding to zero": (ended("tokenizer: {source: union, pad_to: 0}"), "r:8:28 tokenizer.pad_to", "1 (found 0)", ""),
    "missing rows": (ended("tokenizer: {source: union, missing: means}"), "r:8:28 ", "not one of mean", "'mean'"),
    "template of nobody": (
        ended("chat_template: chatm"),
        "r:8:1 chat_template",
        "no model 'chatm'",
        "did you mean 'chatml'?",
    ),
    "template without its key": (
        ended("chat_template: ./a.jinja"),
        "r:8:1 chat_template",
        "is no model",
        "write {file: ./a.jinja}",
    ),
    "two templates": (ended("chat_template: {file: a, text: b}"), "r:8:1 chat_template", "expected a model's name", ""),
    "size without a unit we know": (
        ended("output: {shard_size: 5XB}"),
        "r:8:10 output.shard_size",
        "a size such as",
        "",
    ),
    "size is zero": (ended("output: {shard_size: 0}"), "r:8:10 output.shard_size", "a size such as 5GB", ""),
    "size is a float": (ended("output: {shard_size: 1.5}"), "r:8:10 output.shard_size", "a size such as 5GB", ""),
    "size is astronomical": (ended(f"output: {{shard_size: {'9' * 400}GB}}"), "r:8:10 ", "a size such as 5GB", ""),
    "output path is a number": (
        ended("output: {path: 3}"),
        "r:8:10 output.path",
        "expected text, found 3",
        "in quotes",
    ),
    "output path holds NUL": (ended('output: {path: "a\\0"}'), "r:8:10 output.path", "a path can hold", "another path"),
    "architecture without use": (ended("architecture: mlp"), "r:8:1 architecture", "would have no effect", "remove"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused_at_its_line_with_a_fix(tmp_path, case):
    text, place, message, fix = WRONG[case]
    where, what, found_fix = one(tmp_path, text)
    assert where.startswith(place)
    assert message in what
    assert fix in found_fix
    assert not re.search("pydantic|dictionary|tuple|validation|_kind|class", f"{what} {found_fix}")


def test_all_problems_come_at_once(tmp_path):
    found = problems(
        tmp_path,
        """\
base: 3
models: {math: 1, code: ./code}
merge:
  method: ties
  densty: 0.3
  weight: {math: 1, cod: 2}
  scale: .nan
  overrides:
    - {match: "a*", use: chat}
    - {match: "b*", density: 7}
    - {match: "c*"}
compute: {seed: x}
check: {missing: never}
tokenizer: {source: chat}
outptu: {}
""",
    )
    assert sorted(where for where, _, _ in found) == sorted(
        [
            "r:1:1 base",
            "r:2:10 models.math",
            "r:5:3 merge.densty",
            "r:6:21 merge.weight.cod",
            "r:6:3 merge.weight",
            "r:7:3 merge.scale",
            "r:9:21 merge.overrides.0.use",
            "r:10:21 merge.overrides.1.density",
            "r:11:7 merge.overrides.2",
            "r:12:11 compute.seed",
            "r:13:9 check.missing",
            "r:14:13 tokenizer.source",
            "r:15:1 outptu",
        ]
    )


# -------------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("setting", "place", "message"),
    [
        ("merge.density", "--set", "'merge.density' is not key.path=value"),
        ("=3", "--set", "is not key.path=value"),
        ("merge..x=1", "--set", "is not key.path=value"),
        ("merge.densty=0.3", "--set merge.densty", "unknown key 'densty'"),
        ("merge.density=7", "--set merge.density", "less than or equal to 1 (found 7)"),
        ("merge.density={math: 7, code: 1}", "--set merge.density.math", "(found 7)"),
        ("merge.density=", "--set merge.density", "expected a number, found None"),
        ("merge.density=[", "--set:1:2", "not valid YAML"),
        ("merge.density=!!float 1", "--set:1:1", "is not allowed"),
        ("merge.density.math=1", "--set merge.density.math", "merge.density is not a mapping"),
        ("merge.overrides.0.density=1", "--set merge.overrides.0.density", "this key is required"),
        ("merge.overrides.1.density=2", "--set merge.overrides.1.density", "not an index into a list of 1"),
        ("foo.bar.baz=1", "--set foo", "unknown key 'foo'"),
        ("compute.sed=1", "--set compute", "unknown key 'sed'"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(tmp_path, setting, place, message):
    text = SOUND if "overrides" not in setting else ended("  overrides: [{match: x, use: base}]")
    if setting.startswith("merge.overrides.0"):
        text = ended("  overrides: [{match: x, density: 0.1}]")
        setting, message = "merge.overrides.0.density=2", "(found 2)"
    where, what, _ = one(tmp_path, text, setting)
    assert where.startswith(place)
    assert message in what


def test_wrong_settings_come_all_at_once(tmp_path):
    assert len(problems(tmp_path, SOUND, "a", "merge.density=[", "models.math.x=1")) == 3


def test_settings_without_a_recipe_do_not_hide_that_there_is_none(tmp_path):
    assert "a recipe is a mapping" in one(tmp_path, "- 1", "merge.density=0.3")[1]


def test_settings_change_the_recipe_and_are_recorded(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(ended("  overrides: [{match: x, density: 0.1}]"))
    sets = ["merge.density=0.5", "merge.overrides.0.density={math: 1e-3, code: 1}", "compute.seed=7", "output.path=out"]
    recipe = load_recipe(path, sets)
    assert recipe.method.density == 0.5
    assert recipe.overrides[0].density == {"math": 0.001, "code": 1.0}
    assert recipe.compute.seed == 7
    assert recipe.output.path == "out"
    assert recipe.settings == tuple(sets)


# -------------------------------------------------------------------- what surprises in YAML 1.1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E-3", 0.001), (".5", 0.5), ("5.e-1", 0.5), ("01", 1), ("0x1", 1), ("0o1", 1), ("+1", 1)],
)
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, value):
    (tmp_path / "recipe.yaml").write_text(density(text))
    assert load_recipe(tmp_path / "recipe.yaml").method.density == value


@pytest.mark.parametrize("name", ["no", "on", "yes", "y", "1", "1_000", "2001-01-01", "12:30:00"])
def test_words_that_yaml_1_1_would_change_can_name_models(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(f"models: {{{name}: {name}}}\nmerge: {{method: linear}}")
    recipe = load_recipe(tmp_path / "recipe.yaml") if name != "1" else None
    if recipe is not None:
        assert list(recipe.models) == [name]
        assert recipe.models[name].source == name


def test_aliases_byte_order_marks_and_comments_are_fine(tmp_path):
    text = "\ufeff# my merge\nmodels: {a: &a ./a, b: *a}\nmerge: {method: linear}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert load_recipe(tmp_path / "recipe.yaml").models["b"].source == "./a"


def test_an_unknown_home_folder_is_a_path_that_is_not_there(tmp_path):
    (tmp_path / "recipe.yaml").write_text("models: {a: ~nobody-of-this-name/x}\nmerge: {method: linear}")
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.path_of(recipe.models["a"].source) == tmp_path / "~nobody-of-this-name/x"


# -------------------------------------------------------------------- nothing but RecipeError

OURS = yaml.safe_load(
    ended(
        "  weight: {math: {gradient: [0, 1]}, code: 0.5}",
        "  overrides: [{match: '*norm*', use: base}, {match: x, density: 0.1}]",
        "compute: {dtype: float32, seed: 1}",
        "check: {missing: base, extra: drop}",
        "tokenizer: {source: math}",
        "output: {path: out, dtype: float16, shard_size: 1GB}",
    )
)
THEIRS = {
    "merge_method": "ties",
    "base_model": "./base",
    "models": [
        {"model": "./math", "parameters": {"weight": [0.1, 0.5], "density": [{"filter": "mlp", "value": 0.5}, 0.1]}},
        {"model": "./code", "parameters": {"weight": 1}},
    ],
    "parameters": {"normalize": True, "density": 0.5},
    "dtype": "bfloat16",
    "tokenizer_source": "base",
}
junk = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**40,
        1.5,
        float("nan"),
        "",
        "x",
        "~x",
        [],
        [1],
        [[]],
        {},
        {"a": 1},
        {"gradient": [1]},
        "a" * 300,
    ]
)


def places_in(node, place=()):
    yield place
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places_in(child, (*place, key))


def with_value(node, place, value):
    if not place:
        return value
    copy = dict(node) if isinstance(node, dict) else list(node)
    copy[place[0]] = with_value(copy[place[0]], place[1:], value)
    return copy


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.sampled_from([OURS, THEIRS]), st.data())
def test_junk_anywhere_in_a_recipe_is_a_recipe_error_or_fine(document, data):
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(st.sampled_from(list(places_in(document))))
        document = with_value(document, place, data.draw(junk))
        if not isinstance(document, dict):
            document = {"models": document}
    with suppress(RecipeError):
        load_recipe(document)


def test_keys_of_a_section_that_may_be_null_are_told(tmp_path):
    bundle = SOUND.replace("method: ties\n  density: 0.2", "method: emr\n  router: {certain: true}")
    (found,) = problems(tmp_path, bundle)
    assert found[1:] == (
        "unknown key 'certain'",
        "known keys: layers, pool, norm, mode, threshold, top_k, temperature, unknown, doubt, rank, early",
    )

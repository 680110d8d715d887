import pytest

from mergetool.arch.language import Term, evaluate, fill, first_known, parse_axes, pattern, read_family
from mergetool.errors import PlanError


def nowhere(name, path):
    return path.parent / f"{name}.yaml"


def test_axes_are_segments_of_factors():
    assert parse_axes("head.{i} 3 _ + abs(vo.{i}), residual") == (
        (
            (Term("head.{i}"), Term(size=3), Term()),
            (Term("vo.{i}", signed=False),),
        ),
        ((Term("residual"),),),
    )
    assert parse_axes("stage.{s-1}") == (((Term("stage.{s-1}"),),),)
    assert parse_axes("") == ()


@pytest.mark.parametrize("text", ["a + ", "a,, b", "a * b", "(a)", "abs(a", "0 a"])
def test_what_is_no_layout_is_quoted(text):
    with pytest.raises(ValueError, match="in the layout"):
        parse_axes(text)


def test_holes_are_integers_and_their_neighbours():
    assert pattern("layer{s}.{b}.conv{s}").fullmatch("layer2.10.conv2").groupdict() == {"s": "2", "b": "10"}
    assert pattern("layer{s}.{b}.conv{s}").fullmatch("layer2.10.conv3") is None
    assert pattern("a.b").fullmatch("axb") is None
    assert fill("stage.{s-1}.{b}", {"s": 3, "b": 0}) == "stage.2.0"


def test_sizes_are_integer_arithmetic_on_known_keys():
    assert evaluate("hidden // heads + 2 * 3 - 1", {"hidden": 12, "heads": 3}) == 9
    assert first_known(["head_dim", "hidden // heads"], {"head_dim": None, "hidden": 12, "heads": 3}) == 4
    with pytest.raises(KeyError, match="heads"):
        first_known(["head_dim", "hidden // heads"], {"hidden": 12})
    for wrong in ("__import__('os')", "hidden / heads", "2 **", "heads // 0"):
        with pytest.raises(ValueError, match="cannot compute"):
            evaluate(wrong, {"hidden": 12, "heads": 3})


def test_a_file_starts_from_another_and_adds_to_it(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "about: old\nmatch: {model_type: [old]}\nprefixes: ['x.']\n"
        "spaces:\n  a:\n  b: signed\ntensors:\n  w: a, b\n  v: a\n"
    )
    (tmp_path / "new.yaml").write_text("extends: old\nspaces: {b: {symmetry: flip}}\ntensors: {w: b, u: a}\n")
    family = read_family(tmp_path / "new.yaml", nowhere)
    assert family.tensors == {"w": "b", "v": "a", "u": "a"}
    assert family.spaces["b"].symmetry == "flip"
    assert family.spaces["a"].symmetry == "permutation"
    assert family.prefixes == ["x."]
    assert family.about == ""
    assert family.match.model_type == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tensors: {w: a}", "w: space 'a' is not declared under `spaces`"),
        ("spaces:\n  a.{i}:\ntensors:\n  w: a.{i}", "w: 'a.{i}' uses 'i', which the name has not"),
        ("spaces: {a: wobbly}", "spaces.a.symmetry"),
        ("tensors: {w: '?'}", "cannot read '?'"),
        ("colour: blue", "colour: Extra inputs are not permitted"),
        ("spaces: {a: signed, a: flip}", "'a' is written twice"),
        ("[1, 2]", "an architecture file is a mapping"),
        ("a: [", "not valid YAML"),
        ("extends: self", "the file extends itself"),
        ("extends: gone", "cannot read the architecture file: No such file"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_entry(tmp_path, text, message):
    path = tmp_path / "self.yaml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        read_family(path, nowhere)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_example_in_the_documentation_of_the_language_is_a_file_that_fits(tmp_path):
    from mergetool.arch import language
    from mergetool.arch.match import resolve

    text = language.__doc__.split("hidden layer:\n\n")[1].split("\n\n")[0]
    (tmp_path / "net.yaml").write_text(text)
    shapes = {"first.weight": (8, 3), "first.bias": (8,), "last.weight": (2, 8), "last.bias": (2,)}
    assert [group.size for group in resolve(str(tmp_path / "net.yaml"), shapes).groups] == [8]

"""Slices against models whose layers were put together by hand, in float64: tensors, logits, config.json."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import mergetool
from mergetool.errors import PlanError, RecipeError
from tests.zoo.build import build
from tests.zoo.families import FAMILIES
from tests.zoo.files import with_old_buffers
from tests.zoo.oracle import logits, opened, state_of

TOWERS = {"llama": "model.layers", "gpt2": "transformer.h", "gemma3-text": "model.layers"}
LAYERS = {"gpt2": "n_layer"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    def made(family, counts=(4, 3, 4)):
        key = LAYERS.get(family, "num_hidden_layers")
        return {
            name: build(root / f"{family}-{name}-{count}", family, seed, **{key: count})
            for seed, (name, count) in enumerate(zip(("a", "b", "base"), counts, strict=True))
        }

    return made


def recipe_of(found, method, slices, *, base=False, **sections):
    models = {name: str(path) for name, path in found.items() if name != "base"}
    ancestor = {"base": str(found["base"])} if base else {}
    return {**ancestor, "models": models, "merge": method, "slices": slices, **sections}


def by_hand(found, family, layers, first, last):
    """`layers`: for every layer of the output, from whom and which, as a rule on tensors by suffix."""
    kind, tower = FAMILIES[family].model, TOWERS[family]
    states = {name: state_of(path, kind) for name, path in found.items()}
    inside = re.compile(re.escape(tower) + r"\.(\d+)\.(.*)")
    made = {}
    for name, value in states[first].items():
        if not inside.fullmatch(name) and re.search("embed|wte|wpe|rotary", name):
            made[name] = value
    for name, value in states[last].items():
        if not inside.fullmatch(name) and not re.search("embed|wte|wpe|rotary", name):
            made[name] = value
    for number, (sources, rule) in enumerate(layers):
        for name in states[sources[0][0]]:
            match = inside.fullmatch(name)
            if match and int(match[1]) == sources[0][1]:
                values = [states[model][f"{tower}.{layer}.{match[2]}"] for model, layer in sources]
                made[f"{tower}.{number}.{match[2]}"] = rule(*values)
    return made


def same(value):
    return value


def mean(x, y):
    return (x + y) / 2


def assert_is(folder, family, expected):
    kind = FAMILIES[family]
    module, info = opened(folder, kind.model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for name, value in module.state_dict().items():
        if name in expected:
            torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    other = kind.model(module.config).to(torch.float64).eval()
    other.load_state_dict(expected, strict=False)
    inputs = kind.inputs()
    torch.testing.assert_close(logits(module, inputs), logits(other, inputs), rtol=0, atol=1e-4)
    return module.config


@pytest.mark.parametrize("family", TOWERS)
def test_layers_are_cut_stacked_and_repeated(models, family, tmp_path):
    found = models(family)
    slices = [{"a": [0, 2]}, {"b": [1, 3]}, {"a": [1, 2]}]
    result = mergetool.run(recipe_of(found, {"method": "passthrough"}, slices), output=tmp_path / "out")
    order = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1)]
    expected = by_hand(found, family, [([each], same) for each in order], "a", "a")
    config = assert_is(result.path, family, expected)
    assert config.num_hidden_layers == 5
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        own = {name: json.loads((path / "config.json").read_text()).get("layer_types") for name, path in found.items()}
        if own["a"] is not None:
            assert kinds == [own[model][layer] for model, layer in order]


def test_layers_are_merged_where_a_slice_has_several_models(models, tmp_path):
    found = models("llama")
    slices = [{"a": [0, 2]}, {"a": [2, 4], "b": [1, 3]}]
    outside = {"first": "b", "last": "a"}
    recipe = recipe_of(found, {"method": "linear"}, slices, outside=outside)
    result = mergetool.run(recipe, output=tmp_path / "out")
    layers = [([("a", 0)], same), ([("a", 1)], same), ([("a", 2), ("b", 1)], mean), ([("a", 3), ("b", 2)], mean)]
    assert_is(result.path, "llama", by_hand(found, "llama", layers, "b", "a"))
    whole = [{"a": [0, 3], "b": [0, 3]}]
    merged = mergetool.run(recipe_of(found, {"method": "linear"}, whole), output=tmp_path / "whole")
    kind = FAMILIES["llama"].model
    found_state, a, b = (state_of(path, kind) for path in (merged.path, found["a"], found["b"]))
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.2.mlp.up_proj.weight",
    ):
        torch.testing.assert_close(found_state[name], (a[name] + b[name]) / 2, rtol=1e-6, atol=1e-6)


def test_a_slice_has_settings_and_a_base_of_its_own(models, tmp_path):
    found = models("llama", (4, 4, 4))
    slices = [
        {"a": [0, 2], "b": [0, 2]},
        {
            "layers": {"a": [2, 4], "b": [1, 3], "base": [0, 2]},
            "set": {"scale": 0.25},
            "overrides": [{"match": "*.o_proj.weight", "scale": 0.0}],
        },
        {"layers": {"b": [3, 4]}, "set": {"scale": 2.0}},
    ]
    method = {"method": "task-arithmetic", "scale": 0.5}
    result = mergetool.run(recipe_of(found, method, slices, base=True), output=tmp_path / "out")
    kind = FAMILIES["llama"].model
    out, a, b, base = (state_of(path, kind) for path in (result.path, found["a"], found["b"], found["base"]))

    def arithmetic(name, scale, number, *places):
        origin = base[f"model.layers.{number}.{name}"]
        changes = [state[f"model.layers.{layer}.{name}"] - origin for state, layer in places]
        return origin + scale * sum(changes)

    for name, scale in (("mlp.up_proj.weight", 0.25), ("self_attn.o_proj.weight", 0.0)):
        for number, expected in (
            (1, arithmetic(name, 0.5, 1, (a, 1), (b, 1))),
            (3, arithmetic(name, scale, 1, (a, 3), (b, 2))),
            (4, arithmetic(name, 2.0, 3, (b, 3))),
        ):
            torch.testing.assert_close(out[f"model.layers.{number}.{name}"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "where", "what", "fix"),
    [
        ({"slices": [{"c": [0, 2]}]}, "slices.0", "there is no model 'c'", "one of: a, b"),
        ({"slices": [{"a": [2, 2]}, {"b": [0, 1]}]}, "slices.0", "holds no layer", r"write \[2, 3\]"),
        ({"slices": [{"a": [0, 2], "b": [0, 1]}]}, "slices.0", "2 of a, 1 of b", "give as many"),
        ({"slices": [{"a": [0, 2]}]}, "models.b", "is in no slice", "remove it"),
        ({"slices": [{"a": [0], "b": [0, 1]}]}, "slices.0", "first layer and the end", ""),
        ({"slices": [{"a": [-1, 1], "b": [0, 2]}]}, "slices.0", r"as in \[0, 16\]", ""),
        ({"slices": []}, "slices", "", ""),
        ({"slices": {"encoder": []}}, "slices", "", ""),
        ({"slices": {"encoder": [{"c": [0, 2]}]}}, "slices.encoder.0", "there is no model 'c'", "one of: a, b"),
        (
            {"slices": [{"layers": {"a": [0, 1]}, "base": {"b": [0, 1]}}]},
            "slices.0",
            "a slice has a base, and the recipe has none",
            "add base: PATH",
        ),
        (
            {"slices": [{"a": [0, 1]}, {"layers": {"b": [0, 1]}, "outside": True}, {"a": [0, 1]}]},
            "slices.1",
            "between others",
            "remove `outside`",
        ),
        (
            {"slices": [{"layers": {"a": [0, 1]}, "outside": True}]},
            "slices.0",
            "this slice has none",
            "remove `outside`",
        ),
        ({"outside": {"first": "c"}, "slices": [{"a": [0, 1], "b": [0, 1]}]}, "outside.first", "no model 'c'", "a, b"),
        ({"outside": {"first": "a"}}, "outside", "goes with `slices`", "add slices:"),
        ({"slices": [{"layers": {"a": [0, 1], "b": [0, 1]}, "set": {"scael": 1}}]}, "slices.0.set", "scael", "scale"),
        ({"slices": [{"a": [0, 1], "b": [0, 1]}], "merge": {"method": "c2m3"}}, "slices", "looks at whole models", ""),
    ],
)
def test_wrong_slices_are_refused_before_any_model_is_opened(changes, where, what, fix):
    recipe = {"models": {"a": "a", "b": "b"}, "merge": {"method": "linear"}, **changes}
    if "set" in str(changes):
        recipe |= {"base": "base", "merge": {"method": "task-arithmetic"}}
    with pytest.raises(RecipeError) as caught:
        mergetool.load_recipe(recipe)
    told = [str(each) for each in caught.value.problems]
    assert any(where in each and re.search(what, each) and re.search(fix, each) for each in told), told


def test_layers_that_are_not_there_and_bases_that_are_not_said_are_refused(models, tmp_path):
    found = models("llama")
    recipe = recipe_of(found, {"method": "linear"}, [{"a": [0, 4]}, {"b": [2, 4]}])
    with pytest.raises(PlanError, match=r"layer 3 is asked for, and model 'b' has layers 0 to 2"):
        mergetool.plan(recipe)
    recipe["slices"][1] = {"b": [2, 3]}  # as the message says
    assert mergetool.plan(recipe).num_tensors
    ties = recipe_of(found, {"method": "ties"}, [{"a": [1, 3], "b": [0, 2]}], base=True)
    with pytest.raises(PlanError, match="which are the base's is not said"):
        mergetool.plan(ties)
    ties["slices"][0]["base"] = [1, 3]  # as the message says
    assert mergetool.run(ties, output=tmp_path / "out").num_tensors


def test_rows_are_named_where_there_are_several(tmp_path):
    found = {name: build(tmp_path / name, "t5", seed) for seed, name in enumerate("ab")}
    rows = {"encoder": [{"a": [0, 2]}, {"b": [1, 2]}], "decoder": [{"b": [0, 1]}]}
    result = mergetool.run(recipe_of(found, {"method": "passthrough"}, rows), output=tmp_path / "out")
    kind = FAMILIES["t5"].model
    module, info = opened(result.path, kind)
    assert not info["missing_keys"]
    assert (module.config.num_layers, module.config.num_decoder_layers) == (3, 1)
    out, a, b = (state_of(path, kind) for path in (result.path, found["a"], found["b"]))
    expected = {
        "encoder.block.2.layer.1.DenseReluDense.wi.weight": b["encoder.block.1.layer.1.DenseReluDense.wi.weight"],
        "encoder.final_layer_norm.weight": b["encoder.final_layer_norm.weight"],
        "decoder.block.0.layer.0.SelfAttention.q.weight": b["decoder.block.0.layer.0.SelfAttention.q.weight"],
        "shared.weight": a["shared.weight"],
    }
    for name, value in expected.items():
        assert torch.equal(out[name], value), name


@pytest.mark.parametrize(
    ("slices", "what"),
    [
        ({"encodr": [{"a": [0, 1]}, {"b": [0, 1]}]}, r"'encodr' fits 0 of the rows.*decoder.block, encoder.block"),
        ({"block": [{"a": [0, 1]}, {"b": [0, 1]}]}, r"'block' fits 2 of the rows"),
        (
            {"encoder": [{"a": [0, 1]}, {"b": [0, 1]}], "encoder.block": [{"a": [0, 1]}]},
            "which another key names, too",
        ),
    ],
)
def test_rows_that_are_not_there_are_refused(slices, what, tmp_path):
    found = {name: build(tmp_path / name, "t5", seed) for seed, name in enumerate("ab")}
    with pytest.raises(PlanError, match=what):
        mergetool.plan(recipe_of(found, {"method": "passthrough"}, slices))


def test_gradients_of_a_slice_run_along_its_layers(models, tmp_path):
    found = models("llama", (4, 4, 4))
    climb = {"gradient": [0.0, 1.0]}
    slices = [
        {"layers": {"a": [0, 3]}, "set": {"scale": climb}, "outside": True},
        {"layers": {"b": [0, 1]}, "set": {"scale": climb}},
        {"layers": {"b": [1, 3]}, "overrides": [{"match": "*.up_proj.weight", "scale": climb}]},
    ]
    method = {"method": "passthrough", "scale": {"gradient": [1.0, 6.0]}}
    result = mergetool.run(recipe_of(found, method, slices), output=tmp_path / "out")
    kind = FAMILIES["llama"].model
    out, a, b = (state_of(path, kind) for path in (result.path, found["a"], found["b"]))
    places = [(a, 0, 0.0), (a, 1, 0.5), (a, 2, 1.0), (b, 0, 1.0), (b, 1, 0.0), (b, 2, 1.0)]
    for number, (state, layer, scale) in enumerate(places):
        for name, factor in (
            ("mlp.up_proj.weight", scale),
            ("mlp.down_proj.weight", scale if number < 4 else 1.0 + number),
        ):
            expected = state[f"model.layers.{layer}.{name}"] * factor
            torch.testing.assert_close(out[f"model.layers.{number}.{name}"], expected, rtol=1e-6, atol=1e-6)
    assert not out["model.embed_tokens.weight"].any()  # the first slice's settings, at its lower end
    torch.testing.assert_close(out["lm_head.weight"], b["lm_head.weight"], rtol=0, atol=1e-6)  # the last slice has none


def test_a_slice_has_another_model_for_its_base(models, tmp_path):
    found = {**models("llama", (4, 4, 4)), "c": models("llama", (4, 4, 4))["base"]}
    found["base"] = build(tmp_path / "other", "llama", 9, num_hidden_layers=4)
    slices = [{"a": [0, 2]}, {"layers": {"a": [2, 3], "b": [2, 3]}, "base": {"c": [1, 2]}}]
    result = mergetool.run(recipe_of(found, {"method": "task-arithmetic"}, slices, base=True), output=tmp_path / "out")
    kind = FAMILIES["llama"].model
    out, a, b, c = (state_of(path, kind) for path in (result.path, found["a"], found["b"], found["c"]))
    name = "model.layers.{}.mlp.up_proj.weight"
    expected = a[name.format(2)] + b[name.format(2)] - c[name.format(1)]
    torch.testing.assert_close(out[name.format(2)], expected, rtol=1e-6, atol=1e-6)
    norm = a["model.norm.weight"] + b["model.norm.weight"] - c["model.norm.weight"]
    torch.testing.assert_close(out["model.norm.weight"], norm, rtol=1e-6, atol=1e-6)


def test_a_slice_of_one_model_that_names_its_base_is_merged(models, tmp_path):
    found = models("llama", (4, 4, 4))
    recipe = recipe_of(found, {"method": "task-arithmetic", "scale": 0.5}, [{"a": [0, 2], "base": [1, 3]}], base=True)
    del recipe["models"]["b"]
    out = state_of(mergetool.run(recipe, output=tmp_path / "out").path, FAMILIES["llama"].model)
    a, base = (state_of(found[name], FAMILIES["llama"].model) for name in ("a", "base"))
    for ours, its, bases in (("layers.1", "layers.1", "layers.2"), ("norm", "norm", "norm")):
        suffix = ".mlp.up_proj.weight" if ours != "norm" else ".weight"
        expected = (a[f"model.{its}{suffix}"] + base[f"model.{bases}{suffix}"]) / 2
        torch.testing.assert_close(out[f"model.{ours}{suffix}"], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base", [False, True])
def test_one_slice_of_all_layers_of_all_models_is_the_whole_models(models, base):
    found = models("llama", (4, 4, 4))
    merge = {"method": "task-arithmetic" if base else "linear", "weight": {"a": {"gradient": [0.1, 0.9]}, "b": 0.5}}
    slices = [{"a": [0, 4], "b": [0, 4]}]
    sliced, whole = recipe_of(found, merge, slices, base=base), recipe_of(found, merge, slices, base=base)
    del whole["slices"]
    assert mergetool.plan(sliced).steps == mergetool.plan(whole).steps
    assert not mergetool.plan(sliced).layers
    cut = mergetool.plan({**sliced, "slices": [{"a": [0, 3], "b": [0, 3]}]})
    assert cut.layers == {"model.layers": (("a", 0), ("a", 1), ("a", 2))}
    with pytest.raises(PlanError, match="layer 4 is asked for, and model 'a' has layers 0 to 3"):
        mergetool.plan({**sliced, "slices": [{"a": [0, 5], "b": [0, 5]}]})


@pytest.mark.parametrize(
    ("family", "changes", "what", "fix"),
    [
        (
            "qwen2",
            {},
            "layer 1 of model 'b' is like no layer of model 'a': it has self_attn.k_proj.bias",
            "architecture",
        ),
        (
            "llama",
            {"intermediate_size": 40},
            "as large as 40 asks for, of model 'b'",
            "stack layers of models of one size",
        ),
        ("llama", {"num_attention_heads": 8, "head_dim": 2}, "num_attention_heads is 4 and 8", "one architecture"),
    ],
)
def test_layers_of_another_network_are_refused(models, tmp_path, family, changes, what, fix):
    found = {"a": models("llama")["a"], "b": build(tmp_path / "b", family, 1, num_hidden_layers=4, **changes)}
    with pytest.raises(PlanError, match=what) as caught:
        mergetool.plan(recipe_of(found, {"method": "passthrough"}, [{"a": [0, 2]}, {"b": [1, 3]}]))
    assert fix in str(caught.value)


def test_layers_with_other_positions_are_told_and_old_buffers_allowed(models, tmp_path):
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    other = build(tmp_path / "other", "llama", 1, num_hidden_layers=4, **rope)
    buffers = {"model.layers.N.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    old = with_old_buffers(
        tmp_path / "old", other, **{name.replace(".", "__"): value for name, value in buffers.items()}
    )
    plan = mergetool.plan(
        recipe_of({"a": models("llama")["a"], "b": old}, {"method": "passthrough"}, [{"a": [0, 2]}, {"b": [0, 2]}])
    )
    assert any("rope_theta is 10000.0 and 500000.0" in warning for warning in plan.warnings)


def test_what_the_first_layer_holds_for_all_stays_where_it_is_cut_away(tmp_path):
    found = {name: build(tmp_path / name, "t5", seed, num_layers=3) for seed, name in enumerate("ab")}
    rows = {"encoder": [{"b": [1, 3]}, {"a": [2, 3]}], "decoder": [{"a": [1, 3], "b": [0, 2]}]}
    result = mergetool.run(recipe_of(found, {"method": "linear"}, rows), output=tmp_path / "out")
    kind = FAMILIES["t5"].model
    _, info = opened(result.path, kind)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    out, a, b = (state_of(path, kind) for path in (result.path, found["a"], found["b"]))
    name = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(out[name.format("encoder")], b[name.format("encoder")])
    mean = (a[name.format("decoder")] + b[name.format("decoder")]) / 2
    torch.testing.assert_close(out[name.format("decoder")], mean, rtol=1e-6, atol=1e-6)


def test_the_result_opens_and_writes(models, tmp_path):
    found = models("llama")
    slices = [{"a": [0, 4]}, {"b": [0, 3]}]
    result = mergetool.run(recipe_of(found, {"method": "passthrough"}, slices), output=tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(result.path)
    tokens = model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=4, do_sample=False)
    assert tokens.shape == (1, 7)


def test_its_recipe_runs_from_end_to_end(models, tmp_path):
    document = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "slices.yaml").read_text())
    found = models("llama", (4, 4, 4))
    (tmp_path / "models").mkdir()
    for name, model in zip(document["models"], ("a", "b"), strict=True):
        (tmp_path / "models" / name).symlink_to(found[model])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    result = mergetool.run(tmp_path / "recipe.yaml")
    config = json.loads((result.path / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert not opened(result.path, FAMILIES["llama"].model)[1]["missing_keys"]

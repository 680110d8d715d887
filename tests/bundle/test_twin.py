"""Twin-Merging and WEMoE in bundles: a merged model plus shares of what is each expert's own, against naive float64."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool.arch.matrices import is_of_mlp
from mergetool.bundle.manifest import read_manifest
from mergetool.bundle.verify import verify_bundle
from mergetool.engine.against import verify_against
from mergetool.engine.growing import change_bundle
from mergetool.errors import PlanError, RecipeError
from mergetool.recipe.load import load_recipe
from mergetool.testing.classifiers import expert_answer, save_experts, text_inputs, tiny_config
from tests.bundle.tiny import tiny_inputs, tiny_model, write_models

KIND = transformers.BertForSequenceClassification
RANK = 12
SETTINGS = {"method": "twin", "rank": RANK, "factors": "float32", "filter": "llm", "scale": 0.4}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return save_experts(folder, KIND, tiny_config(KIND), transformers.BertModel, tasks="abc", a=2)


def recipe(paths, tasks="abc", **merge):
    return {"base": str(paths["base"]), "models": {task: str(paths[task]) for task in tasks}, "merge": merge}


@pytest.fixture(scope="module")
def bundle(paths, tmp_path_factory):
    return mergetool.run(recipe(paths, **SETTINGS), output=tmp_path_factory.mktemp("bundle") / "out").path


def parts(base, experts):
    """The merged model, and what every expert differs by from it as it is kept, in float64."""
    base = {name: value.double() for name, value in base.items()}
    merged = {n: base[n] + 0.4 * sum(own[n].double() - base[n] for own in experts) for n in base}
    return merged, [{n: kept(own[n].double() - merged[n]) for n in base} for own in experts]


def is_apart(value):
    """Whether it is kept as factors: no table of embeddings, and not as small as these."""
    return value.ndim == 2 and min(value.shape) > RANK and value.shape[0] not in (2, 40, 60)


def kept(change):
    if not is_apart(change):
        return change
    u, s, vh = torch.linalg.svd(change)
    return u[:, :RANK] * s[:RANK] @ vh[:RANK]


def encoders(paths):
    base = {n: v for n, v in load_file(paths["base"] / "model.safetensors").items() if not n.startswith("pooler")}
    experts = [load_file(paths[task] / "model.safetensors") for task in "abc"]
    return base, [{name: own[f"bert.{name}"] for name in base} for own in experts]


def test_the_base_of_the_bundle_is_the_merged_model(paths, bundle):
    base, experts = encoders(paths)
    found = load_file(bundle / "base/model.safetensors")
    for name, value in parts(base, experts)[0].items():
        torch.testing.assert_close(found[name].double(), value, rtol=0, atol=1e-6)
    whole = load_file(paths["base"] / "model.safetensors")
    assert found.keys() == whole.keys()
    assert torch.equal(found["pooler.dense.weight"], whole["pooler.dense.weight"])
    assert verify_bundle(bundle)["files_checked"] > 5


def test_a_named_task_is_the_merged_model_and_what_is_its_own(paths, bundle):
    merged, own = parts(*encoders(paths))
    model, inputs = mergetool.load_bundle(bundle), text_inputs()
    for place, task in enumerate("abc"):
        plain = KIND.from_pretrained(paths[task]).double().eval()
        values = {name: value + own[place][name] for name, value in merged.items() if "position" not in name}
        plain.bert.load_state_dict(values, strict=False)
        with torch.no_grad():
            expected = plain(**inputs).logits
        found = model(tasks=[task], **inputs).logits[:, : expected.shape[1]]
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


def test_an_input_has_what_is_the_tasks_own_by_their_probability(tmp_path):
    """Linear layers by shares, all else as the mean of all experts."""
    places = write_models(tmp_path, tiny_model("llama"))
    made = mergetool.run(recipe(places, **SETTINGS, router={"temperature": 0.3}), output=tmp_path / "out").path
    base, *experts = (load_file(places[name] / "model.safetensors") for name in ("base", "a", "b", "c"))
    merged, own = parts(base, experts)
    model, inputs = mergetool.load_bundle(made), tiny_inputs("llama")
    shares = model.route(**inputs).coefficients.double()
    assert shares.std(0).max() > 0.01
    found = model(**inputs).logits
    for row, weights in enumerate(shares):
        plain = tiny_model("llama").double().eval()
        mixed = {}
        for name, value in merged.items():
            added = [each[name] * (weights[place] if is_apart(value) else 1 / 3) for place, each in enumerate(own)]
            mixed[name] = value + sum(added)
        plain.load_state_dict(mixed, strict=False)
        with torch.no_grad():
            expected = plain(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-4)


def test_an_expert_comes_out_as_a_checkpoint_and_the_bundle_is_what_its_recipe_makes(paths, bundle, tmp_path):
    models = {"b": {"source": str(bundle), "select": "b"}}
    mergetool.run({"models": models, "merge": {"method": "passthrough"}}, output=tmp_path / "b")
    inputs = text_inputs()
    expected = mergetool.load_bundle(bundle)(tasks=["b"], **inputs).logits
    torch.testing.assert_close(expert_answer(tmp_path / "b", KIND, inputs).logits, expected, rtol=0, atol=1e-5)
    assert verify_against(bundle, load_recipe(recipe(paths, **SETTINGS), folder=tmp_path)).answer == "yes"
    other = load_recipe(recipe(paths, **SETTINGS | {"scale": 0.2}), folder=tmp_path)
    assert verify_against(bundle, other).answer == "no"


def test_what_cannot_be_is_refused_with_what_to_do_instead(paths, bundle):
    with pytest.raises(PlanError) as raised:
        change_bundle(bundle, {"d": str(paths["b"])})
    assert "what experts differ by from one merged model that all experts have a part in" in str(raised.value)
    assert "add d to the models of the recipe that made it" in str(raised.value)
    with pytest.raises(RecipeError, match=r"the base of this bundle is made for it\. Leave it out"):
        load_recipe(recipe(paths, **SETTINGS, base="reference"), folder=paths["base"])


def mixed_mlps(base, experts, weights):
    """WEMoE as its paper says, but for the kept directions: everything merged but MLPs, which have shares."""
    mixed = {}
    for name, value in base.items():
        changes = [own[name].double() - value.double() for own in experts]
        if ".mlp." in name:
            mixed[name] = value.double() + sum(w * kept(change) for w, change in zip(weights, changes, strict=True))
        else:
            mixed[name] = value.double() + 0.4 * sum(changes)
    return mixed


@pytest.mark.parametrize("asked", ["route", ["b"]])
def test_mlps_are_mixed_and_all_else_is_merged(tmp_path, asked):
    places = write_models(tmp_path, tiny_model("llama"))
    made = recipe(places, **SETTINGS | {"method": "wemoe"}, router={"temperature": 0.3})
    model = mergetool.load_bundle(mergetool.run(made, output=tmp_path / "out").path)
    base, *experts = (load_file(places[name] / "model.safetensors") for name in ("base", "a", "b", "c"))
    inputs = tiny_inputs("llama")
    assert {name.split(".")[3] for name in model.manifest.router.matrices} == {"mlp"}
    shares = model.route(**inputs).coefficients.double() if asked == "route" else [[0.0, 1.0, 0.0]] * 7
    found = model(tasks=asked, **inputs).logits
    for row, weights in enumerate(shares):
        plain = tiny_model("llama").double().eval()
        plain.load_state_dict(mixed_mlps(base, experts, weights), strict=False)
        with torch.no_grad():
            expected = plain(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-4)


def test_what_is_mixed_may_be_said_and_must_be_there(paths, tmp_path):
    wemoe = {**SETTINGS, "method": "wemoe"}
    made = mergetool.run(recipe(paths, **wemoe, layers=["*attention.output.dense*"]), output=tmp_path / "out").path
    changed = [name for name, each in read_manifest(made).parameters.items() if each.policy != "skip"]
    assert {name.split(".", 3)[3] for name in changed} == {
        f"attention.output.dense.{key}" for key in ("weight", "bias")
    }
    with pytest.raises(PlanError, match="no tensor matches nothing") as raised:
        mergetool.run(recipe(paths, **wemoe, layers=["nothing"]), output=tmp_path / "none")
    example = str(raised.value).rpartition("such as ")[2]
    with pytest.raises(PlanError, match="nothing to route by"):  # a vector, which is found, and tells no directions
        mergetool.run(recipe(paths, **wemoe, layers=[example]), output=tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layer.0.intermediate.dense.weight", True),
        ("encoder.layer.0.output.dense.bias", True),
        ("encoder.layer.0.attention.output.dense.weight", False),
        ("encoder.layer.0.output.LayerNorm.weight", False),
        ("model.layers.3.mlp.down_proj.weight", True),
        ("h.0.mlp.c_fc.weight", True),
        ("h.0.attn.c_proj.weight", False),
        ("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", True),
        ("vision_model.encoder.layers.0.mlp.fc1.weight", True),
        ("transformer.layer.0.ffn.lin1.weight", True),
        ("model.decoder.layers.0.fc2.weight", True),
        ("model.embed_tokens.weight", False),
    ],
)
def test_tensors_of_mlps_are_known_by_their_names(name, expected):
    assert is_of_mlp(name) is expected

"""Mean absolute activations, against hidden states that transformers shows, and the step after merging by them."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool import PlanError, RecipeError, SourceError
from tests.files import content, write_model
from tests.statistics.networks import inputs_of, opened, write_classifier, write_rows
from tests.zoo.text import save_tokenizer

QUERY = "bert.encoder.layer.1.attention.self.query.weight"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"
STEP = {"step": "activation-scale", "least": 0.25}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("activation")
    for seed, name in enumerate(("base", "a", "b")):
        write_classifier(folder / name, seed)
    write_rows(folder / "rows.jsonl", labels=False)
    return folder


@pytest.fixture
def recipe(place):
    def make(method="task-arithmetic", **changes):
        rows = {"data": str(place / "rows.jsonl")}
        asked = {
            "base": str(place / "base"),
            "models": {name: str(place / name) for name in "ab"},
            "calibration": {"base": rows},
            "merge": {"method": method},
            "then": [STEP],
            **changes,
        }
        return {key: value for key, value in asked.items() if value is not None}

    return make


def measured(place, cache):
    return mergetool.measure(place / "base", "activation", place / "rows.jsonl", cache=cache)


def state(folder):
    return {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}


def scaled(before, base, activation, least=STEP["least"]):
    """The formula in float64, of whole tensors."""
    factors = {name: 1 - (1 - least) * value.double() / value.double().max() for name, value in activation.items()}
    return {name: base[name] + (value - base[name]) * factors.get(name, 1.0) for name, value in before.items()}


def test_it_is_the_mean_over_tokens_of_absolute_inputs(place, tmp_path):
    found, model, inside = measured(place, tmp_path), opened(place / "base"), []
    norm = model.get_submodule(NORM.removesuffix(".weight"))
    norm.register_forward_pre_hook(lambda _, given: inside.append(given[0][0]))
    with torch.no_grad():
        every = [model(**example, output_hidden_states=True) for example in inputs_of(place / "base")]
    rows = torch.cat([each.hidden_states[1][0] for each in every])
    assert torch.allclose(found[QUERY], rows.abs().mean(0, keepdim=True), rtol=1e-5)
    assert torch.allclose(found[NORM], torch.cat(inside).abs().mean(0), rtol=1e-5)


def test_it_is_of_layers_and_norms_and_not_of_embeddings(place, tmp_path):
    found = measured(place, tmp_path)
    kinds = torch.nn.Linear | torch.nn.LayerNorm
    assert found.keys() == {f"{n}.weight" for n, m in opened(place / "base").named_modules() if isinstance(m, kinds)}


def test_changes_of_active_channels_are_held_back(place, recipe, tmp_path):
    """Against the formula in float64, on what the method makes by itself."""
    result = mergetool.run(recipe(), output=tmp_path / "out", cache=tmp_path / "cache")
    plain = mergetool.run(recipe(then=None, calibration=None), output=tmp_path / "plain")
    expected = scaled(state(plain.path), state(place / "base"), measured(place, tmp_path / "cache"))
    for name, value in state(result.path).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name
    assert not torch.allclose(expected[QUERY], state(plain.path)[QUERY], atol=1e-3)
    assert json.loads((result.path / "mergetool.json").read_text())["statistics"].keys() == {"base"}


def test_weights_that_are_stored_turned_are_held_back_by_their_inputs(tmp_path):
    """Of a square one no shape tells which side the inputs are on."""
    config = transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
    for seed, name in enumerate(("base", "a")):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name)
    write_rows(tmp_path / "rows.jsonl", labels=False)
    rows = {"data": str(tmp_path / "rows.jsonl")}
    asked = {"base": str(tmp_path / "base"), "models": {"a": str(tmp_path / "a")}, "calibration": rows}
    asked |= {"merge": {"method": "task-arithmetic"}, "then": [STEP]}
    found = state(mergetool.run(asked, output=tmp_path / "out", cache=tmp_path).path)
    activation = measured(tmp_path, tmp_path)
    assert activation["transformer.h.0.attn.c_proj.weight"].shape == (16, 1)
    expected = scaled(state(tmp_path / "a"), state(tmp_path / "base"), activation)
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_rows_of_slices_and_several_workers_change_nothing(tmp_path):
    """A tensor of several units, stored either way, and a long norm."""
    generator = torch.Generator().manual_seed(0)
    shapes, activation = {"w": (1100, 4096), "t": (4096, 1100), "v": (700_000,)}, {}
    spread = {"w": (1, 4096), "t": (4096, 1), "v": (700_000,)}
    for name in ("base", "a", "b"):
        write_model(tmp_path / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    activation = {key: torch.rand(shape, generator=generator) for key, shape in spread.items()}
    write_model(tmp_path / "measured", activation)
    asked = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in "ab"},
        "calibration": {"base": {"measured": str(tmp_path / "measured")}},
        "merge": {"method": "linear"},
        "then": [STEP],
    }
    one, three = (mergetool.run(asked, output=tmp_path / f"out{n}", workers=n).path for n in (1, 3))
    assert content(one) == content(three)
    base, a, b = (state(tmp_path / name) for name in ("base", "a", "b"))
    expected = scaled({key: (a[key] + b[key]) / 2 for key in a}, base, activation)
    for name, value in state(one).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


def test_it_follows_a_method_that_measures_the_models(place, recipe, tmp_path):
    rows = recipe()["calibration"]["base"]
    asked = recipe("regmean", calibration=rows)
    found = state(mergetool.run(asked, output=tmp_path / "out", cache=tmp_path / "cache").path)
    plain = {key: value for key, value in asked.items() if key not in ("then", "base")}
    before = state(mergetool.run(plain, output=tmp_path / "plain", cache=tmp_path / "cache").path)
    expected = scaled(before, state(place / "base"), measured(place, tmp_path / "cache"))
    for name, value in found.items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_where_nothing_flows_and_with_least_one_nothing_changes():
    base, model = {"w": torch.zeros(2, 2)}, {"w": torch.ones(2, 2)}
    for activation, least, expected in (
        ([[0.0, 0.0]], 0.25, [1.0, 1.0]),
        ([[2.0, 1.0]], 1.0, [1.0, 1.0]),
        ([[2.0, 1.0]], 0.0, [0.0, 0.5]),
    ):
        statistics = {"base": {"w": torch.tensor(activation)}}
        then = [{**STEP, "least": least}]
        found = mergetool.merge_state_dicts("linear", {"a": model}, base, statistics=statistics, then=then)
        assert found["w"].tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("changes", "told", "fix"),
    [
        ({"calibration": None}, "measures the base on data", "add calibration: {data: ./FILE.jsonl}"),
        ({"calibration": {"a": {"data": "x"}, "base": {"data": "x"}}}, "'a' is not measured", "base"),
        ({"then": None, "calibration": {"base": {"data": "x"}}}, "measures nothing on data", "remove `calibration`"),
        (
            {"merge": {"method": "regmean"}, "calibration": {"base": {"data": "x"}}},
            "nothing for model 'a'",
            "add a: {data: ./FILE.jsonl}",
        ),
        ({"merge": {"method": "merge3"}}, "candidates of a search are not measured", "remove that step"),
    ],
)
def test_recipes_that_cannot_be_meant_are_refused(recipe, changes, told, fix):
    with pytest.raises(RecipeError, match=told) as error:
        mergetool.load_recipe(recipe(**changes))
    assert any(fix in problem.fix for problem in error.value.problems)


def test_one_file_for_all_is_for_the_base_too(place, recipe, tmp_path):
    asked = recipe(calibration={"data": str(place / "rows.jsonl")})
    found = mergetool.run(asked, output=tmp_path / "out", cache=tmp_path / "cache")
    assert content(found.path) == content(mergetool.run(recipe(), output=tmp_path / "b", cache=tmp_path / "c").path)


def test_a_base_that_cannot_be_run_is_told(place, recipe, tmp_path):
    write_model(tmp_path / "bare", load_file(place / "base" / "model.safetensors"))
    with pytest.raises((PlanError, SourceError), match=r"config\.json"):
        mergetool.plan(recipe(base=str(tmp_path / "bare")))

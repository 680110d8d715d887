"""SMILE in a bundle: every token's experts at every matrix, against naive float64."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool.bundle.manifest import read_manifest
from mergetool.engine.growing import change_bundle
from mergetool.kernels.arrow import gates, lengths
from mergetool.testing.classifiers import expert_answer, save_experts, text_inputs, tiny_config
from tests.bundle.tiny import tiny_inputs, tiny_model, write_models

KIND = transformers.BertForSequenceClassification
RANK = 12
EXACT = {"method": "smile", "rank": RANK, "factors": "float32", "filter": "llm"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    return save_experts(folder, KIND, tiny_config(KIND), transformers.BertModel, tasks="abc", a=2)


def make(paths, output, tasks="abc", **merge):
    models = {task: str(paths[task]) for task in tasks}
    return mergetool.run({"base": str(paths["base"]), "models": models, "merge": merge}, output=output).path


def mixed_by_hand(model, base, experts, directions, top_k, prefix):
    """The base in float64, all of whose linear layers mix the experts' own, and else their mean."""
    changes = {name: [own[prefix + name].double() - base[name].double() for own in experts] for name in base}
    mean = {name: base[name].double() + sum(each) / len(each) for name, each in changes.items()}
    linear = {}
    for path, module in model.named_modules():
        turned = type(module).__name__ == "Conv1D"
        if (isinstance(module, torch.nn.Linear) or turned) and f"{path}.weight" in base:
            linear[path] = module
            for key in ("weight", "bias"):
                if f"{path}.{key}" in base:
                    mean[f"{path}.{key}"] = base[f"{path}.{key}"].double()
    model.double().eval().load_state_dict(mean, strict=False)
    for path, module in linear.items():
        weights = changes[f"{path}.weight"]
        weights = [weight.mT if type(module).__name__ == "Conv1D" else weight for weight in weights]
        spectra = [torch.linalg.svd(weight) for weight in weights]
        weights = [u[:, :RANK] * s[:RANK] @ vh[:RANK] for u, s, vh in spectra]
        biases = changes.get(f"{path}.bias", [0.0] * len(weights))
        bases = [vh[: min(directions, RANK)] for _, _, vh in spectra]

        def add(_, arguments, output, weights=weights, biases=biases, bases=bases):
            x = arguments[0]
            sizes = torch.stack([(x @ v.mT).norm(dim=-1) for v in bases], -1)
            powers = sizes.softmax(-1)
            powers = torch.where(sizes >= sizes.sort(-1, descending=True).values[..., top_k - 1 : top_k], powers, 0)
            shares = powers / powers.sum(-1, keepdim=True)
            added = [x @ weight.mT + bias for weight, bias in zip(weights, biases, strict=True)]
            return output + sum(shares[..., t : t + 1] * each for t, each in enumerate(added))

        module.register_forward_hook(add)
    return model


@pytest.mark.parametrize(("directions", "top_k"), [(1, 2), (4, 1), (16, 3)])
def test_a_token_has_at_every_layer_the_experts_whose_directions_it_has_most_of(paths, directions, top_k, tmp_path):
    bundle = make(paths, tmp_path / "out", **EXACT, gate={"directions": directions, "top_k": top_k})
    inputs = text_inputs()
    answer = mergetool.load_bundle(bundle)(**inputs)
    base = {n: v for n, v in load_file(paths["base"] / "model.safetensors").items() if not n.startswith("pooler")}
    experts = [load_file(paths[task] / "model.safetensors") for task in "abc"]
    for row, task in enumerate(answer.task):
        plain = KIND.from_pretrained(paths[task])
        encoder = plain.double().eval().bert
        pooler = {name: value.clone() for name, value in encoder.pooler.state_dict().items()}
        mixed_by_hand(encoder, base, experts, directions, top_k, "bert.")
        encoder.pooler.load_state_dict(pooler)
        with torch.no_grad():
            expected = plain(**{key: value[row : row + 1] for key, value in inputs.items()}).logits[0]
        torch.testing.assert_close(answer.logits[row, : len(expected)].double(), expected, rtol=0, atol=1e-4)


def test_a_layer_that_stores_its_weight_turned_mixes_too(tmp_path):
    model = tiny_model("gpt2")
    places = write_models(tmp_path, model)
    bundle = make(places, tmp_path / "out", **EXACT, gate={"directions": 5, "top_k": 2})
    base, *experts = (load_file(places[name] / "model.safetensors") for name in ("base", "a", "b", "c"))
    plain = mixed_by_hand(type(model).from_pretrained(places["base"]), base, experts, 5, 2, "")
    inputs = tiny_inputs("gpt2")
    with torch.no_grad():
        expected = plain(**inputs).logits
    opened = mergetool.load_bundle(bundle)
    torch.testing.assert_close(opened(**inputs).logits.double(), expected, rtol=0, atol=1e-4)
    assert len(opened.generate(**inputs, max_new_tokens=2, do_sample=False)) == 7


def test_a_named_task_is_its_expert_as_it_is_kept(paths, tmp_path):
    bundle = make(paths, tmp_path / "out", **EXACT)
    model, inputs = mergetool.load_bundle(bundle), text_inputs()
    models = {"b": {"source": str(bundle), "select": "b"}}
    mergetool.run({"models": models, "merge": {"method": "passthrough"}}, output=tmp_path / "b")
    expected = expert_answer(tmp_path / "b", KIND, inputs).logits
    torch.testing.assert_close(model(tasks=["b"], **inputs).logits, expected, rtol=0, atol=1e-4)


def test_experts_come_and_go_as_in_any_bundle_of_factors(paths, tmp_path):
    whole = make(paths, tmp_path / "whole", method="smile")
    grown = make(paths, tmp_path / "grown", "ab", method="smile")
    change_bundle(grown, {"c": str(paths["c"])})
    told = [read_manifest(bundle).model_dump(exclude={"files", "parameters"}) for bundle in (whole, grown)]
    assert told[0] == told[1]
    assert told[0]["router"]["gate"] == {"directions": 16, "top_k": 1, "temperature": 1.0}
    inputs = text_inputs()
    answers = [mergetool.load_bundle(bundle)(**inputs).logits for bundle in (whole, grown)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-3)


def test_an_expert_with_fewer_directions_has_a_smaller_gate():
    v = torch.linalg.qr(torch.randn(6, 6))[0]
    found = lengths(torch.ones(2, 6), gates([v[:5], v[:1], v[:0]], 3))
    expected = torch.stack([(v[:3].sum(1)).norm(), v[:1].sum().abs(), torch.zeros(())])
    torch.testing.assert_close(found, expected.expand(2, 3))

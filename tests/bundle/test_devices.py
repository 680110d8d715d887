"""Bundles on a device: made there as on the CPU, and answering there as here."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

import mergetool
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.manifest import read_manifest
from mergetool.bundle.rows import answers
from mergetool.kernels import spectral, subspace
from mergetool.methods import registry
from mergetool.methods.families.bundle import BundleMethod
from mergetool.testing.classifiers import save_experts, text_inputs, tiny_config
from mergetool.testing.toys import toy_models, write
from tests.alignment.test_devices import Said, lock_of
from tests.bundle.tiny import make_bundle, tiny_inputs
from tests.devices import STAND_IN, every_device, needs_gpu, present

KINDS = sorted(name for name, kind in registry().items() if issubclass(kind, BundleMethod))
MERGED = {"method": "mass", "router": {"features": "merged", "layers": ["*"]}}
ANSWERING = [
    *(pytest.param(family, STAND_IN, id=f"{family}-stand-in") for family in ("bert", "llama", "gpt2")),
    *(
        pytest.param(family, "cuda", id=f"{family}-cuda", marks=[pytest.mark.gpu, needs_gpu])
        for family in ("bert", "vit", "llama", "t5", "gpt2")
    ),
]
"""Others hand out tensors that only say what they are, of which the stand-in has none."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    base, models = toy_models("abc", exact=False)
    return write(tmp_path_factory.mktemp("toys"), {"base": base, **models})


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    kind = transformers.BertForSequenceClassification
    return save_experts(tmp_path_factory.mktemp("classifiers"), kind, tiny_config(kind), transformers.BertModel)


def made(paths, output, section, device, room=None, names="abc"):
    recipe = {"base": str(paths["base"]), "models": {n: str(paths[n]) for n in names}, "merge": section}
    said = Said()
    with present(device, room):
        return mergetool.run(recipe, output=output, device=device, progress=said).path, said.lines


def assert_alike(there, here):
    assert read_manifest(there).parameters.keys() == read_manifest(here).parameters.keys()
    for path in here.rglob("*.safetensors"):
        expected, found = load_file(path), load_file(there / path.relative_to(here))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert float((found[name].float() - tensor.float()).norm()) <= 1e-5 * float(tensor.float().norm()), name


@every_device
@pytest.mark.parametrize(
    "section",
    [*({"method": kind} for kind in KINDS), MERGED, {**MERGED, "rank": {"energy": 0.9}, "size": 0.5}],
    ids=lambda section: section["method"],
)
def test_a_bundle_is_made_on_a_device_as_on_the_cpu(section, device, paths, tmp_path):
    section = {**section, "factors": "float32"}
    there, said = made(paths, tmp_path / "there", section, device)
    here, _ = made(paths, tmp_path / "here", section, "cpu")
    assert lock_of(there)["run"]["device"].startswith(device)
    assert any(f"on {device}" in line for line in said)
    assert_alike(there, here)


def test_directions_that_products_do_not_find_are_counted(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(spectral, "_SMALLEST", 6)
    monkeypatch.setattr(subspace, "_ROUNDS", 0)
    there, _ = made(paths, tmp_path / "there", {"method": "tsv-compress", "rank": 1}, STAND_IN)
    assert "3 of 3 matrices by eigh" in (there / "mergetool.json").read_text()


def test_what_does_not_fit_a_device_is_taken_apart_on_the_cpu_and_says_so(paths, tmp_path):
    there, said = made(paths, tmp_path / "there", {"method": "tsv-compress"}, STAND_IN, room=50)
    here, _ = made(paths, tmp_path / "here", {"method": "tsv-compress"}, "cpu")
    wide, narrow = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.weight"
    assert f"{STAND_IN} has too little memory: {wide} is computed on the CPU" in said
    assert not any(narrow in line for line in said)
    assert_alike(there, here)


def on(device, inputs):
    return {key: value.to(device) for key, value in inputs.items()}


@pytest.mark.parametrize(("family", "device"), ANSWERING)
def test_a_bundle_answers_on_a_device_as_on_the_cpu(family, device, tmp_path):
    folder, inputs = make_bundle(tmp_path, family), tiny_inputs(family)
    bundle = mergetool.load_bundle(folder)
    here = [bundle(**inputs), bundle(tasks=["b"], **inputs)]
    with present(device):
        bundle = mergetool.load_bundle(folder).to(device)
        there = [bundle(**on(device, inputs)), bundle(tasks=["b"], **on(device, inputs))]
        for found, expected in zip(there, here, strict=True):
            assert found.tasks == expected.tasks
            assert {found.logits.device.type, found.coefficients.device.type} == {torch.device(device).type}
            torch.testing.assert_close(found.logits.cpu(), expected.logits, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found.coefficients.cpu(), expected.coefficients, rtol=1e-5, atol=1e-5)


@every_device
def test_a_bundle_keeps_its_dtype_on_a_device(device, tmp_path):
    folder = make_bundle(tmp_path, "llama")
    with present(device):
        bundle = mergetool.load_bundle(folder, dtype=torch.bfloat16).to(device)
        assert {parameter.dtype for parameter in bundle.parameters()} == {torch.bfloat16}
        assert bundle(**on(device, tiny_inputs("llama"))).logits.dtype == torch.bfloat16


@every_device
def test_a_bundle_generates_on_a_device(device, tmp_path):
    folder = make_bundle(tmp_path, "llama")
    inputs = {key: value[1:4:2] for key, value in tiny_inputs("llama").items()}
    expected = mergetool.load_bundle(folder).generate(**inputs, max_new_tokens=4)
    with present(device):
        found = mergetool.load_bundle(folder).to(device).generate(**on(device, inputs), max_new_tokens=4)
        assert found.cpu().tolist() == expected.tolist()


@every_device
@pytest.mark.parametrize("router", [{"features": "merged"}, {"kind": "arrow", "per": "sequence"}, {"kind": "arrow"}])
def test_classes_and_routers_of_all_kinds_answer_on_a_device(router, device, classifiers, tmp_path):
    folder, _ = made(classifiers, tmp_path / "out", {"method": "mass", "router": router}, "cpu", names="ab")
    inputs = text_inputs()
    here = mergetool.load_bundle(folder)(**inputs)
    with present(device):
        there = mergetool.load_bundle(folder).to(device)(**on(device, inputs))
        assert there.task == here.task
        torch.testing.assert_close(there.logits.cpu(), here.logits, rtol=1e-5, atol=1e-5)


@every_device
def test_rows_are_answered_and_a_router_is_corrected_on_a_device(device, tmp_path):
    folder = make_bundle(tmp_path, "bert")
    inputs = tiny_inputs("bert")
    rows = [
        {"input_ids": inputs["input_ids"][row].tolist(), "task": task}
        for row, task in enumerate(["a", "b", "c", "a", "b", "c"])
    ]
    whole = mergetool.load_bundle(folder)
    here, fitted = list(answers(whole, rows)), calibrate(whole, rows)
    with present(device):
        bundle = mergetool.load_bundle(folder).to(device)
        bundle.calibration = None
        there = list(answers(bundle, rows))
        assert [row["tasks"] for row in there] == [row["tasks"] for row in here]
        assert [row["probability"] for row in there] == pytest.approx([row["probability"] for row in here], abs=1e-5)
        assert calibrate(bundle, rows).offsets == pytest.approx(fitted.offsets, abs=1e-4)


@every_device
def test_what_is_strange_is_measured_on_a_device(device, classifiers, tmp_path):
    section = {"method": "mass", "router": {"unknown": "refuse"}}
    there, here = (made(classifiers, tmp_path / on[:3], section, on, names="ab")[0] for on in (device, "cpu"))
    found, expected = (read_manifest(bundle).router.unknown for bundle in (there, here))
    assert found.scores == expected.scores
    assert [*found.strange, *found.usual] == pytest.approx([*expected.strange, *expected.usual], abs=1e-3)


@every_device
def test_examples_of_known_inputs_are_learnt_on_a_device(device, classifiers, tmp_path):
    section = {"method": "mass", "router": {"unknown": "nearest"}}
    folder, _ = made(classifiers, tmp_path / "out", section, "cpu", names="ab")
    inputs = text_inputs()
    rows = [{"input_ids": ids, "task": "ab"[row % 2]} for row, ids in enumerate(inputs["input_ids"].tolist())]
    here = mergetool.load_bundle(folder)
    calibrate(here, rows)
    expected = here.route(**inputs).doubt
    with present(device):
        there = mergetool.load_bundle(folder).to(device)
        torch.testing.assert_close(there.route(**on(device, inputs)).doubt.cpu(), expected, rtol=0, atol=1e-4)
        calibrate(there, rows)
        torch.testing.assert_close(there.route(**on(device, inputs)).doubt.cpu(), expected, rtol=0, atol=1e-3)

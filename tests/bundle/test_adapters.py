"""Bundles of adapters: their factors are taken as they are, and come out of a library as they went in."""

import warnings

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.bundle import build, store
from mergetool.bundle.expert import open_expert
from mergetool.bundle.manifest import read_manifest
from mergetool.checkpoints.adapters import AdapterSource
from mergetool.errors import MergeError, PlanError
from mergetool.tensors.folder import open_model
from mergetool.tensors.io import bytes_of
from mergetool.tensors.source import SafetensorsSource
from tests.bundle.tiny import tiny_inputs, tiny_model

SETTINGS = {
    "llama": {
        "a": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj", "down_proj"]},
        "b": {"r": 6, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]},
        "c": {
            "r": 2,
            "lora_alpha": 2,
            "target_modules": ["q_proj", "o_proj", "embed_tokens"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 3},
        },
    },
    "gpt2": {
        task: {"r": 3, "lora_alpha": 6, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True} for task in "ab"
    },
}
EXACT = {"factors": "float32", "rank": 1.0, "size": 100.0}


def save_adapter(model, folder, seed, **settings):
    """An adapter as PEFT writes it, moved as training does; the model stays what it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, LoraConfig(**settings))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
        adapted.save_pretrained(folder, save_embedding_layers=False)
        adapted.unload()


def write_adapters(folder, family):
    tiny_model(family).save_pretrained(folder / "base")
    for seed, (task, settings) in enumerate(SETTINGS[family].items()):
        save_adapter(tiny_model(family), folder / task, seed, **settings)
    return folder


@pytest.fixture(scope="module", params=SETTINGS)
def adapted(request, tmp_path_factory):
    return request.param, write_adapters(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_adapters(tmp_path_factory.mktemp("llama"), "llama")


def recipe(folder, method="tsv-compress", *, tasks=None, beside="base", **merge):
    """`beside`: the folder of the model that adapters are put on."""
    names = tasks or sorted(path.name for path in folder.iterdir() if (path / "adapter_config.json").is_file())
    models = {name: {"source": str(folder / beside), "adapters": [str(folder / name)]} for name in names}
    return {"base": str(folder / "base"), "models": models, "merge": {"method": method, **merge}}


def forbid_dense(monkeypatch):
    """Let no matrix be taken apart, and no weight of a base be read."""

    def never(*_, **__):
        raise AssertionError("a dense matrix was formed")

    read = SafetensorsSource.read_bytes

    def of_adapters(source, name, begin, buffer):
        assert "lora_" in name or name.endswith((".U", ".S", ".Vh")), f"{name} was read"
        read(source, name, begin, buffer)

    monkeypatch.setattr(store, "live_factors", never)
    monkeypatch.setattr(SafetensorsSource, "read_bytes", of_adapters)


def factors_in(bundle, task):
    return load_file(bundle / f"factors/{task}.safetensors")


def test_an_adapters_factors_make_what_peft_adds(adapted):
    family, folder = adapted
    base = open_model(folder / "base")
    for task in SETTINGS[family]:
        source, count = AdapterSource(base, folder / task), 0
        assert source.origin is base
        for name in source.specs:
            b, a = source.factors(name)
            assert b.shape[1] == a.shape[0] == source.num_directions(name)
            expected = read(source, name).double() - read(base, name).double()
            torch.testing.assert_close((b.double() @ a.double()).view(expected.shape), expected, rtol=0, atol=1e-6)
            count += bool(b.shape[1])
        assert count == len(source.adapted)


def read(source, name):
    spec = source.specs[name]
    assert spec.dtype.name == "F32"
    tensor = torch.empty(spec.shape)
    source.read_bytes(name, 0, bytes_of(tensor.reshape(-1)))
    return tensor


def test_two_adapters_on_each_other_are_one_of_all_their_directions(llama):
    base = open_model(llama / "base")
    both = AdapterSource(AdapterSource(base, llama / "a"), llama / "b")
    name = "model.layers.0.self_attn.q_proj.weight"
    b, a = both.factors(name)
    assert both.num_directions(name) == b.shape[1] == 10
    torch.testing.assert_close(b @ a, read(both, name) - read(base, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "target_modules": ["q_proj"], "use_dora": True},
        {"r": 4, "target_modules": ["k_proj"], "modules_to_save": ["q_proj"]},
    ],
)
def test_what_is_no_product_has_no_factors(settings, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    save_adapter(tiny_model("llama"), tmp_path / "x", 1, **settings)
    source = AdapterSource(open_model(tmp_path / "base"), tmp_path / "x")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.factors(name) is None
    assert source.num_directions(name) is None
    assert source.factors("model.norm.weight")[0].shape == (24, 0)


def test_a_bundle_of_adapters_is_that_of_their_fine_tunes(adapted, tmp_path, monkeypatch):
    family, folder = adapted
    for task in SETTINGS[family]:
        one = recipe(folder, "passthrough", tasks=[task])
        del one["base"]
        mergetool.run(one, output=tmp_path / task)
    dense = {**recipe(folder, **EXACT), "models": {task: str(tmp_path / task) for task in SETTINGS[family]}}
    expected = mergetool.run(dense, output=tmp_path / "dense").path
    forbid_dense(monkeypatch)
    found = mergetool.run(recipe(folder, base="reference", **EXACT), output=tmp_path / "found").path
    policies = {name: p.policy for name, p in read_manifest(found).parameters.items()}
    assert set(policies.values()) == {"svd", "skip"}
    kept = read_manifest(expected).parameters
    assert policies.keys() == kept.keys()
    for task in SETTINGS[family]:
        ours, theirs = factors_in(found, task), factors_in(expected, task)
        for name, policy in policies.items():
            assert (policy == "skip") == (kept[name].policy == "skip"), name
            change, other = whole(ours, name), whole(theirs, name)
            if other is not None and policy == "svd":
                assert float((change - other).norm()) <= 1e-5 * float(other.norm()) + 1e-9
            if f"{name}.S" in ours and f"{name}.S" in theirs:
                size = len(ours[f"{name}.S"])
                torch.testing.assert_close(ours[f"{name}.S"], theirs[f"{name}.S"][:size], rtol=1e-5, atol=1e-6)


def whole(factors, name):
    """A task's change of a tensor, or 0."""
    if f"{name}.delta" in factors:
        return factors[f"{name}.delta"].double()
    if f"{name}.U" not in factors:
        return torch.zeros((), dtype=torch.float64)
    u, s, vh = (factors[f"{name}.{key}"].double() for key in ("U", "S", "Vh"))
    return (u * s) @ vh


def test_the_plan_of_a_bundle_of_adapters_knows_its_files(llama, tmp_path):
    document = recipe(llama, "mass", size=9.0)
    plan = mergetool.plan(document)
    result = mergetool.run(document, output=tmp_path / "out").path
    planned = {file.name: file.size for file in plan.files}
    for task in "abc":
        assert (result / f"factors/{task}.safetensors").stat().st_size == planned[f"factors/{task}.safetensors"]
    hows = {step.name: step.operation.name for step in plan.steps}
    assert hows["model.norm.weight"] == "unchanged"
    assert hows["model.layers.0.self_attn.q_proj.weight"] == "factors"


def test_workers_do_not_matter_and_a_killed_run_goes_on(llama, tmp_path, monkeypatch):
    first = mergetool.run(recipe(llama, "mass"), output=tmp_path / "one", workers=1).path
    second = mergetool.run(recipe(llama, "mass"), output=tmp_path / "two", workers=3).path
    assert read_manifest(first).files == read_manifest(second).files
    finish, calls = build.Work.write_base, []

    def killed_once(work):
        calls.append(work)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return finish(work)

    monkeypatch.setattr(build.Work, "write_base", killed_once)
    with pytest.raises(KeyboardInterrupt):
        mergetool.run(recipe(llama, "mass"), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    third = mergetool.run(recipe(llama, "mass"), output=tmp_path / "out").path
    assert read_manifest(first).files == read_manifest(third).files


def test_an_adapter_that_is_named_alone_is_on_the_recipes_base(llama, tmp_path):
    document = recipe(llama)
    expected = mergetool.run(document, output=tmp_path / "expected").path
    document["models"] = {task: {"adapter": str(llama / task)} for task in "abc"}
    found = mergetool.run(document, output=tmp_path / "found").path
    assert read_manifest(found).files == read_manifest(expected).files


def test_adapters_and_fine_tunes_may_share_a_bundle(llama, tmp_path):
    one = recipe(llama, "passthrough", tasks=["b"])
    del one["base"]
    mergetool.run(one, output=tmp_path / "b")
    document = recipe(llama, "mass", factors="float32")
    document["models"]["b"] = str(tmp_path / "b")
    mixed = mergetool.load_bundle(mergetool.run(document, output=tmp_path / "mixed").path)
    alone = mergetool.load_bundle(
        mergetool.run(recipe(llama, "mass", factors="float32"), output=tmp_path / "alone").path
    )
    inputs = tiny_inputs("llama")
    for task in "abc":
        found = mixed(tasks=[task], **inputs).logits
        torch.testing.assert_close(found, alone(tasks=[task], **inputs).logits, rtol=0, atol=1e-4)


def test_an_adapter_on_a_copy_of_the_base_is_read_whole(llama, tmp_path):
    tiny_model("llama").save_pretrained(llama / "copy")
    found = mergetool.run(recipe(llama, beside="copy", **EXACT), output=tmp_path / "found").path
    expected = mergetool.run(recipe(llama, **EXACT), output=tmp_path / "expected").path
    name = "model.layers.0.self_attn.q_proj.weight"
    for task in "abc":
        ours, theirs = whole(factors_in(found, task), name), whole(factors_in(expected, task), name)
        assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())


def test_a_base_with_an_adapter_is_not_taken_for_the_model_beneath(llama, tmp_path):
    document = recipe(llama, tasks=["b"], **EXACT)
    document["base"] = {"source": str(llama / "base"), "adapters": [str(llama / "a")]}
    document["merge"]["base"] = "reference"
    plan = mergetool.plan(document)
    assert {step.operation.name for step in plan.steps} == {"in full"}


def test_an_adapter_that_is_not_finite_is_named(llama, tmp_path):
    tensors = load_file(llama / "a/adapter_model.safetensors")
    name = min(tensors)
    tensors[name][0, 0] = float("inf")
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a/adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "a/adapter_config.json").write_text((llama / "a/adapter_config.json").read_text())
    document = recipe(llama)
    document["models"]["a"]["adapters"] = [str(tmp_path / "a")]
    with pytest.raises(MergeError, match="not finite"):
        mergetool.run(document, output=tmp_path / "out")


def test_an_expert_of_a_library_gives_its_factors_back(adapted, tmp_path):
    family, folder = adapted
    library = mergetool.run(recipe(folder, **EXACT), output=tmp_path / "library").path
    for task in SETTINGS[family]:
        expert, before = open_expert(library, task), AdapterSource(open_model(folder / "base"), folder / task)
        assert expert.origin.folder == library / "base"
        for name in expert.specs:
            b, a = expert.factors(name)
            assert b.dtype == a.dtype == torch.float32
            assert b.shape[1] == expert.num_directions(name) <= before.num_directions(name)
            expected = torch.matmul(*before.factors(name))
            torch.testing.assert_close(b @ a, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("keeps", ["copy", "reference"])
def test_a_library_gives_an_expert_back_as_an_adapter(adapted, keeps, tmp_path, monkeypatch):
    family, folder = adapted
    library = mergetool.run(recipe(folder, base=keeps, **EXACT), output=tmp_path / "library").path
    document = {
        "base": str(library / "base" if keeps == "copy" else folder / "base"),
        "models": {"b": {"source": str(library), "select": "b"}},
        "merge": {"method": "passthrough"},
        "output": {"kind": "adapter", "rank": "exact"},
    }
    forbid_dense(monkeypatch)
    out = mergetool.run(document, output=tmp_path / "b").path
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logits = []
        for adapter in (folder / "b", out):
            model = PeftModel.from_pretrained(type(tiny_model(family)).from_pretrained(folder / "base"), adapter)
            with torch.no_grad():
                logits.append(model.eval()(**tiny_inputs(family)).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4)


def save_classifiers(folder):
    """Two adapters with heads, trained on a base that has none."""
    tiny_model("bert").save_pretrained(folder / "base")
    for seed, task in enumerate("ab"):
        model = transformers.BertForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
        save_adapter(model, folder / task, seed, r=4, task_type="SEQ_CLS", target_modules=["query", "value"])


def test_heads_of_adapters_answer_where_the_base_names_their_class(tmp_path):
    save_classifiers(tmp_path)
    kind = transformers.AutoModelForSequenceClassification
    document = {
        "base": str(tmp_path / "base"),
        "models": {task: {"adapter": str(tmp_path / task)} for task in "ab"},
        "merge": {"method": "mass", "factors": "float32"},
    }
    with pytest.raises(PlanError, match=r"brings a head, classifier.bias.*: BertModel") as refused:
        mergetool.run(document, output=tmp_path / "out")
    assert "save the base by AutoModelForSequenceClassification, as base" in refused.value.fix
    kind.from_pretrained(tmp_path / "base", num_labels=3).save_pretrained(tmp_path / "named")
    document["base"] = str(tmp_path / "named")
    model = mergetool.load_bundle(mergetool.run(document, output=tmp_path / "out").path)
    assert {p.policy for p in model.manifest.parameters.values()} == {"svd", "skip"}
    inputs = tiny_inputs("bert")
    for task in "ab":
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            alone = PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "named"), tmp_path / task).eval()
            expected = alone(**inputs).logits
        torch.testing.assert_close(model(tasks=[task], **inputs).logits, expected, rtol=0, atol=1e-5)

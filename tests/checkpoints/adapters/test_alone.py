"""What adapters add, read without the model, against what peft's own merge adds to it in float64."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.checkpoints.adapters import AdapterAlone, Site
from mergetool.errors import SourceError
from mergetool.tensors.io import bytes_of
from tests.checkpoints.adapters.peft_oracle import Trained, opened, quiet, train
from tests.checkpoints.adapters.test_oracle import CASES, bert, llama, mixtral, tied

KINDS = {
    ": plain": "linear",
    ": some layers": "linear",
    ": gemma3": "embedding linear",
    ": t5": "embedding linear",
    "conv1d: all": "linear",
    "conv1d: embedding": "embedding linear",
    "conv1d: biases": "bias linear",
    "kind: convolutions, attention": "bias conv linear",
    "kind: bias of B": "added conv linear",
    "kind: all biases, tied head": "bias linear",
    "kind: resnet": "conv whole",
    "tied: saved both": "linear whole",
    "mixture: mixtral": "linear parameter",
    "mixture: patterns": "parameter",
    "mixture: a router's parameter": "parameter",
    "mixture: gpt-oss: square, (in, out)": "linear parameter",
    "with both biases": "bias linear",
    "rank-stabilised": "linear",
}
TIED = {
    "lm_head.weight",
    "transformer.wte.weight",
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.weight",
    "cls.predictions.bias",
    "cls.predictions.decoder.bias",
}
"""Of one tensor, peft changes all names where one is adapted."""
MORE = {
    "with both biases": (bert, {"target_modules": ["query"], "lora_bias": True, "bias": "lora_only"}),
    "rank-stabilised": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj"],
            "use_rslora": True,
            "rank_pattern": {"layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {"up_proj": 3},
        },
    ),
}


def added_by_peft(trained: Trained, model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name in memory -> (what peft's merge adds, what comes out), in float64."""
    with quiet():
        base = opened(model, trained.model).double()
        before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        merged = PeftModel.from_pretrained(base, trained.adapter).merge_and_unload().state_dict()
    return {name: (tensor - before[name], tensor) for name, tensor in merged.items()}


def read(source: AdapterAlone, name: str, step: int = 37) -> torch.Tensor:
    """A whole tensor, in slices that do not respect rows."""
    spec = source.specs[name]
    assert spec.dtype.name == "F32"
    out = torch.empty(spec.num_elements)
    for start in range(0, spec.num_elements, step):
        source.read_bytes(name, start * 4, bytes_of(out[start : start + step]))
    return out.view(spec.shape)


def as_trained(tensor: torch.Tensor, site: Site, case: str) -> torch.Tensor:
    """Of a weight that is stored (inputs, outputs), what peft's factors make: (outputs, inputs)."""
    turned = "conv1d" in case or ("gpt-oss" in case and site.experts > 1) or site.kind == "embedding"
    return tensor.transpose(-1, -2) if turned else tensor


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("case", KINDS)
def test_what_it_adds_is_what_pefts_merge_adds(case: str, tmp_path: Path) -> None:
    make, settings = (CASES | MORE)[case]
    torch.manual_seed(1)
    model = make()
    trained = train(tmp_path, model, **settings)
    source, dense = AdapterAlone(trained.adapter), added_by_peft(trained, model)
    assert {site.kind for site in source.sites.values()} == set(KINDS[case].split())
    assert source.needs_base == ()
    for name, site in source.sites.items():
        change, result = dense[name]
        found, wanted = read(source, name).double(), result if site.is_full else as_trained(change, site, case)
        close(found, wanted)
        if site.is_product:
            b, a = source.factors(name)
            close((b.double() @ a.double()).reshape(site.shape), wanted)
            assert b.shape[-1] == a.shape[-2] == site.rank
    changed = {name for name, (change, _) in dense.items() if change.abs().max() > 0}
    assert changed - TIED == source.sites.keys() - TIED


@pytest.mark.parametrize(
    "case",
    [
        "conv1d: biases",
        "kind: convolutions, attention",
        "kind: resnet",
        "mixture: patterns",
        "with both biases",
        "tied: embeddings, kept tied, with a rank of the head",
    ],
)
def test_what_is_written_again_adds_the_same(case: str, tmp_path: Path) -> None:
    """An adapter by itself, in and out: peft makes the same of both."""
    make, settings = (CASES | MORE)[case]
    torch.manual_seed(1)
    model = make()
    trained = train(tmp_path, model, **settings)
    recipe = {"models": {"a": {"adapter": str(trained.adapter)}}, "merge": {"method": "passthrough"}}
    written = mergetool.run(recipe, output=tmp_path / "out").path
    wanted, found = added_by_peft(trained, model), added_by_peft(Trained(trained.model, written, {}), model)
    for name, (_, result) in wanted.items():
        torch.testing.assert_close(found[name][1], result, rtol=1e-5, atol=1e-6, msg=name)


def test_tied_layers_that_were_trained_together_are_two_sites_of_one_weight(tmp_path: Path) -> None:
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    trained = train(tmp_path, tied(), **settings)
    source, dense = AdapterAlone(trained.adapter), added_by_peft(trained, tied())
    inputs, outputs = read(source, "model.embed_tokens.weight"), read(source, "lm_head.weight")
    close((inputs.T + outputs).double(), dense["lm_head.weight"][0])


def written(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> AdapterAlone:
    """An adapter of these tensors, by hand."""
    names = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(names, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **settings}))
    return AdapterAlone(folder)


A, B = torch.tensor([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]])
PAIR = {"x.lora_A.weight": A, "x.lora_B.weight": B}


def test_the_factor_is_in_b(tmp_path: Path) -> None:
    source = written(tmp_path, PAIR)
    b, a = source.factors("x.weight")
    assert torch.equal(b, B * 2)
    assert torch.equal(a, A)
    assert torch.equal(read(source, "x.weight", 2), torch.tensor([[2.0, 2.0, 4.0], [0.0, 6.0, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_factors_are_multiplied_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5).to(dtype), torch.randn(4, 2).to(dtype)
    source = written(tmp_path, {"x.lora_A.weight": a, "x.lora_B.weight": b})
    close(read(source, "x.weight").double(), 2 * b.double() @ a.double())
    assert source.stored_as("x.weight").name == {torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]


def test_names_hold_nothing_of_how_the_model_was_wrapped(tmp_path: Path) -> None:
    wrapped = {f"_orig_mod.model._fsdp_wrapped_module.{name}": tensor for name, tensor in PAIR.items()}
    assert list(written(tmp_path, wrapped).specs) == ["model.x.weight"]


def test_what_holds_in_full_is_read_as_it_is_stored(tmp_path: Path) -> None:
    head = torch.randn(3, 2).bfloat16()
    source = written(tmp_path, PAIR | {"score.weight": head}, modules_to_save=["score"])
    buffer = torch.empty(6, dtype=torch.bfloat16)
    source.read_bytes("score.weight", 0, bytes_of(buffer))
    assert torch.equal(buffer, head.reshape(-1))
    assert source.sites["score.weight"].is_full
    assert source.position("x.weight") < source.position("score.weight")
    assert [stamp.path.name for stamp in source.files] == ["adapter_model.safetensors", "adapter_config.json"]
    source.close()


def test_embeddings_that_peft_saves_beside_their_factors_are_the_bases(tmp_path: Path) -> None:
    pair = {"wte.lora_embedding_A": A, "wte.lora_embedding_B": B, "wte.base_layer.weight": torch.ones(3, 2)}
    source = written(tmp_path, pair)
    assert source.specs["wte.weight"].shape == (2, 3)
    assert torch.equal(read(source, "wte.weight"), 2 * B @ A)
    assert "held in full, too" in source.warnings[0]


@pytest.mark.parametrize(
    "case", ["kind: dora", "kind: dora of embeddings", "kind: dora of convolutions", "kind: tokens"]
)
def test_what_needs_the_base_is_read_and_told(case: str, tmp_path: Path) -> None:
    make, settings = CASES[case]
    trained = train(tmp_path, make(), **settings)
    source = AdapterAlone(trained.adapter)
    assert len(source.needs_base) == 1
    lengths = {site.module: site.shape for site in source.sites.values() if site.kind == "magnitude"}
    products = {site.module: site.shape[0] for site in source.sites.values() if site.is_product}
    assert "tokens" in case or lengths.keys() == products.keys()
    assert all(torch.Size(shape).numel() == products[module] for module, shape in lengths.items())


def test_what_means_nothing_without_the_base_is_told(tmp_path: Path) -> None:
    magnitude = {"x.lora_magnitude_vector": torch.ones(2)}
    source = written(tmp_path, PAIR | magnitude, use_dora=True)
    assert source.sites["x.lora_magnitude_vector"].kind == "magnitude"
    assert source.needs_base == ("DoRA gives the rows of W + s B A their lengths, and W is the base's (x)",)
    rows = {"wte.token_adapter.trainable_tokens_delta": torch.ones(2, 4)}
    source = written(tmp_path, PAIR | rows, trainable_token_indices={"wte": [1, 5]})
    assert list(source.specs) == ["x.weight"]
    assert source.needs_base == ("trainable_token_indices holds single rows of the base's wte",)


def test_an_untrained_adapter_is_told_to_change_nothing(tmp_path: Path) -> None:
    source = written(tmp_path, PAIR | {"x.lora_B.weight": torch.zeros(2, 2)})
    assert source.warnings == (f"{tmp_path} changes nothing: all its products are zero, as before training",)


def test_experts_whose_parameters_nothing_tells_are_told_by_their_model(tmp_path: Path) -> None:
    """Follow the advice: the shapes of the model tell."""
    settings = {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}
    trained = train(tmp_path, mixtral(), **settings)
    trained.set(target_parameters=None)
    with pytest.raises(SourceError, match="nothing tells which parameters") as caught:
        AdapterAlone(trained.adapter)
    assert f"adapters: [{trained.adapter}]" in caught.value.fix
    assert trained.source().adapted


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({}, {}, "changes nothing"),
        ({"x.lora_A.weight": A}, {}, "lora_B.weight is missing"),
        (PAIR | {"x.lora_B.weight": torch.ones(2, 3)}, {}, "B A is no matrix"),
        (PAIR, {"r": 4}, "the factors of x have rank 2"),
        (PAIR, {"use_dora": True}, "use_dora is True, but there is no magnitude for x"),
        (PAIR | {"x.lora_magnitude_vector": torch.ones(2)}, {}, "use_dora is False"),
        (PAIR | {"x.lora_A.weight": A.int()}, {}, "A is I32"),
        (PAIR | {"x.weight": torch.ones(2, 3)}, {}, "x.weight is brought twice"),
        ({"c.lora_A.weight": torch.ones(2, 3, 3), "c.lora_B.weight": torch.ones(4, 2, 3)}, {}, "B A is no matrix"),
        (PAIR, {"r": 3, "target_parameters": ["x.w"]}, "2 is no multiple of the rank, 3"),
        (PAIR, {"lora_alpha": None}, "the alpha of x is None"),
        (PAIR | {"x.lora_B.bias": torch.ones(3)}, {}, "it is [3] (F32) for 2 outputs"),
        (PAIR | {"x.lora_B.bias": torch.ones(2).int()}, {}, "it is [2] (I32) for 2 outputs"),
        (PAIR | {"x.lora_magnitude_vector": torch.ones(3)}, {"use_dora": True}, "it is [3] (F32) for 2 outputs"),
    ],
)
def test_what_has_no_meaning_is_refused(
    tensors: dict[str, torch.Tensor], settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SourceError) as caught:
        written(tmp_path, tensors, **settings)
    assert message in caught.value.what
    assert str(tmp_path) in caught.value.where


def test_pickled_weights_are_read_too(tmp_path: Path) -> None:
    written(tmp_path, PAIR)
    torch.save(load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_model.safetensors").unlink()
    assert torch.equal(read(AdapterAlone(tmp_path), "x.weight"), 2 * B @ A)

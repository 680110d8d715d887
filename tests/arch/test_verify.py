"""A proof is worth what it refuses: specs that are wrong in the known ways, and the axis that is blamed."""

import pytest
import torch

from mergetool.arch.match import resolve
from mergetool.arch.verify import deviation, failures, prove, runner
from mergetool.errors import PlanError
from mergetool.kernels.permute import Element
from tests.arch.networks import MLP, randomised, transformer

WRONG = {
    "queries and keys permuted across heads": (
        "BertForMaskedLM",
        """
        extends: bert
        spaces:
          mixed.{i}:
        tensors:
          encoder.layer.{i}.attention.self.query.weight: mixed.{i}, residual
          encoder.layer.{i}.attention.self.query.bias: mixed.{i}
          encoder.layer.{i}.attention.self.key.weight: mixed.{i}, residual
          encoder.layer.{i}.attention.self.key.bias: mixed.{i}
        """,
        "mixed.0",
    ),
    "rotary frequencies permuted": (
        "LlamaForCausalLM",
        """
        extends: llama
        spaces:
          qk.{i}: {within: "kv.{i}"}
        tensors:
          layers.{i}.self_attn.q_proj.weight: kv.{i} q.{i} qk.{i}, residual
          layers.{i}.self_attn.k_proj.weight: kv.{i} qk.{i}, residual
        """,
        "kv.0",
    ),
    "query heads permuted across key-value groups": (
        "LlamaForCausalLM",
        """
        extends: llama
        spaces:
          head.{i}: {size: num_attention_heads}
        tensors:
          layers.{i}.self_attn.q_proj.weight: head.{i} _, residual
          layers.{i}.self_attn.k_proj.weight: _, residual
          layers.{i}.self_attn.v_proj.weight: _, residual
          layers.{i}.self_attn.o_proj.weight: residual, head.{i} _
        """,
        "head.0",
    ),
    "signs of their own under a layer norm": (
        "GPT2LMHeadModel",
        """
        extends: gpt2
        spaces:
          residual: signed
        """,
        "residual",
    ),
}


def spec_of(model, path, text):
    path.write_text(text)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return resolve(str(path), shapes, model.config.to_dict())


@pytest.mark.parametrize("case", WRONG)
def test_a_group_that_is_no_symmetry_fails_the_proof_by_name(case, tmp_path):
    name, text, group = WRONG[case]
    model, batch = transformer(name)
    spec = spec_of(model, tmp_path / "wrong.yaml", text)
    found = failures(runner(model, **batch), model.state_dict(), spec)
    assert group in {failure.group.name for failure in found}
    assert all(failure.error > 1e-6 for failure in found)
    with pytest.raises(PlanError, match=group):
        prove(runner(model, **batch), model.state_dict(), spec)


@pytest.mark.parametrize(
    ("entry", "blamed"),
    [
        (
            "layers.{i}.mlp.down_proj.weight: residual, _",
            "model.layers.0.mlp.down_proj.weight, axis 1 (must carry ffn.0)",
        ),
        ("norm.weight: residual", "model.norm.weight, axis 0 (has its signs wrong)"),
        ("layers.{i}.self_attn.o_proj.weight: residual, kv.{i} vo.{i} q.{i}", "kv.0"),
        ("lm_head.weight: vocab, _", "lm_head.weight, axis 1 (must carry residual)"),
    ],
)
def test_the_axis_at_fault_is_named(entry, blamed, tmp_path):
    model, batch = transformer("LlamaForCausalLM", num_hidden_layers=1)
    spec = spec_of(model, tmp_path / "wrong.yaml", f"extends: llama\ntensors:\n  {entry}\n")
    with pytest.raises(PlanError) as caught:
        prove(runner(model, **batch), model.state_dict(), spec)
    assert blamed in str(caught.value)


def test_a_sign_that_only_a_flip_of_the_whole_stream_shows_is_found(tmp_path):
    model, batch = transformer("GPT2LMHeadModel", n_layer=1)
    spec = spec_of(model, tmp_path / "wrong.yaml", "extends: gpt2\ntensors:\n  ln_f.bias: abs(residual)\n")
    with pytest.raises(PlanError, match=r"transformer\.ln_f\.bias, axis 0 \(has its signs wrong\)"):
        prove(runner(model, **batch), model.state_dict(), spec)


def test_an_axis_that_must_stay_is_named(tmp_path):
    module = randomised(MLP(widths=(6, 9, 9)))
    path = tmp_path / "wrong.yaml"
    path.write_text(
        """
        spaces:
          hidden:
        tensors:
          layers.0.weight: hidden, _
          layers.0.bias: hidden
          layers.1.weight: hidden, hidden
          layers.1.bias: _
        """
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    run = runner(module, torch.randn(3, 6, generator=torch.Generator().manual_seed(1)))
    with pytest.raises(PlanError) as caught:
        prove(run, module.state_dict(), resolve(str(path), shapes))
    assert "layers.1.weight, axis 0 (must not carry hidden)" in str(caught.value)
    path.write_text(path.read_text().replace("hidden, hidden", "_, hidden"))
    assert prove(run, module.state_dict(), resolve(str(path), shapes)) < 1e-10


def test_a_space_without_a_reader_is_refused_without_a_module(tmp_path):
    model, _ = transformer("LlamaForCausalLM")
    text = """
        extends: llama
        tensors:
          layers.{i}.self_attn.v_proj.weight: _, residual
          layers.{i}.self_attn.v_proj.bias: _
        """
    with pytest.raises(PlanError, match=r"model\.layers\.0\.self_attn\.o_proj\.weight, axis 1: space 'vo\.0'"):
        spec_of(model, tmp_path / "wrong.yaml", text)


def test_the_proof_runs_in_double_precision_even_where_the_module_casts_down():
    model, batch = transformer("LlamaForCausalLM")
    spec = resolve(None, {n: tuple(t.shape) for n, t in model.state_dict().items()}, model.config.to_dict())
    run = runner(model, **batch)
    assert run(model.state_dict()).dtype == torch.float64
    element = Element.random(spec.spaces, torch.Generator().manual_seed(0))
    assert 0 < deviation(run, model.state_dict(), spec, element) < 1e-13


def test_a_network_that_breaks_under_a_group_counts_as_changed():
    module = randomised(MLP(widths=(6, 9, 6)))
    weights = module.state_dict()
    spec = resolve("mlp", {name: tuple(tensor.shape) for name, tensor in weights.items()})
    element = Element.random(spec.spaces, torch.Generator().manual_seed(0))
    calls = iter([torch.ones(3), torch.full((3,), float("nan"))])
    assert deviation(lambda _: next(calls), weights, spec, element) == float("inf")

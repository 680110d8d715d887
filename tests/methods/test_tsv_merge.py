import math

import numpy as np
import pytest
import torch

from mergetool.api import merge_state_dicts
from mergetool.errors import MergeError, RecipeError
from mergetool.methods.base import TensorGroup
from mergetool.methods.tsv_merge import TsvMerge
from tests.kernels.tsv_reference import SHAPES, reference_deltas, reference_numbers


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task(m, n, seed):
    """A matrix with singular values i^-0.7."""
    r = min(m, n)
    u = torch.linalg.qr(randn(m, r, seed=2 * seed))[0]
    v = torch.linalg.qr(randn(n, r, seed=2 * seed + 1))[0]
    return (u * torch.arange(1, r + 1) ** -0.7) @ v.mT


def update(deltas, **fields):
    """The merged task vector of one tensor, computed in float64 on top of a base of zeros."""
    return updates([{"mlp.weight": delta} for delta in deltas], **fields)["mlp.weight"]


def updates(deltas, **fields):
    base = {name: torch.zeros_like(delta) for name, delta in deltas[0].items()}
    return merge_state_dicts("tsv-merge", deltas, base, dtype="float64", **fields)


def notes_and_update(deltas, **fields):
    method = TsvMerge(**fields)
    names = tuple(f"m{index}" for index in range(len(deltas)))
    models = [delta.clone() for delta in deltas]
    group = TensorGroup("mlp.weight", tuple(deltas[0].shape), names, torch.zeros_like(deltas[0]), models)
    merged = method.merge(group, method.params(0.0, names), {})
    return group.notes, merged


def naive(deltas, k):
    """The algorithm as the paper writes it, in float64."""

    def nearest(x):
        p, _, qh = torch.linalg.svd(x, full_matrices=False)
        return p @ qh

    parts = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    u = nearest(torch.cat([u[:, :k] for u, _, _ in parts], 1))
    v = nearest(torch.cat([vh[:k].mT for _, _, vh in parts], 1))
    return u @ torch.diag(torch.cat([s[:k] for _, s, _ in parts])) @ v.mT


def truncated(delta, k):
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return (u[:, :k] * s[:k]) @ vh[:k]


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


# Agreement


@pytest.mark.parametrize("name", SHAPES)
def test_a_model_merges_as_the_authors_code_merges_it(name):
    expected = reference_numbers()[f"merge.{name}"]
    torch.testing.assert_close(updates(reference_deltas(), filter="reference")[name], expected, rtol=0, atol=1e-10)


def test_float32_models_merge_to_within_rounding_of_float64():
    base = {"w": 0.05 * randn(96, 64, seed=50).float()}
    models = [{"w": base["w"] + task(96, 64, seed).float()} for seed in range(4)]
    merged = merge_state_dicts("tsv-merge", models, base)["w"]
    deltas = [model["w"] - base["w"] for model in models]
    assert merged.dtype == torch.float32
    assert relative(merged.double() - base["w"].double(), naive(deltas, 16)) < 1e-6


def test_one_model_at_full_rank_is_that_model():
    delta = task(20, 30, 0)
    assert relative(update([delta]), delta) < 1e-12


def test_scale_multiplies_matrices_and_means_alike():
    deltas = reference_deltas()
    once, twice = updates(deltas), updates(deltas, scale=-2.0)
    assert all(relative(twice[name], -2 * once[name]) < 1e-12 for name in SHAPES)
    assert not any(value.any() for value in updates(deltas, scale=0.0).values())


def test_weights_multiply_the_task_vectors():
    deltas = [task(40, 30, seed) for seed in range(3)]
    weighted = [c * delta for c, delta in zip((2.0, -1.0, 0.5), deltas, strict=True)]
    weight = {"m0": 2.0, "m1": -1.0, "m2": 0.5}
    assert relative(update(deltas, weight=weight), update(weighted)) < 1e-12
    rows = [delta[0].clone() for delta in deltas]
    assert relative(update(rows, weight=weight), sum(delta[0] for delta in weighted) / 3) < 1e-12


@pytest.mark.parametrize("policy", ["drop", "reference"])
def test_a_model_of_weight_0_is_left_out(policy):
    deltas = [{"w": task(40, 30, seed), "b": randn(5, seed=seed)} for seed in range(3)]
    merged = updates(deltas, weight={"m0": 1.0, "m1": 0.0, "m2": 1.0}, null_policy=policy)
    assert relative(merged["w"], naive([deltas[0]["w"], deltas[2]["w"]], 15)) < 1e-10
    torch.testing.assert_close(merged["b"], (deltas[0]["b"] + deltas[2]["b"]) / 2)
    assert not any(value.any() for value in updates(deltas, weight=0.0).values())


# Rank


@pytest.mark.parametrize(
    ("rank", "kept"),
    [("auto", 10), (4, 4), (1, 1), (0.2, 6), (99, 30), (1.0, 30)],
)
def test_rank_says_how_many_directions_of_each_model_are_kept(rank, kept):
    deltas = [task(40, 30, seed) for seed in range(3)]
    assert relative(update(deltas, rank=rank), naive(deltas, kept)) < 1e-9


def test_rank_auto_rounds_down():
    deltas = [task(40, 32, seed) for seed in range(3)]
    assert relative(update(deltas), naive(deltas, 10)) < 1e-10


def test_energy_keeps_as_many_as_each_task_vector_needs():
    flat, steep = torch.zeros(2, 30, 30, dtype=torch.float64)
    flat[range(15), range(15)] = torch.linspace(1.1, 1.0, 15, dtype=torch.float64)
    steep[range(15, 30), range(15, 30)] = 10.0 ** -torch.arange(15, dtype=torch.float64)
    merged = update([flat, steep], rank={"energy": 0.9})
    found = torch.linalg.svdvals(merged)
    # 90 % of the flat one's energy takes 14 of its 15 values, of the steep one's a single value.
    assert int((found > 1e-9).sum()) == 14 + 1


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, "all", {"energy": 0.0}, {"energy": 1.5}, {"share": 0.5}, True])
def test_a_rank_that_means_nothing_is_refused(rank):
    with pytest.raises(RecipeError):
        update([task(8, 8, 0)], rank=rank)


@pytest.mark.parametrize("rank", ["auto", 0.3])
def test_a_tensor_too_small_for_its_rank_is_averaged_with_a_note(rank):
    deltas = [randn(2, 9, seed=seed) for seed in range(3)]
    notes, merged = notes_and_update(deltas, rank=rank)
    torch.testing.assert_close(merged, sum(deltas) / 3)
    assert notes == ["too small for the rank asked for: averaged"]


# Properties


def test_the_merge_has_the_singular_values_of_its_parts():
    deltas = [task(50, 40, seed) for seed in range(3)]
    kept = torch.cat([torch.linalg.svdvals(delta)[:13] for delta in deltas]).sort(descending=True).values
    found = torch.linalg.svdvals(update(deltas))
    torch.testing.assert_close(found[:39], kept, rtol=0, atol=1e-12)
    assert float(found[39:].max()) < 1e-12


def test_order_and_orientation_do_not_matter():
    deltas = [task(50, 40, seed) for seed in range(3)]
    merged = update(deltas)
    assert relative(update([deltas[2], deltas[0], deltas[1]]), merged) < 1e-12
    assert relative(update([delta.mT.contiguous() for delta in deltas]).mT, merged) < 1e-12


def test_models_on_disjoint_rows_and_columns_add_up():
    first, second = torch.zeros(2, 40, 30, dtype=torch.float64)
    first[:20, :15], second[20:, 15:] = randn(20, 15), randn(20, 15, seed=1)
    assert relative(update([first, second]), first + second) < 1e-10


# What real models bring


def test_copies_of_a_model_merge_to_its_leading_directions():
    delta = task(40, 30, 0)
    assert relative(update([delta] * 3), truncated(delta, 10)) < 1e-10
    assert relative(update([delta] * 3, rank=1.0), delta) < 1e-10


def test_the_reference_policy_fills_what_copies_leave_empty():
    delta = task(40, 30, 0)
    merged = update([delta] * 2, null_policy="reference")
    wanted = truncated(delta, 15)
    assert float(merged.norm()) == pytest.approx(math.sqrt(2) * float(wanted.norm()), rel=1e-9)
    live = [task(40, 30, seed) for seed in range(3)]
    assert relative(update(live, null_policy="reference"), update(live)) < 1e-10


def test_a_model_that_did_not_change_a_matrix_does_not_disturb_it():
    live = [task(40, 30, seed) for seed in range(2)]
    idle = torch.zeros(40, 30, dtype=torch.float64)
    assert relative(update([live[0], idle, live[1]]), naive(live, 10)) < 1e-10
    assert relative(update([live[0], idle, live[1]], null_policy="reference"), naive(live, 10)) > 0.1


@pytest.mark.parametrize("policy", ["drop", "reference"])
def test_a_matrix_that_no_model_changed_keeps_the_bases_values(policy):
    base = {"w": randn(6, 4).float()}
    merged = merge_state_dicts("tsv-merge", [base, base], base, null_policy=policy)
    assert torch.equal(merged["w"], base["w"])


def test_low_rank_models_merge_by_the_directions_that_they_have():
    deltas = [randn(40, 2, seed=seed) @ randn(2, 30, seed=10 + seed) for seed in range(3)]
    assert relative(update(deltas), naive(deltas, 2)) < 1e-10


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_named(bad):
    base = {"mlp.weight": torch.zeros(8, 6)}
    models = [{"mlp.weight": randn(8, 6, seed=seed).float()} for seed in range(2)]
    models[1]["mlp.weight"][3, 4] = bad
    with pytest.raises(MergeError, match="not finite in model 'm1'"):
        merge_state_dicts("tsv-merge", models, base)


def test_two_runs_give_the_same_bits():
    deltas = [task(40, 30, 0), task(40, 30, 0), randn(40, 2) @ randn(2, 30, seed=1)]
    assert torch.equal(update(deltas), update(deltas))


# Damping


def drawn(seed, *shape):
    return np.random.RandomState(seed).randn(*shape)


def oracles():
    yield "A", [drawn(100 + t, 12, 8) / 10 for t in range(3)], 1.2721839775, 1.2570005235
    shared = drawn(7, 8, 1) @ drawn(8, 1, 12) / 20
    low = [drawn(200 + t, 8, 2) @ drawn(300 + t, 2, 12) / 10 + drawn(400 + t, 8, 12) / 50 + shared for t in range(3)]
    yield "B", low, 2.4172739396, 2.3169618776
    yield "C", [drawn(500 + t, 9, 10) / 10 for t in range(4)], 1.4073451540, 1.3160618141
    tall = [drawn(800 + t, 16, 2) @ drawn(900 + t, 2, 10) / 8 + drawn(950 + t, 16, 10) / 20 for t in range(2)]
    yield "D", tall, 3.6570547571, 3.5030016503


@pytest.mark.parametrize(("deltas", "plain", "damped"), [pytest.param(*case, id=name) for name, *case in oracles()])
def test_a_damped_merge_is_as_long_as_computed_elsewhere(deltas, plain, damped):
    deltas = [torch.from_numpy(delta) for delta in deltas]
    assert float(update(deltas).norm()) == pytest.approx(plain, abs=1e-9)
    assert float(update(deltas, damping=0.01).norm()) == pytest.approx(damped, abs=1e-9)


def test_damping_keeps_near_copies_at_their_length():
    delta = task(40, 30, 0)
    copy = delta + 1e-4 * delta.norm() * randn(40, 30, seed=5) / 1200**0.5
    wanted = float(truncated(delta, 15).norm())
    assert float(update([delta, copy]).norm()) == pytest.approx(2**0.5 * wanted, rel=1e-2)
    assert float(update([delta, copy], damping=0.01).norm()) == pytest.approx(wanted, rel=2e-2)


def test_damping_and_filling_exclude_each_other():
    with pytest.raises(RecipeError, match="write `null_policy: drop`"):
        update([task(8, 6, 0)] * 2, damping=0.01, null_policy="reference")
    assert relative(update([task(8, 6, 0)] * 2, damping=0.01, null_policy="drop"), truncated(task(8, 6, 0), 3)) < 0.01


# Which tensors are matrices

NAMES = {
    "model.embed_tokens.weight": {"reference", "fusionbench"},
    "lm_head.weight": {"reference", "fusionbench"},
    "output.weight": {"reference", "fusionbench"},
    "model.layers.0.self_attn.q_proj.weight": {"llm", "reference", "fusionbench"},
    "model.layers.0.mlp.gate_proj.weight": {"llm", "reference", "fusionbench"},
    "model.layers.0.block_sparse_moe.gate.weight": {"reference", "fusionbench"},
    "model.layers.0.mlp.shared_expert_gate.weight": {"reference", "fusionbench"},
    "model.layers.0.mlp.shared_expert.up_proj.weight": {"llm", "reference", "fusionbench"},
    "layers.0.router.weight": {"reference", "fusionbench"},
    "transformer.wte.weight": {"reference", "fusionbench"},
    "transformer.wpe.weight": {"reference", "fusionbench"},
    "bert.embeddings.position_embeddings.weight": {"reference", "fusionbench"},
    "encoder.layer.0.attention.output.dense.weight": {"llm", "reference", "fusionbench"},
    "shared.weight": {"reference", "fusionbench"},
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": {"reference", "fusionbench"},
    "rotary_emb.table": {"reference", "fusionbench"},
    "model.visual.positional_embedding": {"reference", "fusionbench"},
    "model.visual.proj": {"llm", "reference", "fusionbench"},
    "model.text_projection": {"llm", "fusionbench"},
}


@pytest.mark.parametrize("preset", ["llm", "reference", "fusionbench", "none"])
def test_filter_presets_choose_the_expected_matrices(preset):
    deltas = [{name: task(9, 8, seed) for name in NAMES} for seed in range(2)]
    merged = updates(deltas, filter=preset)
    mean = {name: sum(each[name] for each in deltas) / 2 for name in NAMES}
    spectral = {name for name in NAMES if relative(merged[name], mean[name]) > 1e-9}
    assert spectral == {name for name, presets in NAMES.items() if preset in presets}
    assert all(relative(merged[name], naive([each[name] for each in deltas], 4)) < 1e-9 for name in spectral)


def test_vectors_scalars_and_convolutions_are_averaged():
    shapes = {"norm": (7,), "logit_scale": (), "conv": (4, 3, 2, 2), "patches": (6, 3, 2)}
    deltas = [{name: randn(*shape, seed=seed) for name, shape in shapes.items()} for seed in range(3)]
    for name, merged in updates(deltas).items():
        torch.testing.assert_close(merged, sum(each[name] for each in deltas) / 3)


def test_convolutions_can_be_matrices_too():
    deltas = [randn(8, 3, 2, 2, seed=seed) for seed in range(2)]
    merged = update(deltas, conv="matricize")
    assert merged.shape == (8, 3, 2, 2)
    assert relative(merged.reshape(8, 12), naive([delta.reshape(8, 12) for delta in deltas], 4)) < 1e-10


def test_integers_are_the_bases():
    base = {"position_ids": torch.arange(4)}
    models = [{"position_ids": torch.arange(4) + 1}] * 2
    assert torch.equal(merge_state_dicts("tsv-merge", models, base)["position_ids"], base["position_ids"])


def test_an_override_takes_a_tensor_out_or_changes_its_rank():
    deltas = [{"a": task(9, 8, seed), "b": task(9, 8, 5 + seed)} for seed in range(2)]
    merged = updates(deltas, overrides=[{"match": "a", "filter": "none"}, {"match": "b", "rank": {"energy": 0.4}}])
    assert relative(merged["a"], (deltas[0]["a"] + deltas[1]["a"]) / 2) < 1e-12
    assert relative(merged["b"], naive([each["b"] for each in deltas], 1)) < 1e-10


@pytest.mark.parametrize("method", ["tsv-merge", "iso-c", "iso-cts"])
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")])
def test_projections_merge_as_the_fused_matrix_does(method, names):
    rows = (12, 4, 8)  # grouped-query attention has fewer keys and values
    fused = [task(24, 16, seed) for seed in range(3)]
    order = sorted(range(3), key=lambda place: names[place])
    split = [
        {
            f"layer.0.{names[place]}.weight": part.clone()
            for place, part in zip(order, each.split([rows[p] for p in order]), strict=True)
        }
        for each in fused
    ]
    others = {"layer.0.o_proj.weight": task(16, 16, 9), "layer.0.q_proj.bias": randn(12)}
    split = [each | {name: value.clone() for name, value in others.items()} for each in split]
    base = {name: torch.zeros_like(value) for name, value in split[0].items()}
    found = merge_state_dicts(method, split, base, dtype="float64", fuse="qkv", scale=1.0)
    whole = merge_state_dicts(
        method, [{"w": each} for each in fused], {"w": torch.zeros(24, 16).double()}, dtype="float64", scale=1.0
    )["w"]
    together = torch.cat([found[f"layer.0.{names[place]}.weight"] for place in order])
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-10)
    apart = merge_state_dicts(method, split, base, dtype="float64", scale=1.0)
    for name in others:
        assert torch.equal(apart[name], found[name])
    assert float((apart[f"layer.0.{names[0]}.weight"] - found[f"layer.0.{names[0]}.weight"]).norm()) > 1e-3


def test_a_projection_that_is_taken_from_elsewhere_is_no_part_of_the_fused_matrix():
    deltas = [
        {f"layer.0.{name}_proj.weight": task(8, 16, 3 * seed + place) for place, name in enumerate("qkv")}
        for seed in range(2)
    ]
    base = {name: torch.zeros_like(value) for name, value in deltas[0].items()}
    overrides = [{"match": "*.k_proj.*", "use": "base"}]
    found = merge_state_dicts("tsv-merge", deltas, base, dtype="float64", fuse="qkv", overrides=overrides)
    without = [{name: value for name, value in each.items() if "k_proj" not in name} for each in deltas]
    expected = merge_state_dicts("tsv-merge", without, {n: base[n] for n in without[0]}, dtype="float64", fuse="qkv")
    assert not found["layer.0.k_proj.weight"].any()
    for name, value in expected.items():
        assert torch.equal(found[name], value)


def test_only_matrices_must_be_held_whole():
    method = TsvMerge()
    assert method.granularity_in("model.layers.0.mlp.up_proj.weight", (9, 8)) == "tensor"
    assert method.granularity_in("model.embed_tokens.weight", (9, 8)) == "element"
    assert method.granularity_in("conv.weight", (9, 8, 3, 3)) == "element"
    assert TsvMerge(conv="matricize").granularity_in("conv.weight", (9, 8, 3, 3)) == "tensor"

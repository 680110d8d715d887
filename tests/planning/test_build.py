"""Plans from headers: what is merged, copied, refused; numbers at every depth; files laid out."""

import pytest
import torch

import mergetool
from mergetool.errors import PlanError, SourceError
from mergetool.tensors.source import SafetensorsSource
from tests.files import SHAPES, tensors, write_model, write_models

TIES = {"method": "ties"}
LINEAR = {"method": "linear"}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder, in which relative paths are looked up."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def toys(here):
    """Models base, a and b."""
    return write_models(here)


def planned(merge, *, base="base", models=("a", "b"), **sections):
    recipe = {"models": {name: name for name in models}, "merge": merge, **sections}
    return mergetool.plan(recipe | ({"base": base} if base else {}))


def steps_of(plan):
    return {step.spec.name: step for step in plan.steps}


def refused(*arguments, **sections):
    with pytest.raises(PlanError) as caught:
        planned(*arguments, **sections)
    assert caught.value.exit_code == 4
    assert caught.value.fix
    return caught.value


def changed(folder, name, seed, **changes):
    """A toy model with some tensors replaced (None: left out)."""
    state = tensors(seed) | {key.replace("__", "."): value for key, value in changes.items()}
    return write_model(folder / name, {key: value for key, value in state.items() if value is not None})


# -------------------------------------------------------------------- what is merged and what is copied


def test_every_tensor_of_the_base_is_merged_from_all_models(toys):
    for step in planned(TIES).steps:
        assert step.reads == ("base", "a", "b")
        assert step.spec.shape == SHAPES[step.spec.name]


def test_whole_numbers_are_copied_from_the_base(here):
    for name in ("base", "a", "b"):
        changed(here, name, 0, position_ids=torch.arange(8))
    step = steps_of(planned(TIES))["position_ids"]
    assert (step.operation.name, step.reads, step.spec.dtype.name) == ("copy", ("base",), "I64")


def test_complex_numbers_are_copied_with_a_word(here):
    for name in ("base", "a"):
        changed(here, name, 0, w=torch.zeros(2, dtype=torch.complex64))
    plan = planned({"method": "task-arithmetic"}, models=("a",))
    assert steps_of(plan)["w"].operation.name == "copy"
    assert plan.warnings == ("1 tensors of complex numbers are copied from the base, not merged: w",)


def test_tensors_are_visited_in_the_order_of_the_base_file(toys):
    plan = planned(TIES)
    source = plan.sources["base"]
    places = [source.position(step.spec.name) for step in plan.steps]
    assert places == sorted(places)


def test_merged_tensors_keep_the_dtype_of_the_base(here):
    for seed, (name, dtype) in enumerate(
        {"base": torch.bfloat16, "a": torch.float16, "b": torch.float32, "c": torch.float8_e4m3fn}.items()
    ):
        write_model(here / name, tensors(seed, dtype=dtype))
    assert {step.spec.dtype.name for step in planned(TIES, models="abc").steps} == {"BF16"}
    stored = planned(TIES, models="abc", output={"dtype": "float16"})
    assert {step.spec.dtype.name for step in stored.steps} == {"F16"}


def test_sums_are_float64_where_a_tensor_is(here):
    write_model(here / "a", {"w": torch.ones(2), "v": torch.ones(2)})
    write_model(here / "b", {"w": torch.ones(2), "v": torch.ones(2, dtype=torch.float64)})
    assert planned(LINEAR, base=None).compute_bits == 64
    assert planned(LINEAR, base=None, models="a").compute_bits == 32


def test_empty_tensors_and_scalars_are_planned(here):
    for name in ("base", "a"):
        write_model(here / name, {"empty": torch.zeros(0, 3), "scalar": torch.tensor(1.0)})
    steps = steps_of(planned(TIES, models="a"))
    assert steps["empty"].operation.name == "copy"
    assert steps["scalar"].operation.name == "ties"


def test_models_without_tensors_are_refused(here):
    write_model(here / "a", {})
    assert "no tensors to merge" in refused(LINEAR, base=None, models="a").what


# -------------------------------------------------------------------- models that do not fit together


def test_shapes_that_differ_are_refused_with_both(here):
    write_models(here, ("base", "a"))
    changed(here, "b", 1, lm_head__weight=torch.ones(16, 9))
    error = refused(TIES)
    assert error.what == "shape [16, 9] in model 'b', [16, 8] in the base"
    assert error.where == "lm_head.weight"
    override = error.fix.partition("overrides: ")[2]
    plan = planned({**TIES, "overrides": [{"match": "lm_head.weight", "use": "base"}]})
    assert "lm_head.weight" in override
    assert steps_of(plan)["lm_head.weight"].reads == ("base",)


@pytest.mark.parametrize(("whole", "who"), [("base", "the base"), ("b", "model 'b'")])
def test_whole_numbers_in_place_of_weights_are_refused(here, whole, who):
    for seed, name in enumerate(("base", "a", "b")):
        weight = torch.ones(16, 8, dtype=torch.int8 if name == whole else torch.float32)
        changed(here, name, seed, lm_head__weight=weight)
    error = refused(TIES)
    assert f"I8 in {who}" in error.what
    assert "F32 in " in error.what
    assert error.where == "lm_head.weight"


def test_a_quantised_model_is_refused(toys):
    write_model(toys / "b", tensors(2), {"quantization_config": {"quant_method": "gptq"}})
    error = refused(TIES)
    assert "quantised" in error.what
    assert error.where == f"model 'b': {toys / 'b'}"


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\xff", "1"])
def test_a_broken_config_is_refused_before_anything_is_merged(toys, text):
    (toys / "a/config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError) as caught:
        planned(TIES)
    assert caught.value.where == f"model 'a': {toys / 'a/config.json'}"


def test_a_broken_model_is_named(toys):
    (toys / "b/model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        planned(TIES)
    assert caught.value.where == f"model 'b': {toys / 'b/model.safetensors'}"


# -------------------------------------------------------------------- missing and extra tensors


@pytest.fixture
def lacking(here):
    """Model b lacks two tensors."""
    write_models(here, ("base", "a"))
    changed(here, "b", 2, lm_head__weight=None, model__embed_tokens__weight=None)


def test_missing_tensors_are_refused(lacking):
    error = refused(TIES)
    assert error.what == "model 'b' lacks 2 tensors that base has: lm_head.weight, model.embed_tokens.weight"
    assert refused(LINEAR, base=None).what.startswith("model 'b' lacks 2 tensors that another model has")


def test_the_base_stands_in_for_missing_tensors(lacking):
    step = steps_of(planned(TIES, check={"missing": "base"}))["lm_head.weight"]
    assert (step.operation.models, step.reads) == (("a", "b"), ("base", "a", "base"))


def test_models_that_lack_a_tensor_are_left_out_of_it(lacking):
    merge = {**TIES, "density": {"a": 0.1, "b": 0.2}}
    steps = steps_of(planned(merge, check={"missing": "skip"}))
    assert steps["lm_head.weight"].operation.models == ("a",)
    assert steps["lm_head.weight"].operation.params.density == (0.1,)
    assert steps["model.layers.0.mlp.weight"].operation.params.density == (0.1, 0.2)
    alone = steps_of(planned({"method": "slerp"}, base=None, check={"missing": "skip"}))["lm_head.weight"]
    assert (alone.operation.name, alone.reads) == ("copy", ("a",))


def test_an_override_that_copies_makes_up_for_missing_tensors(lacking):
    overrides = [{"match": "lm_head*", "use": "base"}, {"match": "*embed*", "use": "a"}]
    steps = steps_of(planned({**TIES, "overrides": overrides}))
    assert steps["lm_head.weight"].reads == ("base",)
    assert steps["model.embed_tokens.weight"].reads == ("a",)
    assert "no such tensor" in refused({**TIES, "overrides": [{"match": "*", "use": "b"}]}).what


@pytest.fixture
def exceeding(here):
    """Models a and b have a tensor that the base lacks."""
    write_models(here, ("base",))
    changed(here, "a", 1, extra=torch.ones(3))
    changed(here, "b", 2, extra=torch.ones(3))


@pytest.mark.parametrize(("extra", "reads"), [(None, ("a",)), ("keep", ("a",)), ("drop", None)])
def test_extra_tensors_are_kept_or_dropped(exceeding, extra, reads):
    steps = steps_of(planned(TIES, **({"check": {"extra": extra}} if extra else {})))
    assert (steps["extra"].reads if "extra" in steps else None) == reads


def test_extra_tensors_are_refused_if_asked_for(exceeding):
    assert refused(TIES, check={"extra": "error"}).what == "tensor 'extra' is in model 'a' but not in the base"


def test_without_a_base_no_tensor_is_extra(exceeding):
    assert steps_of(planned(LINEAR, base=None))["extra"].reads == ("a", "b")


# -------------------------------------------------------------------- numbers


def test_gradients_follow_depth(here):
    shapes = {f"model.layers.{layer}.w": (4,) for layer in range(5)} | {"head": (4,)}
    write_models(here, ("a", "b"), shapes=shapes)
    weight = {"a": {"gradient": [1.0, 0.0]}, "b": {"gradient": [0.0, 4.0, 1.0]}}
    steps = steps_of(planned({**LINEAR, "weight": weight}, base=None))
    assert [steps[f"model.layers.{layer}.w"].operation.params.weight for layer in range(5)] == [
        (1.0, 0.0),
        (0.75, 2.0),
        (0.5, 4.0),
        (0.25, 2.5),
        (0.0, 1.0),
    ]
    assert steps["head"].operation.params.weight == (1.0, 0.0)


def test_the_first_override_that_matches_wins(toys):
    overrides = [{"match": "*.0.*", "density": 0.1}, {"match": "*norm*", "density": 0.2, "weight": 3}]
    steps = steps_of(planned({**TIES, "density": 0.5, "overrides": overrides}))
    found = {name: (step.operation.params.density[0], step.operation.params.weight[0]) for name, step in steps.items()}
    assert found == {
        "lm_head.weight": (0.5, 1.0),
        "model.embed_tokens.weight": (0.5, 1.0),
        "model.layers.0.mlp.weight": (0.1, 1.0),
        "model.layers.0.norm.weight": (0.1, 1.0),
        "model.layers.1.mlp.weight": (0.5, 1.0),
        "model.layers.1.norm.weight": (0.2, 3.0),
    }


def test_an_override_means_experts_by_their_own_names_and_by_those_that_they_have_when_fused(here):
    moe = "model.layers.0.block_sparse_moe."
    names = [f"{moe}experts.0.w1.weight", f"{moe}experts.0.w2.weight", f"{moe}gate.weight", "model.norm.weight"]
    for model in ("a", "b"):
        write_model(here / model, {name: torch.ones(2, 2) for name in names})
    for match, meant in (
        ("*mlp*", names[:3]),
        ("*.mlp.experts.*", names[:2]),
        ("*gate_up_proj", names[:1]),
        ("*down_proj*", names[1:2]),
        ("*.mlp.gate.*", names[2:3]),
        ("*block_sparse_moe*", names[:3]),
        ("*.w2.*", names[1:2]),
    ):
        merge = {"method": "linear", "overrides": [{"match": match, "weight": 0.25}]}
        plan = planned(merge, base=None)
        found = [name for name, step in steps_of(plan).items() if step.operation.params.weight == (0.25, 0.25)]
        assert sorted(found) == sorted(meant)
        assert not plan.warnings


def test_overrides_that_match_nothing_are_warned_about(toys):
    overrides = [{"match": "*gate*", "density": 0.1}, {"match": "*", "use": "a"}, {"match": "lm_*", "use": "b"}]
    plan = planned({**TIES, "overrides": overrides})
    assert plan.warnings == ("override '*gate*' matches no tensor", "override 'lm_*' matches no tensor")


def test_overrides_for_what_two_others_match_need_not_match(toys):
    overrides = [{"match": match, "density": 0.1} for match in ("*norm*head*", "*norm*gate*", "*norm*", "*head*")]
    plan = planned({**TIES, "overrides": overrides})
    assert plan.warnings == ("override '*norm*gate*' matches no tensor",)


@pytest.mark.parametrize(
    ("merge", "base"),
    [
        ({"method": "linear", "weight": {"a": 1, "b": -1}}, None),
        ({"method": "linear", "weight": 0, "normalize": False}, None),
        ({"method": "linear", "weight": {"a": 0.3, "b": {"gradient": [0.3, -0.3]}}}, None),
        ({"method": "task-arithmetic", "weight": {"a": 1, "b": -1}, "normalize": True}, "base"),
        ({"method": "dare-linear", "weight": {"a": 1, "b": -1}, "normalize": True}, "base"),
    ],
)
def test_weights_that_cancel_are_refused_while_planning(toys, merge, base):
    error = refused(merge, base=base)
    assert "add up to 0" in error.what
    assert merge["method"] in error.where


@pytest.mark.parametrize("method", ["linear", "task-arithmetic", "dare-linear"])
def test_weights_that_cancel_but_for_rounding_are_refused(here, method):
    write_models(here, ("base", "a", "b", "c"))
    base = None if method == "linear" else "base"
    weight = {"a": 0.1, "b": 0.2, "c": -0.3}  # add up to 5.6e-17
    assert (
        "add up to 0" in refused({"method": method, "weight": weight, "normalize": True}, base=base, models="abc").what
    )


@pytest.mark.parametrize(
    "different",
    [
        {"density": {"gradient": [0.1, 0.9]}},
        {"density": 0.5, "overrides": [{"match": "*norm*", "density": 0.1}]},
    ],
)
def test_a_survey_of_the_whole_model_needs_the_same_numbers_everywhere(toys, different):
    error = refused({**TIES, "scope": "model", **different})
    assert "its numbers differ from those of lm_head.weight" in error.what
    assert planned({**TIES, "scope": "tensor", **different}).steps
    other = {"scale": {"gradient": [0.1, 0.9]}, "overrides": [{"match": "*norm*", "scope": "tensor", "density": 0.1}]}
    assert planned({**TIES, "scope": "model", **other}).steps  # these have no part in the survey


def test_a_survey_of_the_whole_model_needs_the_same_models_everywhere(lacking):
    error = refused({**TIES, "scope": "model"}, check={"missing": "skip"})
    assert "models a, b have this tensor, and a have lm_head.weight" in error.what
    assert planned({**TIES, "scope": "model"}, check={"missing": "base"}).steps


# -------------------------------------------------------------------- output files


def test_tensors_are_dealt_into_files_of_the_size_asked_for(toys):
    plan = planned(TIES, output={"shard_size": 600})
    assert [shard.name for shard in plan.shards] == [f"model-0000{i}-of-00003.safetensors" for i in range(1, 4)]
    for shard in plan.shards:
        sizes = [slot.spec.num_bytes for slot in shard.header.slots.values()]
        assert sum(sizes) <= 600
    assert [plan.shards[slot.shard].name for slot in plan.slots] == sorted(
        plan.shards[slot.shard].name for slot in plan.slots
    )


def test_a_tensor_larger_than_a_file_gets_one_of_its_own(toys):
    plan = planned(TIES, output={"shard_size": 1})
    assert len(plan.shards) == len(plan.steps)


def test_one_file_has_no_number(toys):
    assert [shard.name for shard in planned(TIES).shards] == ["model.safetensors"]


def test_a_plan_reads_no_weights(toys, monkeypatch):
    whole = planned(TIES)
    monkeypatch.setattr(SafetensorsSource, "read_bytes", None)
    for name in ("base", "a", "b"):
        path = toys / name / "model.safetensors"
        header = path.read_bytes()
        size = 8 + int.from_bytes(header[:8], "little")
        with path.open("r+b") as file:  # the same size, without its weights
            file.truncate(size)
            file.truncate(len(header))
    plan = planned(TIES)
    assert plan.steps == whole.steps
    assert plan.bytes_out == (toys / "base" / "model.safetensors").stat().st_size

"""Running a plan: the same bytes however it is run, and errors that name the culprit."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import mergetool
from mergetool.errors import MergeError, OutputError, PlanError, RecipeError, SourceError
from tests.files import LONG, Watch, content, tensors, write_model, write_models, write_sparse

LARGE = {"model.layers.0.w": (2100, 2000), "model.layers.1.w": (130, 1100), "b": (7,), "scalar": (), "empty": (0, 4)}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(merge, *, base="base", models="ab", output="out", dtype="source", flags=None, **sections):
    output = {"path": output, "dtype": dtype}
    recipe = {"models": {name: name for name in models}, "merge": merge, "output": output}
    return mergetool.run(recipe | ({"base": base} if base else {}) | sections, **(flags or {}))


# -------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize(
    "merge",
    [
        {"method": "dare-ties", "density": 0.3},
        {"method": "dare-linear", "rescale": "l1"},
        {"method": "ties", "density": 0.1, "boundary": "random"},
        {"method": "ties", "density": 0.1, "scope": "model"},
    ],
    ids=lambda merge: " ".join(map(str, merge.values())),
)
def test_the_number_of_workers_and_a_merge_in_memory_change_no_byte(here, merge):
    """The largest tensor is more than one unit of work; 16-bit values have many ties."""
    write_models(here, shapes=LARGE, dtype=torch.bfloat16)
    for workers in (1, 2, 4) if LONG else (1, 3):
        merged(merge, output=f"out{workers}", flags={"workers": workers})
        assert content(here / f"out{workers}") == content(here / "out1")
    states = {name: load_file(here / name / "model.safetensors") for name in ("base", "a", "b")}
    base = states.pop("base")
    together = mergetool.merge_state_dicts(merge, states, base=base)
    for name, tensor in load_file(here / "out1/model.safetensors").items():
        assert torch.equal(tensor, together[name]), name


# -------------------------------------------------------------------- values that are not finite


@pytest.mark.parametrize(
    ("who", "method", "named"),
    [
        ("b", {"method": "linear"}, "model 'b'"),
        ("a", {"method": "task-arithmetic"}, "model 'a'"),
        ("base", {"method": "ties"}, "the base"),
        ("a", {"method": "slerp"}, "model 'a'"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_model_that_holds_a_value_that_is_not_finite_is_named(here, who, method, named, value):
    write_models(here)
    state = tensors(("base", "a", "b").index(who))
    state["model.layers.1.mlp.weight"][3, 5] = value
    write_model(here / who, state)
    base = None if method["method"] in ("linear", "slerp") else "base"
    with pytest.raises(MergeError) as caught:
        merged(method, base=base)
    assert "model.layers.1.mlp.weight" in caught.value.where
    assert "flat index 29" in caught.value.what
    assert named in caught.value.what
    assert caught.value.exit_code == 5
    assert sorted(path.name for path in here.iterdir()) == ["a", "b", "base"]


def test_values_that_are_not_finite_are_written_if_asked_for_and_noted(here):
    write_models(here)
    state = tensors(1)
    state["lm_head.weight"][0, 0] = float("inf")
    write_model(here / "a", state)
    result = merged({"method": "linear"}, base=None, check={"non_finite": "keep"})
    assert result.notes == {"holds values that are not finite": 1}
    assert load_file(here / "out/model.safetensors")["lm_head.weight"][0, 0] == float("inf")


@pytest.mark.parametrize(("value", "fits"), [(65504.0, True), (65519.9, True), (65520.0, False), (-7e4, False)])
def test_values_too_large_for_float16_are_explained(here, value, fits):
    write_model(here / "a", {"w": torch.tensor([1.0, value])})
    if fits:
        merged({"method": "linear"}, base=None, models="a", dtype="float16")
        assert load_file(here / "out/model.safetensors")["w"][1] == 65504.0
        return
    with pytest.raises(MergeError) as caught:
        merged({"method": "linear"}, base=None, models="a", dtype="float16")
    assert "its largest finite F16 value is 65504" in caught.value.what
    assert "output.dtype: float32" in caught.value.fix


def write_float8(folder, name, dtype, values):
    write_model(folder / name, {"w": torch.tensor(values).to(dtype)})


@pytest.mark.parametrize(
    ("dtype", "largest"),
    [(torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0), (torch.float8_e4m3fnuz, 240.0)],
    ids=str,
)
def test_sums_that_overflow_8_bits_are_refused_though_torch_saturates(here, dtype, largest):
    for name in ("a", "b"):
        write_float8(here, name, dtype, [1.0, largest])
    merged({"method": "linear"}, base=None, output="mean")
    assert load_file(here / "mean/model.safetensors")["w"].float().tolist() == [1.0, largest]
    slightly = {"method": "linear", "weight": 0.505, "normalize": False}  # rounds to the largest number
    merged(slightly, base=None, output="more")
    assert load_file(here / "more/model.safetensors")["w"].float().tolist() == [1.0, largest]
    with pytest.raises(MergeError, match=r"1 values are not finite, .* index 1 .its largest finite F8_.* value is"):
        merged({"method": "linear", "normalize": False}, base=None)


def test_factors_too_large_for_the_compute_dtype_are_explained(here):
    write_models(here)
    with pytest.raises(MergeError) as caught:
        merged({"method": "task-arithmetic", "scale": 1e300}, flags={"workers": 1})
    assert "compute.dtype: float64" in caught.value.fix
    assert "lm_head.weight" in caught.value.where


# -------------------------------------------------------------------- inputs that change under our hands


def test_an_input_that_changes_after_it_was_hashed_is_noticed_and_nothing_is_kept(here):
    write_models(here, names=("a", "b"))
    path = here / "b/model.safetensors"

    def on_advance(count):
        if count == 4:
            data = bytearray(path.read_bytes())
            data[-100:] = bytes(100)
            path.write_bytes(data)

    with pytest.raises(SourceError, match="changed while it was being merged") as caught:
        merged({"method": "linear"}, base=None, flags={"workers": 1, "progress": Watch(on_advance)})
    assert caught.value.where == str(path)
    assert sorted(p.name for p in here.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("how", ["removed", "replaced", "cut off"])
def test_an_input_that_disappears_ends_the_run_with_its_name(here, how):
    """Removed before its first read: that once made the run wait for ever."""
    write_models(here, names=("a", "b"))
    path = here / "b/model.safetensors"

    class Saboteur(Watch):
        def start(self, total_bytes, label):
            if how == "cut off":
                os.truncate(path, 1000)
            else:
                path.unlink()
            if how == "replaced":
                shutil.copy(here / "a/model.safetensors", path)

    with pytest.raises(SourceError) as caught:
        merged({"method": "linear"}, base=None, flags={"workers": 2, "progress": Saboteur()})
    assert str(path) in caught.value.where
    assert not (here / "out").exists()


def test_an_error_of_our_own_ends_the_run_too(here):
    write_models(here, names=("a", "b"))

    def on_advance(count):
        if count == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        merged({"method": "linear"}, base=None, flags={"workers": 4, "progress": Watch(on_advance)})
    assert merged({"method": "linear"}, base=None).resumed


# -------------------------------------------------------------------- what is refused before any work


def test_a_disk_that_is_too_small_leaves_nothing_behind(here):
    write_sparse(here / "huge.safetensors", shutil.disk_usage(here).free + 2**30)
    with pytest.raises(OutputError, match="are free on that disk"):
        merged({"method": "linear"}, base=None, models=["huge.safetensors"])
    assert [path.name for path in here.iterdir()] == ["huge.safetensors"]


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta:x", ""])
def test_a_device_that_is_not_there_is_a_plan_error(here, device):
    write_models(here, names=("a", "b"))
    with pytest.raises(PlanError) as caught:
        merged({"method": "linear"}, base=None, flags={"device": device})
    assert caught.value.where == "--device"
    assert caught.value.fix == "use --device cpu"


def test_too_little_memory_is_refused(here):
    write_models(here, names=("a", "b"))
    with pytest.raises(PlanError, match="--memory allows"):
        merged({"method": "linear"}, base=None, flags={"memory": 10_000_000})
    assert not (here / "out.partial").exists()


# -------------------------------------------------------------------- results


def test_a_result_tells_what_was_done(here):
    write_models(here)
    result = merged({"method": "task-arithmetic"})
    plan = json.loads((here / "out/mergetool.json").read_text())
    assert result.num_tensors == 6
    assert result.bytes_read == 3 * 4 * sum(tensor.numel() for tensor in tensors(0).values())
    assert result.bytes_written == (here / "out/model.safetensors").stat().st_size
    assert plan["run"]["bytes_read"] == result.bytes_read
    assert json.loads(json.dumps(result.as_dict()))["path"] == str(here / "out")


def test_empty_tensors_scalars_and_whole_numbers_come_through(here):
    state = {
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.0),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "scale": torch.tensor([120, 127], dtype=torch.uint8).view(torch.float8_e8m0fnu),
    }
    write_model(here / "a", state)
    write_model(here / "b", state | {"scalar": torch.tensor(4.0)})
    merged({"method": "linear"}, base=None)
    found = load_file(here / "out/model.safetensors")
    assert found["scalar"] == 3.0
    for name in ("empty", "ids", "mask"):
        assert torch.equal(found[name], state[name])
    assert found["scale"].view(torch.uint8).tolist() == [120, 127]


SEARCH = {"inner": {"method": "task-arithmetic", "weight": {"search": [0, 1]}}, "tasks": [{"name": "t"}]}


@pytest.mark.parametrize(
    ("method", "parameters", "why"),
    [
        ("merge3", SEARCH, "judges candidates by running them"),
        ("mass", {}, "makes a folder that serves every model's task"),
        ("tsv-compress", {}, "makes a folder that serves every model's task"),
    ],
)
def test_what_cannot_end_in_a_state_dict_is_refused_with_the_reason(method, parameters, why):
    models = {name: {"w": torch.randn(4, 4)} for name in "ab"}
    with pytest.raises(RecipeError, match=why) as caught:
        mergetool.merge_state_dicts(method, models, {"w": torch.zeros(4, 4)}, **parameters)
    assert caught.value.where == "merge_state_dicts"
    assert "mergetool.run({...}, output=FOLDER)" in caught.value.fix


def test_the_ways_out_of_a_bundle_in_memory_lead_somewhere(tmp_path):
    states = {name: {"w": torch.randn(8, 8)} for name in ("base", "a", "b")}
    for name, state in states.items():
        write_model(tmp_path / name, state)
    models = {name: str(tmp_path / name) for name in "ab"}
    recipe = {"base": str(tmp_path / "base"), "models": models, "merge": {"method": "tsv-compress"}}
    assert mergetool.run(recipe, output=tmp_path / "out").path.is_dir()
    base = states.pop("base")
    assert mergetool.merge_state_dicts("tsv-merge", states, base)["w"].shape == (8, 8)

"""Pickles as people have them: old and new, nested, with more than tensors in them. No code of theirs ever runs."""

import argparse
import collections
import subprocess
from pathlib import Path

import pytest
import torch

import mergetool
from mergetool.errors import SourceError
from mergetool.planning.inspect import facts_about
from mergetool.tensors.folder import open_model
from tests.files import tensors, write_recipe
from tests.tensors.test_source import everything, refused, stored

STATE = tensors(0)


def saved(path, loaded, **options):
    path.parent.mkdir(exist_ok=True)
    torch.save(loaded, path, **options)
    return path


@pytest.fixture
def follow(forks, tmp_path):
    """Type the command that a message names: its words are told apart by a shell, its Python starts without imports."""

    def follow(error):
        aside, _, rest = error.fix.partition("run: ")[2].partition(" && python ")
        told = subprocess.run(
            ["bash", "-c", f"{aside} && printf '%s\\0' {rest}"],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
        )
        (done,) = forks.python(*told.stdout.split("\0")[:-1], cwd=tmp_path).wait()
        assert done.code == 0, done.err

    return follow


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["model.pt", "model.pth", "model.ckpt", "model.bin", "pytorch_model.bin"])
def test_a_file_is_read_by_its_path_and_as_the_only_one_of_a_folder(name, legacy, tmp_path):
    path = saved(tmp_path / name, STATE, _use_new_zipfile_serialization=not legacy)
    assert everything(open_model(path)) == stored(STATE)
    assert everything(open_model(tmp_path)) == stored(STATE)


def test_a_large_file_is_mapped_not_read(tmp_path):
    path = saved(tmp_path / "m.pt", {"w": torch.zeros(1 << 18)})
    source = open_model(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    assert source.specs["w"].shape == (1 << 18,)


@pytest.mark.parametrize(
    "nest", ["model", "state_dict", "module", "model_state_dict", "net", "params", "ema", "teacher"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_checkpoint_holds_its_model_under_some_name(nest, legacy, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    more = {"epoch": 3, "optimizer": optimizer, "lr_scheduler": {"last": torch.ones(1)}, "best": torch.tensor(0.5)}
    path = saved(tmp_path / "m.pt", {**more, nest: STATE}, _use_new_zipfile_serialization=not legacy)
    source = open_model(path)
    assert everything(source) == stored(STATE)
    assert source.remarks == (f"m.pt holds more than a model: the weights are those of {nest!r}",)
    assert source.remarks[0] in facts_about(path)["remarks"]


def test_a_model_two_names_deep_is_found(tmp_path):
    source = open_model(saved(tmp_path / "m.pt", {"model": {"state_dict": STATE, "step": 3}, "step": 3}))
    assert everything(source) == stored(STATE)
    assert "'model.state_dict'" in source.remarks[0]


def test_a_checkpoint_as_lightning_writes_it(tmp_path):
    checkpoint = {
        "epoch": 1,
        "global_step": 20,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": collections.OrderedDict(STATE),
        "loops": {"fit_loop": {"state_dict": {}, "batches": {"ready": 3}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
        "hyper_parameters": {"width": 8, "weights": {"a": torch.ones(2)}},
    }
    assert everything(open_model(saved(tmp_path / "last.ckpt", checkpoint))) == stored(STATE)


@pytest.mark.parametrize(
    "both", [("model", "ema"), ("state_dict", "ema_state_dict"), ("params", "params_ema"), ("generator", "critic")]
)
def test_of_two_models_people_choose(both, tmp_path, follow):
    other = tensors(1)
    path = saved(tmp_path / "m y.pt", {both[0]: STATE, both[1]: other, "epoch": 3})
    error = refused(path)
    assert all(repr(name) in error.what for name in both)
    follow(error)
    assert everything(open_model(path)) == stored(STATE)
    assert Path(f"{path}.original").is_file()


@pytest.mark.parametrize("legacy", [False, True])
def test_whatever_a_state_dict_holds_is_read_as_it_is(legacy, tmp_path):
    linear = torch.nn.Linear(3, 4)
    shared = torch.randn(10)
    state = linear.state_dict()  # an OrderedDict with _metadata
    state |= {
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": shared[5:],
        "whole": shared,
        "turned": torch.randn(3, 5).T,
        "strided": torch.arange(12).reshape(3, 4)[:, ::2],
        "empty": torch.zeros(0, 3),
        "number": torch.tensor(2, dtype=torch.int64),
        "spread": torch.ones(1, 3).expand(4, 3),
        "block._extra_state": None,
    }
    path = saved(tmp_path / "m.pt", state, _use_new_zipfile_serialization=not legacy)
    plain = {name: tensor.detach() for name, tensor in state.items() if tensor is not None}
    assert everything(open_model(path)) == stored(plain)


class Canary:
    """Unpickling this writes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return Path.mkdir, (Path(self.path),)


@pytest.mark.parametrize(("name", "legacy"), [("pytorch_model.bin", False), ("last.ckpt", True)])
def test_code_is_refused_and_the_command_that_is_named_converts_the_file(name, legacy, tmp_path, follow):
    canary = tmp_path / "canary"
    loaded = {"model": STATE, "args": argparse.Namespace(lr=0.1), "x": Canary(canary), "optimizer": {"s": [1]}}
    path = saved(tmp_path / "a b" / name, loaded, _use_new_zipfile_serialization=not legacy)
    error = refused(path.parent)
    assert "may hold code" in error.what
    assert "if you trust it" in error.fix
    assert not canary.exists()
    follow(error)
    assert everything(open_model(path)) == everything(open_model(path.parent)) == stored(STATE)


def test_a_whole_module_is_converted_by_the_same_command(tmp_path, follow):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    path = saved(tmp_path / "m.pt", model)
    follow(refused(path))
    assert everything(open_model(path)) == stored(model.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_program_is_called_that_and_its_weights_taken_out(tmp_path, follow):
    model = torch.nn.Linear(2, 3)
    path = tmp_path / "m.pt"
    torch.jit.trace(model, torch.ones(1, 2)).save(path)
    error = refused(path)
    assert "TorchScript" in error.what
    follow(error)
    assert everything(open_model(path)) == stored(model.state_dict())


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ({"model": {"w": torch.ones(2), "n": 3}}, "entry 'n' is not a plain tensor"),
        ({"w": torch.ones(2), "n": 3}, "entry 'n' is not a plain tensor"),
        ({"w": torch.ones(2, device="meta")}, "entry 'w' is not a plain tensor"),
        ({"optimizer": {"state": {0: torch.ones(2)}}}, "entry 'optimizer' is not a plain tensor"),
        (torch.ones(2), "holds a Tensor, not a state dict"),
    ],
)
def test_what_is_no_model_is_refused(loaded, message, tmp_path):
    assert message in refused(saved(tmp_path / "m.pt", loaded)).what


def test_a_result_of_a_bare_pickle_is_a_plain_checkpoint(tmp_path):
    for seed, name in enumerate("ab"):
        saved(tmp_path / f"{name}.ckpt", {"state_dict": tensors(seed), "epoch": 1})
    recipe = write_recipe(tmp_path / "r.yaml", models={"a": "a.ckpt", "b": "b.ckpt"}, merge={"method": "linear"})
    result = mergetool.run(recipe, output=tmp_path / "out")
    assert [warning.partition(" ")[0] for warning in result.warnings] == ["a:", "b:"]
    mean = {name: (tensors(0)[name] + tensors(1)[name]) / 2 for name in STATE}
    assert everything(open_model(tmp_path / "out/model.safetensors")) == stored(mean)


def test_a_bundle_needs_its_base_in_a_file_that_it_can_keep(tmp_path):
    names = {f"layers.{i}.weight": (8, 8) for i in range(2)}
    for seed, name in enumerate(("base", "a")):
        saved(tmp_path / f"{name}.pt", tensors(seed, names))
    recipe = {"base": "base.pt", "models": {"a": "a.pt"}, "merge": {"method": "tsv-compress"}}
    asked = write_recipe(tmp_path / "r.yaml", **recipe)
    out = mergetool.run(asked, output=tmp_path / "out").path
    rebuilt = {"models": {"x": {"source": str(out), "select": "a"}}, "merge": {"method": "passthrough"}}
    mergetool.run(rebuilt, output=tmp_path / "again")


def test_errors_name_the_file(tmp_path):
    path = tmp_path / "m.pt"
    path.write_bytes(b"nonsense")
    assert refused(path).where == str(path)
    with pytest.raises(SourceError):
        facts_about(path)

"""`derive_architecture`, and `architecture: FILE.py:FUNCTION`: networks that nobody has described."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import mergetool
from mergetool.arch.apply import transform
from mergetool.arch.match import resolve
from mergetool.arch.trace import derive
from mergetool.cli.app import app
from mergetool.errors import PlanError, RecipeError
from mergetool.kernels.permute import Element
from tests.arch.networks import MLP, randomised, transformer
from tests.arch.test_trace import MODULES, TRANSFORMERS, normal, places
from tests.files import LONG

PAGE = Path(__file__).parents[2] / "docs" / "architecture-files.md"


def shapes_of(module):
    return {name: tuple(x.shape) for name, x in module.state_dict().items() if x.is_floating_point()}


def assert_the_file_says_the_same(module, spec, path):
    again = resolve(str(path), shapes_of(module))
    assert places(again) == places(spec)
    assert {frozenset(group) for group in again.tied} == {frozenset(group) for group in spec.tied}
    matched = {name for name, tensor in spec.tensors.items() if tensor.matched}
    assert {name for name, tensor in again.tensors.items() if tensor.matched and tensor.shape} == matched


@pytest.mark.parametrize("case", MODULES)
def test_a_saved_file_says_what_was_derived(case, tmp_path):
    make, _, inputs, _ = MODULES[case]
    module = randomised(make())
    found = mergetool.derive_architecture(module, inputs)
    assert_the_file_says_the_same(module, found.spec, found.save(tmp_path / "net.yaml"))


@pytest.mark.parametrize("case", TRANSFORMERS if LONG else ["bert-masked", "llama-no-groups", "qwen2-tied"])
def test_a_saved_file_of_a_transformer_says_what_was_derived(case, tmp_path):
    name, attention, changes = TRANSFORMERS[case]
    model, batch = transformer(name, **changes)
    model.config._attn_implementation = attention
    if "ViT" not in name and "Bert" not in name:
        batch["use_cache"] = False
    found = mergetool.derive_architecture(model, **batch)
    assert_the_file_says_the_same(model, found.spec, found.save(tmp_path / "net.yml"))


def test_a_module_is_left_as_it_was():
    module = MLP(norm=True).train()
    module[0].eval() if isinstance(module, nn.Sequential) else next(module.children()).eval()
    before = [part.training for part in module.modules()]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    mergetool.derive_architecture(module, normal(3, 6))
    assert [part.training for part in module.modules()] == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(
    ("call", "what", "fix"),
    [
        (lambda: mergetool.derive_architecture(MLP()), "no inputs", "derive_architecture(module, inputs)"),
        (lambda: mergetool.derive_architecture(MLP, normal(3, 6)), "found a type", "derive_architecture(module"),
        (
            lambda: mergetool.derive_architecture(MLP(), normal(3, 6)).save("net.txt"),
            "ends in .yaml",
            "save it as net.yaml",
        ),
    ],
)
def test_what_cannot_be_derived_or_saved_says_what_to_type(call, what, fix):
    with pytest.raises(PlanError, match=re.escape(what)) as caught:
        call()
    assert fix in str(caught.value)


def blocks():
    """The code of the page by the name in its first line."""
    found = re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return dict(found)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """The page's files, and two permuted copies of one network."""
    for name, text in blocks().items():
        (tmp_path / name).write_text(text)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    from nets import build

    net = randomised(build()[0]).eval()
    spec = derive(net, build()[1])
    for seed in (0, 1):
        element = Element.random(spec.spaces, torch.Generator().manual_seed(seed))
        moved = transform(net.state_dict(), spec, element)
        save_file({name: x.contiguous() for name, x in moved.items()}, f"runs/seed{seed}.safetensors")
    yield net
    sys.modules.pop("nets", None)


def assert_is_that_network(net, path):
    """The merged weights compute what the network computes."""
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = net(images)
        net.load_state_dict(load_file(path), strict=False)
        torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["c2m3", "git-rebasin", "merge-many"] if LONG else ["git-rebasin"])
def test_permuted_copies_of_a_network_of_ones_own_give_it_back(project, method):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {"merge": {"method": method}}
    plain = mergetool.merge_state_dicts("linear", [load_file(f"runs/seed{k}.safetensors") for k in (0, 1)])
    result = mergetool.run(recipe, trust_code=True)
    assert_is_that_network(project, result.path / "model.safetensors")
    lock = (result.path / "mergetool.json").read_text()
    assert '"architecture": [' in lock
    save_file(plain, "plain.safetensors")
    with pytest.raises(AssertionError):
        assert_is_that_network(project, "plain.safetensors")


def test_the_page_does_what_it_says(project, capsys):
    """Its recipe and command, its script, and the file that it shows."""
    command = re.search(r"```bash\nmergetool (.*)\n```", PAGE.read_text())[1]
    assert CliRunner().invoke(app, command.split()).exit_code == 0
    assert_is_that_network(project, "out/merged/model.safetensors")
    shown = yaml.safe_load(blocks()["net.yaml"])
    Path("net.yaml").unlink()
    runpy.run_path("derive.py")
    assert yaml.safe_load(Path("net.yaml").read_text()) == shown == yaml.safe_load(capsys.readouterr().out)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {"architecture": "net.yaml"}
    assert_is_that_network(project, mergetool.run(recipe, output="second").path / "model.safetensors")
    states = [load_file(f"runs/seed{k}.safetensors") for k in (0, 1)]
    save_file(mergetool.merge_state_dicts("c2m3", states, architecture="net.yaml"), "third.safetensors")
    assert_is_that_network(project, "third.safetensors")


def test_code_is_not_run_without_the_users_word(project):
    Path("nets.py").write_text("from pathlib import Path\nPath('ran').touch()\n" + Path("nets.py").read_text())
    with pytest.raises(RecipeError, match=r"would execute Python code .*'nets\.py:build'") as caught:
        mergetool.run("recipe.yaml")
    mergetool.plan("recipe.yaml")
    assert not Path("ran").exists()
    assert "architecture" in caught.value.where
    assert "add --trust-code" in caught.value.fix
    assert CliRunner().invoke(app, ["run", "recipe.yaml", "--trust-code"]).exit_code == 0
    assert Path("ran").exists()
    states = [load_file(f"runs/seed{k}.safetensors") for k in (0, 1)]
    with pytest.raises(RecipeError, match="would execute Python code"):
        mergetool.merge_state_dicts("c2m3", states, architecture="nets.py:build")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("def build(): return 1", "returned int"),
        ("def build(): return Net()", "returned Net"),
        ("def build(): return Net(), 3", "inputs of type int"),
        ("def build(): raise ValueError('no data')", "failed: ValueError: no data"),
        ("def make(): return 1", "failed: AttributeError"),
        ("class Other(Net):\n def __init__(self):\n  super().__init__()\n  self.new = nn.Linear(2, 2)\n"
         "def build(): return Other(), torch.randn(2, 3, 4, 4)", "the models have no tensor 'new.weight'"),
        ("def build(): return nn.Linear(3, 3), torch.randn(2, 3)", "the module has no tensor 'head.bias'"),
    ],
)  # fmt: skip
def test_what_a_function_may_not_return_is_told(project, code, what):
    text = Path("nets.py").read_text()
    Path("nets.py").write_text(text[: text.index("def build")] + code)
    with pytest.raises(PlanError, match=what):
        mergetool.run("recipe.yaml", trust_code=True)


def test_a_file_that_is_not_there_is_told_while_planning(project):
    Path("nets.py").unlink()
    with pytest.raises(mergetool.SourceError, match=r"nets\.py"):
        mergetool.plan("recipe.yaml")


def test_a_checkpoint_that_names_no_network_is_told_of_both_ways(project):
    recipe = yaml.safe_load(Path("recipe.yaml").read_text()) | {"architecture": "auto"}
    with pytest.raises(PlanError, match=r"no config\.json") as caught:
        mergetool.run(recipe)
    assert "architecture: nets.py:build".replace("nets.py:build", "FILE.py:FUNCTION") in caught.value.fix
    assert "mergetool.derive_architecture" in caught.value.fix


def test_one_function_serves_repair_too(project):
    save_file({"images": torch.randn(16, 3, 4, 4)}, "data.safetensors")
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    repair = {"mode": "bn-stats", "data": "data.safetensors", "network": "nets.py:build"}
    recipe["merge"] = {"method": "c2m3", "repair": repair}
    assert mergetool.run(recipe, trust_code=True).path.is_dir()

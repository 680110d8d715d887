"""Of several sets of weights in one folder, the one that transformers itself opens is read; people are told."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import _get_resolved_checkpoint_files

import mergetool
from mergetool.errors import SourceError
from mergetool.planning.inspect import facts_about
from mergetool.tensors.folder import open_model
from mergetool.tensors.sets import chosen_set, weight_sets
from tests.files import tensors, write_model, write_recipe
from tests.tensors.test_source import everything, stored

SETS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def write_set(folder, file, value):
    """A set whose only tensor holds `value`."""
    folder.mkdir(exist_ok=True)
    state = {"w": torch.full((2,), float(value))}
    weights = file
    if file.endswith(".json"):
        weights = "part-1." + ("safetensors" if "safetensors" in file else "bin")
        (folder / file).write_text(json.dumps({"metadata": {}, "weight_map": {"w": weights}}))
    save_file(state, folder / weights) if weights.endswith("safetensors") else torch.save(state, folder / weights)


def value_of(path):
    return torch.frombuffer(bytearray(everything(open_model(path))["w"]), dtype=torch.float32)[0].item()


def transformers_opens(folder, variant=None):
    files, _ = _get_resolved_checkpoint_files(
        str(folder), variant, None, use_safetensors=None, user_agent=None, is_remote_code=False
    )
    return files[0]


@pytest.mark.parametrize("files", [c for n in (1, 2, 3, 4) for c in itertools.combinations(SETS, n)])
def test_what_transformers_opens_is_read(files, tmp_path):
    for value, file in enumerate(files):
        write_set(tmp_path, file, value)
    source = open_model(tmp_path)
    assert str(source.files[0].path) == transformers_opens(tmp_path)
    assert bool(source.remarks) == (len(files) > 1)
    for value, file in enumerate(files):
        assert len(files) == 1 or file in source.remarks[0]
        assert value_of(tmp_path / file) == value  # what the remark advises


@pytest.mark.parametrize("file", SETS)
def test_the_only_variant_is_read_and_told(file, tmp_path):
    name, _, ending = file.partition(".")
    ways = {f"{name}.fp16.{ending}", file.replace(".json", ".fp16.json") if "json" in file else f"{name}.fp16.{ending}"}
    for place, way in enumerate(ways):
        write_set(tmp_path / str(place), way, 3)
        assert value_of(tmp_path / str(place)) == 3
        assert "fp16" in open_model(tmp_path / str(place)).remarks[0]
    write_set(tmp_path / "0", "model.safetensors", 4)
    assert value_of(tmp_path / "0") == 4


def test_of_several_variants_people_choose(tmp_path):
    for value, variant in enumerate(("bf16", "fp16")):
        write_set(tmp_path, f"model.{variant}.safetensors", value)
    with pytest.raises(SourceError, match="2 variants") as caught:
        open_model(tmp_path)
    assert value_of(Path(caught.value.fix.partition(": ")[2])) == 0


def test_real_variants_and_shards_of_transformers_give_its_tensors(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32, tie_word_embeddings=False))
    state = stored(model.state_dict())
    for options in ({"variant": "fp16"}, {"max_shard_size": "5KB"}, {"variant": "fp16", "max_shard_size": "5KB"}):
        folder = tmp_path / "-".join(options)
        model.save_pretrained(folder, **options)
        source = open_model(folder)
        assert str(source.files[0].path) == transformers_opens(folder, options.get("variant")) or len(source.files) > 1
        assert everything(source) == state
    recipe = {"models": {"a": str(tmp_path / "variant-max_shard_size")}, "merge": {"method": "passthrough"}}
    found = LlamaForCausalLM.from_pretrained(mergetool.run(recipe, output=tmp_path / "out").path)
    assert stored(found.state_dict()) == state


def test_a_file_that_the_config_names_is_the_only_one(tmp_path):
    write_set(tmp_path, "model.safetensors", 1)
    write_set(tmp_path, "other.safetensors", 2)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "transformers_weights": "other.safetensors"})
    )
    assert AutoConfig.from_pretrained(tmp_path).transformers_weights == "other.safetensors"
    assert value_of(tmp_path) == 2
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "../other.safetensors"}))
    with pytest.raises(SourceError, match="not a file of this folder"):
        open_model(tmp_path)


def test_a_plan_and_inspect_tell_of_two_sets(tmp_path):
    for value, file in enumerate(SETS[:2]):
        write_set(tmp_path / "a", file, value)
    warnings = mergetool.plan({"models": {"a": str(tmp_path / "a")}, "merge": {"method": "passthrough"}}).warnings
    assert [warning.startswith("a: model.safetensors is read") for warning in warnings] == [True]
    assert any("model.safetensors is read" in remark for remark in facts_about(tmp_path / "a")["remarks"])


# -------------------------------------------------------------------- names of other libraries


@pytest.mark.parametrize(
    ("files", "chosen", "stem"),
    [
        (["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"], 0, "diffusion_pytorch_model"),
        (["diffusion_pytorch_model.fp16.safetensors"], 0, "diffusion_pytorch_model"),
        (["diffusion_pytorch_model.safetensors.index.fp16.json"], 0, "diffusion_pytorch_model"),
        (["diffusion_pytorch_model.bin"], 0, "diffusion_pytorch_model"),
        (["open_clip_pytorch_model.bin", "open_clip_model.safetensors"], 1, "open_clip_model"),
        (["open_clip_pytorch_model.bin"], 0, "open_clip_model"),
        (["open_clip_model.safetensors", "model.safetensors"], 1, "model"),
        (["consolidated.safetensors", "params.json"], 0, "consolidated"),
        (["consolidated.00.pth", "params.json"], 0, "consolidated"),
        (["consolidated.safetensors.index.json"], 0, "consolidated"),
        (["model.safetensors", "consolidated.00.pth"], 0, "model"),
        (["pytorch_model.non_ema.bin", "pytorch_model.bin"], 1, "model"),
        (["weights.safetensors", "optimizer.pt"], 0, "model"),
        (["best.ckpt", "rng_state.pth", "training_args.bin", "adapter_model.bin"], 0, "model"),
    ],
)
def test_every_library_calls_its_files_its_own_way(files, chosen, stem):
    found, _ = chosen_set(files, "folder")
    assert (found.file, found.stem) == (files[chosen], stem)


@pytest.mark.parametrize(
    "name",
    ["model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors", "model.safetensors.bak", "x.bin"],
)
def test_parts_and_copies_are_no_sets(name):
    assert weight_sets([name]) == []


LAYOUTS = {
    "diffusion_pytorch_model": ("diffusion_pytorch_model.bin", "config.json", {"_class_name": "UNet2DModel"}),
    "open_clip_model": ("open_clip_pytorch_model.bin", "open_clip_config.json", {"model_cfg": {}}),
    "consolidated": ("consolidated.00.pth", "params.json", {"dim": 8}),
}


@pytest.mark.parametrize("stem", LAYOUTS)
@pytest.mark.parametrize("shard_size", ["5GB", "1KB"])
def test_a_result_has_the_files_and_the_config_that_its_library_opens(stem, shard_size, tmp_path):
    file, config, content = LAYOUTS[stem]
    for seed, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        torch.save(tensors(seed), tmp_path / name / file)
        (tmp_path / name / config).write_text(json.dumps(content))
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={"a": "a", "b": "b"},
        merge={"method": "linear"},
        output={"path": "out", "shard_size": shard_size},
    )
    result = mergetool.run(recipe)
    out = result.path
    names = {path.name for path in out.iterdir()} - {"README.md", "mergetool.json"}
    split = shard_size == "1KB" and stem != "open_clip_model"
    unsplit = shard_size == "1KB" and not split
    assert any("output.shard_size" in warning for warning in result.warnings) == unsplit
    assert config in names
    assert json.loads((out / config).read_text()) == content
    assert all(name.startswith(stem) for name in names - {config})
    assert (f"{stem}.safetensors.index.json" in names) == split != (f"{stem}.safetensors" in names)
    merged = {key: value for path in out.glob("*.safetensors") for key, value in load_file(path).items()}
    mean = {name: (tensors(0)[name] + tensors(1)[name]) / 2 for name in tensors(0)}
    torch.testing.assert_close(merged, mean, rtol=0, atol=1e-6)
    assert everything(open_model(out)) == stored(merged)
    assert open_model(out).stem == stem


def test_a_file_of_another_name_is_read_where_it_is_the_only_one(tmp_path):
    state = tensors(0)
    write_model(tmp_path, state, {"architecture": "resnet18"}, file="best.safetensors")
    source = open_model(tmp_path)
    assert everything(source) == stored(state)
    assert "best.safetensors" in source.remarks[0]
    write_model(tmp_path, tensors(1), file="last.safetensors")
    with pytest.raises(SourceError, match=r"best\.safetensors, last\.safetensors") as caught:
        open_model(tmp_path)
    assert everything(open_model(Path(caught.value.fix.partition(": ")[2]))) == stored(state)


def test_parts_without_their_index_are_called_that(tmp_path):
    write_model(tmp_path, tensors(0), file="model-00001-of-00002.safetensors")
    with pytest.raises(SourceError, match="not the index"):
        open_model(tmp_path)
    (tmp_path / "model-00001-of-00002.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert everything(open_model(tmp_path)) == stored(tensors(0))


def test_model_parallel_parts_are_refused_by_name(tmp_path):
    for part in range(2):
        torch.save(tensors(part), tmp_path / f"consolidated.0{part}.pth")
    with pytest.raises(SourceError, match="model parallel"):
        open_model(tmp_path)

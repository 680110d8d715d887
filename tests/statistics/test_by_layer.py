"""What is measured layer by layer, of a network that does not fit in memory, is what is measured of the whole one."""

import os
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergetool
from mergetool import MergeError, OutputError, PlanError
from mergetool.planning.cost import estimate, room_to_measure
from mergetool.planning.measures import to_measure
from mergetool.planning.report import describe
from mergetool.tensors.dtypes import of_torch
from mergetool.tensors.header import TensorSpec, lay_out
from tests.files import content
from tests.statistics.networks import SIZES, write_classifier, write_dense, write_rows
from tests.turns import some
from tests.zoo.text import save_tokenizer

LITTLE = 1
"""Bytes of memory in which nothing fits whole."""


def write(folder, kind):
    if kind == "bert":
        return write_classifier(folder)
    if kind in ("llama", "mistral"):
        return write_dense(folder, kind)
    if kind == "tied":
        return write_dense(folder, tie_word_embeddings=True)
    if kind == "bfloat16":
        return write_dense(folder, dtype=torch.bfloat16)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=32, n_inner=24)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    elif kind == "mpnet":  # one table of relative positions for all blocks
        transformers.MPNetForSequenceClassification(transformers.MPNetConfig(**SIZES, num_labels=3)).save_pretrained(
            folder
        )
    else:  # windows in every second block, and embeddings that are scaled
        config = transformers.Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=1, sliding_window=4)
        transformers.Gemma2ForCausalLM(config).save_pretrained(folder)
    return save_tokenizer(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_layer")
    write_rows(folder / "rows.jsonl")
    return folder


def assert_close(found, expected):
    """The same but for last bits: files give weights at other addresses, and products add up in another order."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-5, atol=1e-5), name


KINDS = ("bert", "llama", "mistral", "tied", "bfloat16", "gpt2", "mpnet", "gemma2")
OTHERS = [(kind, statistic) for kind in ("bert", "tied") for statistic in ("activation", "loss", "fisher")]
OTHERS += [("gpt2", "fisher"), ("mistral", "gradient"), ("gemma2", "gradient")]


@pytest.mark.parametrize(("kind", "statistic"), [*((kind, "gram") for kind in KINDS), *some(OTHERS)])
def test_it_is_the_same_to_the_last_bit(place, kind, statistic, tmp_path, monkeypatch):
    folder = place / kind if (place / kind).exists() else write(place / kind, kind)
    whole = mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "whole")
    monkeypatch.setattr("mergetool.networks.running.load_network", None)
    mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "parts", memory=LITTLE)
    assert whole
    assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_run_takes_a_model_layer_by_layer_where_memory_is_short(place, tmp_path):
    """The plan says so, and the bytes are those of a run with more."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "initializer_range": 0.02}
    for seed, name in enumerate("ab"):
        write_dense(tmp_path / name, seed=seed, **sizes)
    recipe = {
        "models": {name: str(tmp_path / name) for name in "ab"},
        "calibration": {"data": str(place / "rows.jsonl")},
        "merge": {"method": "regmean"},
    }
    plan = mergetool.plan(recipe)
    asked = to_measure(plan.sources)[0]
    memory = (asked.memory + asked.memory_by_layer()) // 2 - room_to_measure(0)
    assert describe(plan, estimate(plan, workers=1, memory=memory))["statistics"]["model 'a'"]["by_layer"]
    assert not describe(plan, estimate(plan, workers=1, memory=2 * memory))["statistics"]["model 'a'"]["by_layer"]
    whole = mergetool.run(recipe, output=tmp_path / "whole", cache=tmp_path / "one")
    parts = mergetool.run(recipe, output=tmp_path / "parts", cache=tmp_path / "two", memory=memory)
    assert content(parts.path) == content(whole.path)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    with pytest.raises(PlanError, match="to measure its gram"):
        mergetool.run(recipe, output=tmp_path / "no", memory=asked.memory_by_layer() - room_to_measure(0) - 1)


def test_a_network_of_another_order_is_told_and_can_be_dealt_out(place, tmp_path):
    config = transformers.AlbertConfig(**SIZES, embedding_size=16)  # one block, which runs again and again
    transformers.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "albert")
    save_tokenizer(tmp_path / "albert")
    with pytest.raises(PlanError, match="in another order") as error:
        mergetool.measure(tmp_path / "albert", "gram", place / "rows.jsonl", cache=tmp_path / "a", memory=LITTLE)
    assert error.value.fix.endswith("--device-map auto")
    dealt = {"device_map": {"albert": "disk", "classifier": "cpu"}}
    there = mergetool.measure(tmp_path / "albert", "gram", place / "rows.jsonl", cache=tmp_path / "b", **dealt)
    assert_close(there, mergetool.measure(tmp_path / "albert", "gram", place / "rows.jsonl", cache=tmp_path / "c"))


def test_inputs_that_are_not_finite_stop_at_the_row(place, tmp_path):
    folder = write_classifier(tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    state["bert.embeddings.word_embeddings.weight"][4 + 13] = float("nan")  # w13, in the fifth row
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError, match=r"query.weight is not finite at .*rows\.jsonl:5"):
        mergetool.measure(folder, "gram", place / "rows.jsonl", cache=tmp_path, memory=LITTLE)
    assert not any((tmp_path / "statistics").iterdir())


def test_a_tensor_that_is_missing_is_told(place, tmp_path):
    folder = write_classifier(tmp_path / "bert")
    state = load_file(folder / "model.safetensors")
    del state["classifier.bias"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(PlanError, match=r"classifier.bias of BertForSequenceClassification is no tensor"):
        mergetool.measure(folder, "gram", place / "rows.jsonl", cache=tmp_path, memory=LITTLE)


@pytest.mark.parametrize(("statistic", "more"), [("fisher", {"labels": "exact"}), ("gradient", {})])
def test_gradients_come_back_through_what_all_blocks_share(place, statistic, more, tmp_path):
    """A table of relative positions, whose gradient is a sum over blocks; several parts of each row."""
    folder = place / "mpnet" if (place / "mpnet").exists() else write(place / "mpnet", "mpnet")
    whole = mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "a", **more)
    parts = mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "b", memory=LITTLE, **more)
    assert whole["mpnet.encoder.relative_attention_bias.weight"].abs().max() > 1e-4
    assert_close(parts, whole)


@pytest.mark.parametrize("statistic", ["gram", "loss"])
def test_a_model_that_is_dealt_over_memory_and_the_disk_is_measured_as_a_whole_one(place, statistic, tmp_path):
    folder = place / "llama" if (place / "llama").exists() else write(place / "llama", "llama")
    dealt = {"device_map": {"model": "disk", "lm_head": "cpu"}}
    there = mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "there", **dealt)
    assert_close(there, mergetool.measure(folder, statistic, place / "rows.jsonl", cache=tmp_path / "here"))


def test_gradients_want_all_of_a_model(place, tmp_path):
    folder = place / "llama" if (place / "llama").exists() else write(place / "llama", "llama")
    with pytest.raises(PlanError, match="gradients need all of it") as error:
        mergetool.measure(folder, "fisher", place / "rows.jsonl", cache=tmp_path, device_map={"": "disk"})
    assert "regmean" in error.value.fix


def test_a_run_deals_out_what_it_measures(place, tmp_path):
    for seed, name in enumerate("ab"):
        write_classifier(tmp_path / name, seed)
    recipe = {
        "models": {name: str(tmp_path / name) for name in "ab"},
        "calibration": {"data": str(place / "rows.jsonl")},
        "merge": {"method": "regmean"},
    }
    dealt = {"bert": "disk", "classifier": "cpu"}
    there = mergetool.run(recipe, output=tmp_path / "there", cache=tmp_path / "one", device_map=dealt)
    here = mergetool.run(recipe, output=tmp_path / "here", cache=tmp_path / "two")
    assert_close(*(load_file(each.path / "model.safetensors") for each in (there, here)))
    recipe["merge"] = {"method": "regmean-plus"}
    with pytest.raises(PlanError, match="networks that change meanwhile") as error:
        mergetool.run(recipe, output=tmp_path / "plus", cache=tmp_path / "one", device_map=dealt)
    assert error.value.fix == "leave it out"


def test_a_place_that_cannot_be_written_is_told_with_a_fix(place, tmp_path):
    folder = place / "bert" if (place / "bert").exists() else write(place / "bert", "bert")
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(OutputError, match="cannot be written") as error:
        mergetool.measure(folder, "gram", place / "rows.jsonl", cache=tmp_path / "cache", memory=LITTLE)
    assert error.value.fix.endswith("--cache DIR")


GROWN = """
import sys
from pathlib import Path
import mergetool, torch, transformers, accelerate
from transformers import LlamaForCausalLM

def peak():  # of this program alone; what `resource` tells may be that of the one which started it
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))

before = peak()
mergetool.measure(sys.argv[1], "activation", sys.argv[2], cache=sys.argv[3], memory=1)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are told by /proc")
def test_no_more_than_two_layers_are_ever_in_memory(network_forks, tmp_path):
    """Of four: weights of zeros, which the file does not hold."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 64}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=8, architectures=["LlamaForCausalLM"])
    config.save_pretrained(tmp_path / "llama")
    with torch.device("meta"):
        state = transformers.LlamaForCausalLM(config).state_dict()
    prefix, header = lay_out([TensorSpec(name, of_torch(v.dtype), tuple(v.shape)) for name, v in state.items()], {})
    (tmp_path / "llama" / "model.safetensors").write_bytes(prefix)
    os.truncate(tmp_path / "llama" / "model.safetensors", header.file_size)
    (tmp_path / "rows.jsonl").write_text('{"text": [1, 2, 3, 4]}')
    arguments = [str(tmp_path / name) for name in ("llama", "rows.jsonl", "cache")]
    (told,) = network_forks.python("-c", GROWN, *arguments).wait()
    layer = 4 * sum(value.numel() for name, value in state.items() if ".layers.0." in name)
    assert layer < 1024 * int(told.out) < 2 * layer, told.err

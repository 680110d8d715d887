"""Is a checkpoint what a recipe says: yes, no, or a reason why nobody can tell."""

import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.engine.against import verify_against
from mergetool.engine.run import Flags
from mergetool.errors import RecipeError, SourceError
from mergetool.recipe import load_recipe
from tests.alignment import nets
from tests.dense import write_dense
from tests.files import Watch, tensors, write_model, write_models
from tests.peers.checkpoints import write_families
from tests.words.models import build

PEERS = Path(__file__).parents[1] / "peers" / "mergekit"

TINY = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def llama(seed, scale=0.0, **changes):
    """A network whose weights are those of all others, and a little more that is its own."""
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**(TINY | changes)))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base, two fine-tunes, and an adapter, in float32 and bfloat16; and what PEFT merges."""
    folder = tmp_path_factory.mktemp("home")
    for seed, name in enumerate(("base", "a", "b")):
        llama(seed, 0.01 * (seed > 0)).save_pretrained(folder / name)
        llama(seed, 0.01 * (seed > 0)).bfloat16().save_pretrained(folder / f"{name}16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(llama(0), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.05)
        adapted.save_pretrained(folder / "lora")
        for kind in ("", "16"):
            model = hf.LlamaForCausalLM.from_pretrained(folder / f"base{kind}")
            merged = PeftModel.from_pretrained(model, folder / "lora").merge_and_unload()
            merged.save_pretrained(folder / f"peft{kind}")
    return folder


def ask(home, path, seed=0, flags=None, progress=None, **sections):
    recipe = load_recipe({**sections, "compute": {"seed": seed}}, folder=home)
    return verify_against(path, recipe, flags, progress)


def adapted(kind=""):
    return {
        "models": {"m": {"source": f"./base{kind}", "adapters": ["./lora"]}},
        "merge": {"method": "passthrough"},
    }


def linear(kind="", **output):
    models = {name: f"./{name}{kind}" for name in "ab"}
    merge = {"method": "linear", "weight": {"a": 0.3, "b": 0.7}}
    return {"models": models, "merge": merge, **({"output": output} if output else {})}


def ties(kind=""):
    return {"base": f"./base{kind}", "models": linear(kind)["models"], "merge": {"method": "ties", "density": 0.5}}


def made(home, tmp_path, sections, **changes):
    """What a run makes of it, in a place of its own."""
    data = {**sections, "models": {name: str(home / path) for name, path in sections["models"].items()}}
    if "base" in sections:
        data["base"] = str(home / sections["base"])
    return mergetool.run(data | changes, output=tmp_path / "made").path


def change(path, name, edit):
    """The same checkpoint with one tensor edited; None leaves it out."""
    file = path / "model.safetensors"
    state = load_file(file)
    edited = edit(state[name].clone() if name in state else None)
    state = {**state, name: edited} if edited is not None else {k: v for k, v in state.items() if k != name}
    save_file(state, file, metadata={"format": "pt"})
    return path


# ---------------------------------------------------------------- yes


@pytest.mark.parametrize("kind", ["", "16"])
def test_what_peft_merged_is_base_and_adapter(home, kind):
    found = ask(home, home / f"peft{kind}", **adapted(kind))
    assert (found.answer, found.error) == ("yes", None)
    assert found.tensors == {"same": 21}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("sections", [linear(), ties("16"), linear(dtype="bfloat16")], ids=["linear", "ties", "narrow"])
def test_what_a_run_has_made_is_what_its_recipe_says(home, tmp_path, sections, workers):
    found = ask(home, made(home, tmp_path, sections), flags=Flags(workers=workers), **sections)
    assert (found.answer, found.tensors) == ("yes", {"same": 21})


def test_a_merge_by_hand_is_the_recipe_to_one_rounding(home, tmp_path):
    a, b = (load_file(home / name / "model.safetensors") for name in "ab")
    write_model(tmp_path / "hand", {name: (0.3 * a[name].double() + 0.7 * b[name].double()).float() for name in a})
    found = ask(home, tmp_path / "hand", **linear())
    assert (found.answer, sum(found.tensors.values())) == ("yes", 21)
    assert "rounding of their dtype" in found.reason


@pytest.mark.parametrize(("stored", "asked"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "source")])
def test_another_dtype_is_the_same_numbers_rounded(home, tmp_path, stored, asked):
    path = made(home, tmp_path, linear(), output={"dtype": stored})
    if asked == "bfloat16":  # narrow numbers in a wide file
        state = load_file(path / "model.safetensors")
        save_file({name: value.bfloat16().float() for name, value in state.items()}, path / "model.safetensors")
    assert ask(home, path, **linear(dtype=asked)).answer == "yes"


def test_other_names_files_and_heads_are_the_same_checkpoint(home, tmp_path):
    path = made(home, tmp_path, linear())
    state = load_file(path / "model.safetensors")
    first, last = (dict(list(state.items())[part]) for part in (slice(0, 10), slice(10, None)))
    for number, part in enumerate((first, last)):
        save_file({f"base_model.{name}": value for name, value in part.items()}, path / f"model-{number}.safetensors")
    (path / "model.safetensors").unlink()
    files = {f"base_model.{name}": f"model-{int(name in last)}.safetensors" for name in state}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert ask(home, path, **linear()).answer == "yes"


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "left out"])
def test_a_tied_head_may_be_stored_or_not(tmp_path, stored):
    for seed, name in enumerate("ab"):
        llama(seed, 0.01, tie_word_embeddings=True).save_pretrained(tmp_path / name)
    path = made(tmp_path, tmp_path, linear())
    if stored:
        state = load_file(path / "model.safetensors")
        change(path, "lm_head.weight", lambda _: state["model.embed_tokens.weight"].clone())
    assert ask(tmp_path, path, **linear()).answer == "yes"
    if stored:
        change(path, "lm_head.weight", lambda head: head + 1)
        assert ask(tmp_path, path, **linear()).answer == "no"


def test_buffers_that_libraries_make_anew_are_only_told(home, tmp_path):
    path = made(home, tmp_path, linear())
    change(path, "model.layers.0.self_attn.rotary_emb.inv_freq", lambda _: torch.ones(4))
    found = ask(home, path, **linear())
    assert (found.answer, "rotary_emb" in found.remarks[0]) == ("yes", True)


def test_config_and_template_that_differ_are_remarks(home, tmp_path):
    path = made(home, tmp_path, linear())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found = ask(home, path, **linear())
    assert (found.answer, "rms_norm_eps is 0.5, not 1e-06" in found.remarks[0]) == ("yes", True)


def test_a_recipe_inside_a_recipe_is_made_and_leaves_nothing(home, tmp_path):
    inner = {"recipe": {**ties(), "base": str(home / "base"), "models": {n: str(home / n) for n in "ab"}}}
    sections = {"models": {"mix": inner, "a": str(home / "a")}, "merge": {"method": "linear"}}
    path = mergetool.run(sections, output=tmp_path / "out").path
    before = sorted(tmp_path.iterdir())
    assert ask(home, path, **sections).answer == "yes"
    assert sorted(tmp_path.iterdir()) == before


# ---------------------------------------------------------------- no


def test_one_changed_value_is_found_with_its_place(home, tmp_path):
    path = made(home, tmp_path, linear("16"))

    def edit(value):
        value[3, 5] += 0.5
        return value

    found = ask(home, change(path, Q_PROJ, edit), **linear("16"))
    assert (found.answer, found.tensors) == ("no", {"same": 20, "different": 1})
    (worst,) = found.worst
    assert (worst.name, worst.beyond, worst.place) == (Q_PROJ, 1, 3 * 32 + 5)
    assert worst.found - worst.expected == pytest.approx(0.5, abs=0.01)
    assert f"1 of 21 tensors differ, most of all {Q_PROJ}: 1 of 1024 entries" in found.reason
    assert isinstance(found.error, SourceError)


def test_the_smallest_change_that_rounding_does_not_explain_is_found(home, tmp_path):
    path = made(home, tmp_path, linear())

    def edit(value):
        value[0, 0] *= 1 + 1e-4
        return value

    assert ask(home, change(path, Q_PROJ, edit), **linear()).answer == "no"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda _: None, f"it lacks 1 tensors: {Q_PROJ}"),
        (lambda value: value[:4], f"{Q_PROJ} is [4, 32] here, [32, 32] by the recipe"),
        (lambda value: value.to(torch.int32), f"{Q_PROJ} is I32 here, F32 by the recipe"),
        (lambda value: value * torch.nan, "1024 of 1024 entries"),
    ],
    ids=["missing", "shape", "integers", "nan"],
)
def test_a_tensor_that_is_missing_or_unlike_is_a_no(home, tmp_path, edit, words):
    found = ask(home, change(made(home, tmp_path, linear()), Q_PROJ, edit), **linear())
    assert found.answer == "no"
    assert words in found.reason


def test_a_tensor_more_is_a_no(home, tmp_path):
    path = change(made(home, tmp_path, linear()), "model.extra.weight", lambda _: torch.ones(3))
    found = ask(home, path, **linear())
    assert (found.answer, "does not make, 1 tensors: model.extra.weight" in found.reason) == ("no", True)


def test_another_recipe_and_one_of_the_inputs_are_a_no(home, tmp_path):
    assert ask(home, made(home, tmp_path, linear()), **ties()).answer == "no"
    found = ask(home, home / "a", **linear())
    assert (found.answer, found.remarks) == ("no", ("it is 'a' of the recipe itself",))
    assert ask(home, home / "base", **adapted()).answer == "no"
    rounded = {"models": {"a": "./base16"}, "merge": {"method": "passthrough"}}
    assert ask(home, home / "a16", **rounded).answer == "no"


def test_whole_numbers_are_compared_bit_by_bit(tmp_path):
    write_models(tmp_path, names=("a", "b"))
    for name in "ab":
        write_model(tmp_path / name, tensors(ord(name)) | {"ids": torch.tensor([1, 2**60, 7]), "on": torch.ones(3) > 0})
    path = made(tmp_path, tmp_path, linear())
    assert ask(tmp_path, path, **linear()).answer == "yes"
    found = ask(tmp_path, change(path, "ids", lambda ids: ids + torch.tensor([0, 1, 0])), **linear())
    assert (found.answer, found.worst[0].name, found.worst[0].place) == ("no", "ids", 1)


def test_a_file_cut_off_is_an_error_of_the_checkpoint(home, tmp_path):
    path = made(home, tmp_path, linear())
    os.truncate(path / "model.safetensors", 40_000)
    with pytest.raises(SourceError) as caught:
        ask(home, path, **linear())
    assert str(path) in caught.value.where


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_tensors_are_compared_to_their_last_entry(tmp_path, dtype):
    write_models(tmp_path, names=("a", "b"), shapes={"model.layers.0.up.weight": (701, 1001)}, dtype=dtype)
    path = made(tmp_path, tmp_path, linear())
    assert ask(tmp_path, path, flags=Flags(workers=2), **linear()).tensors == {"same": 1}

    def edit(value):
        value[700, 1000] += 1
        return value

    found = ask(tmp_path, change(path, "model.layers.0.up.weight", edit), **linear())
    assert (found.answer, found.worst[0].beyond, found.worst[0].place) == ("no", 1, 701 * 1001 - 1)


def test_a_little_training_is_not_taken_for_roundings(tmp_path):
    for seed, name in enumerate("ab"):  # they differ by a unit in the last place, mostly
        llama(seed, 5e-5).bfloat16().save_pretrained(tmp_path / name)
    assert ask(tmp_path, made(tmp_path, tmp_path, linear()), **linear()).answer == "yes"
    assert ask(tmp_path, tmp_path / "a", **linear()).answer == "no"


class Cuts(Watch):
    """Cuts a file off when tensors begin to be compared."""

    def __init__(self, path):
        super().__init__()
        self._path = path

    def start(self, total, label, unit="B"):
        if label == "comparing":
            os.truncate(self._path, 40_000)


def test_whose_file_it_is_that_ends_early_decides(home, tmp_path):
    path = made(home, tmp_path, linear())
    for name in "ab":
        shutil.copytree(home / name, tmp_path / name)
    found = ask(tmp_path, path, progress=Cuts(tmp_path / "a" / "model.safetensors"), **linear())
    assert (found.answer, "the file ends at byte" in found.reason) == ("cannot tell", True)
    with pytest.raises(SourceError, match="the file ends at byte"):
        ask(home, path, progress=Cuts(path / "model.safetensors"), **linear())


# ---------------------------------------------------------------- cannot tell


def test_what_was_computed_in_a_narrow_dtype_cannot_be_told(home, tmp_path):
    state = {name: load_file(home / f"{name}16" / "model.safetensors") for name in "ab"}
    hand = {name: 0.3 * a + 0.7 * state["b"][name] for name, a in state["a"].items()}
    write_model(tmp_path / "hand", hand)
    found = ask(home, tmp_path / "hand", **linear("16"))
    assert (found.answer, set(found.tensors) <= {"same", "rounded", "near"}) == ("cannot tell", True)
    assert "computes in a narrow dtype" in found.reason
    assert found.error.exit_code == 5


def test_another_seed_cannot_be_told_from_another_recipe_and_the_lock_knows_it(home, tmp_path):
    dare = {**ties(), "merge": {"method": "dare-linear", "density": 0.5}}
    path = made(home, tmp_path, dare, compute={"seed": 3})
    assert ask(home, path, seed=3, **dare).answer == "yes"
    found = ask(home, path, seed=4, **dare)
    assert found.answer == "cannot tell"
    assert "the recipe's seed is 4, its lock says seed 3" in found.reason
    assert found.fix == "name the seed: --set compute.seed=3"
    lost = ask(home, change(path, Q_PROJ, lambda _: None), seed=4, **dare)
    assert lost.answer == "no"  # no seed makes it
    changed = ask(home, change(path, Q_PROJ, lambda _: torch.ones(32, 32)), seed=3, **dare)
    assert changed.answer == "no"  # it is that seed


def test_an_input_that_is_missing_is_told_with_its_fix(home, tmp_path):
    path = made(home, tmp_path, linear())
    gone = linear() | {"models": {"a": "./a", "b": "./gone"}}
    found = ask(home, path, **gone)
    assert (found.answer, found.error.exit_code) == ("cannot tell", 5)
    assert "no such file or folder" in found.reason
    assert "check the path" in found.fix


def test_an_input_cut_off_is_not_the_fault_of_the_checkpoint(home, tmp_path):
    path = made(home, tmp_path, linear())
    shutil.copytree(home / "a", tmp_path / "a")
    shutil.copytree(home / "b", tmp_path / "b")
    os.truncate(tmp_path / "a" / "model.safetensors", 40_000)
    assert ask(tmp_path, path, **linear()).answer == "cannot tell"


def test_an_adapter_and_quantised_weights_are_no_merged_checkpoints(home, tmp_path):
    assert "is an adapter" in ask(home, home / "lora", **adapted()).reason
    path = made(home, tmp_path, linear())
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    assert "quantised" in ask(home, path, **linear()).reason


def test_code_that_a_recipe_names_is_not_run_without_a_word(home):
    code = {"architecture": "net.py:build", **linear(), "merge": {"method": "c2m3"}}
    with pytest.raises(RecipeError, match="would execute"):
        ask(home, home / "a", **code)


# ---------------------------------------------------------------- words


@pytest.fixture(scope="module")
def speakers(tmp_path_factory):
    """Two models whose tokenizers learnt other texts, and their merge with the tokens of both."""
    folder = tmp_path_factory.mktemp("speakers")
    build(folder / "a", "llama", "stories", 1)
    build(folder / "b", "llama", "code", 2)
    merged = made(folder, folder, UNION)
    return folder, merged


UNION = {"models": {"a": "./a", "b": "./b"}, "merge": {"method": "linear"}, "tokenizer": {"source": "union"}}


def renumbered(path, order, *, pad=0):
    """The same checkpoint with its tokens in another order, and rows of padding."""
    document = json.loads((path / "tokenizer.json").read_text())
    numbers = {old: new for new, old in enumerate(order)}
    vocabulary = document["model"]["vocab"]
    document["model"]["vocab"] = {text: numbers[number] for text, number in vocabulary.items()}
    for token in document["added_tokens"]:
        token["id"] = numbers[token["id"]]
    (path / "tokenizer.json").write_text(json.dumps(document))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change(path, name, lambda rows: torch.cat([rows[order], torch.ones(pad, rows.shape[1])]))
    return path


@pytest.mark.parametrize("pad", [0, 5])
def test_another_order_of_tokens_and_padding_are_the_same_checkpoint(speakers, tmp_path, pad):
    folder, merged = speakers
    path = shutil.copytree(merged, tmp_path / "made")
    order = torch.randperm(load_file(path / "model.safetensors")["lm_head.weight"].shape[0]).tolist()
    found = ask(folder, renumbered(path, order, pad=pad), **UNION)
    assert (found.answer, found.tensors) == ("yes", {"same": 21})
    assert "the tokens stand in another order" in found.remarks[0]
    change(path, "lm_head.weight", lambda rows: rows.index_fill(0, torch.tensor([17]), 9.0))
    assert ask(folder, path, **UNION).answer == "no"


def test_rows_in_an_order_that_nothing_tells_cannot_be_told(speakers, tmp_path):
    folder, merged = speakers
    path = shutil.copytree(merged, tmp_path / "made")
    order = torch.randperm(load_file(path / "model.safetensors")["lm_head.weight"].shape[0]).tolist()
    renumbered(path, order)
    kept = (path / "tokenizer.json").read_text()
    (path / "tokenizer.json").unlink()
    found = ask(folder, path, **UNION)
    assert (found.answer, "no tokenizer beside it" in found.reason) == ("cannot tell", True)
    assert found.fix.endswith("tokenizer.json")
    (path / "tokenizer.json").write_text(kept)
    assert ask(folder, path, **UNION).answer == "yes"
    (path / "tokenizer.json").unlink()
    assert ask(folder, change(path, Q_PROJ, lambda value: value + 1), **UNION).answer == "no"


def test_rows_that_are_cut_off_are_a_no(speakers, tmp_path):
    folder, merged = speakers
    path = shutil.copytree(merged, tmp_path / "made")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        change(path, name, lambda rows: rows[:-3])
    found = ask(folder, path, **UNION)
    assert (found.answer, "lm_head.weight has no rows for 3 tokens" in found.reason) == ("no", True)


def test_tokens_that_only_one_of_them_has_are_a_no(speakers, tmp_path):
    folder, merged = speakers
    found = ask(folder, merged, **(UNION | {"tokenizer": {"source": "a"}}))
    assert found.answer == "no"
    assert "and the recipe's result lacks" in found.reason
    found = ask(folder, folder / "a", **UNION)
    assert (found.answer, "it lacks" in found.reason) == ("no", True)


# ---------------------------------------------------------------- other tools, other methods


@pytest.mark.parametrize(
    ("case", "answer"), [("ties", "yes"), ("rounded-once", "yes"), ("computed-narrow", "cannot tell")]
)
def test_what_mergekit_has_made_of_its_own_recipe(case, answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_families(tmp_path)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(yaml.safe_load((PEERS / "whole.yaml").read_text())[case]))
    found = verify_against(PEERS / "whole" / f"{case}.safetensors", load_recipe(tmp_path / "recipe.yml"))
    assert (found.answer, sum(found.tensors.values())) == (answer, 30)


NETWORK = """
from tests.arch.networks import MLP

def mlp():
    return MLP((6, 20, 16, 4))
"""


def test_methods_that_look_at_whole_models_and_finish_them_are_followed(tmp_path):
    (tmp_path / "build.py").write_text(NETWORK)
    save_file({"x": torch.randn(250, 6)}, tmp_path / "rows.safetensors")
    repair = {"mode": "full", "data": str(tmp_path / "rows.safetensors"), "network": f"{tmp_path}/build.py:mlp"}
    models = nets.write(tmp_path, {name: nets.mlp(seed) for seed, name in enumerate("ab")})
    sections = {"models": models, "architecture": "mlp", "merge": {"method": "c2m3", "repair": repair}}
    path = mergetool.run(sections, output=tmp_path / "out", trust_code=True).path
    found = ask(tmp_path, path, flags=Flags(trust_code=True), **sections)
    assert (found.answer, found.tensors) == ("yes", {"same": 6})
    plain = sections | {"merge": {"method": "c2m3"}}
    assert ask(tmp_path, path, **plain).answer == "no"


def test_a_mixture_of_experts_is_compared_expert_by_expert(tmp_path):
    for seed, name in enumerate(("base", "math", "code")):
        write_dense(tmp_path / name, "llama", seed)
    experts = {name: {"prompts": [f"w{seed} w3"]} for seed, name in enumerate(("math", "code"))}
    sections = {
        "base": str(tmp_path / "base"),
        "models": {name: str(tmp_path / name) for name in experts},
        "merge": {"method": "moe", "experts": experts},
    }
    path = mergetool.run(sections, output=tmp_path / "out").path
    assert ask(tmp_path, path, **sections).answer == "yes"
    expert = next(name for name in load_file(path / "model.safetensors") if "experts.1" in name)
    found = ask(tmp_path, change(path, expert, lambda value: value + 1), **sections)
    assert (found.answer, [each.name for each in found.worst]) == ("no", [expert])


COMPRESS = {"merge": {"method": "tsv-compress", "rank": 4}}


def test_a_bundle_is_held_against_its_recipe(home, tmp_path):
    recipe = {**ties(), **COMPRESS}
    path = made(home, tmp_path, recipe)
    told = ask(home, path, **recipe)
    assert (told.answer, told.tensors.keys()) == ("yes", {"same"})
    for other in ({"rank": 2}, {"rank": 4, "factors": "float32"}):
        assert ask(home, path, **{**recipe, "merge": {"method": "tsv-compress", **other}}).answer == "no"
    other = {**recipe, "models": {"a": str(home / "a"), "b": str(home / "a16")}}
    told = ask(home, path, **other)
    assert told.answer == "no"
    assert "tensors differ, most of all b: " in told.reason
    told = ask(home, path, **{**recipe, "models": {"a": str(home / "a"), "c": str(home / "b")}})
    assert told.reason == "its tasks are a, b, by the recipe a, c"


def test_factors_that_were_changed_are_named(home, tmp_path):
    recipe = {**ties(), **COMPRESS}
    path = made(home, tmp_path, recipe)
    file = path / "factors" / "b.safetensors"
    factors = load_file(file)
    factors[f"{Q_PROJ}.S"] = factors[f"{Q_PROJ}.S"] * 1.5
    save_file(factors, file, metadata={"format": "pt"})
    told = ask(home, path, **recipe)
    assert told.answer == "no"
    assert f"1 of {sum(told.tensors.values())} tensors differ, most of all b: {Q_PROJ}" in told.reason
    factors[f"{Q_PROJ}.S"] = -factors[f"{Q_PROJ}.S"] / 1.5
    factors[f"{Q_PROJ}.U"] = -factors[f"{Q_PROJ}.U"]  # the same change in other factors
    save_file(factors, file, metadata={"format": "pt"})
    assert ask(home, path, **recipe).answer == "yes"


def test_nobody_can_tell_of_a_bundle_whose_expert_is_gone(home, tmp_path):
    recipe = {**ties(), **COMPRESS}
    path = made(home, tmp_path, recipe)
    told = ask(home, path, **{**recipe, "models": {"a": str(home / "a"), "b": str(home / "gone")}})
    assert (told.answer, "no such file" in told.reason) == ("cannot tell", True)


def test_searches_and_bundles_are_not_followed(home, tmp_path):
    merge3 = {"method": "merge3", "inner": {"method": "linear", "weight": {"search": [0, 1]}}, "tasks": [{"name": "x"}]}
    search = {"models": linear()["models"], "merge": merge3}
    assert "searches for its numbers" in ask(home, home / "a", **search).reason
    bundle = {**ties(), "merge": {"method": "tsv-compress"}}
    assert "leaves a bundle" in ask(home, home / "a", **bundle).reason
    path = made(home, tmp_path, bundle)
    assert "is a bundle" in ask(home, path, **linear()).reason

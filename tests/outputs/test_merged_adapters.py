"""Adapters merged by themselves: with PEFT on their base, what they come to is the merge of the models that they make.

The truth is the checkpoint that the same recipe makes of base and adapters, which is tested against PEFT elsewhere.
"""

import copy
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import mergetool
from mergetool.cli.app import app
from mergetool.errors import PlanError, SourceError
from mergetool.planning import make_plan
from mergetool.planning.inspect import facts_about
from mergetool.recipe.load import load_recipe
from tests.checkpoints.adapters.peft_oracle import LLAMA, SMALL, quiet
from tests.files import LONG, write_recipe
from tests.turns import pairs

MOE = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
BERT = hf.BertConfig(**SMALL, max_position_embeddings=32)
ALL = ["q_proj", "k_proj", "down_proj"]


class Net(nn.Module):
    """Layers that no transformer has."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.conv2 = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 4)


def llama(**more):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, **more))


NETWORKS = {
    "llama": (llama, {"target_modules": ALL}),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4)),
        {"target_modules": ["c_attn", "c_proj"]},
    ),
    "words": (lambda: hf.BertForMaskedLM(BERT), {"target_modules": ["query", "word_embeddings"]}),
    "experts": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE)),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "other layers": (Net, {"target_modules": ["attention", "conv2", "linear"]}),
}
DIFFERENT = [
    {"r": 4, "lora_alpha": 6},
    {"r": 2, "lora_alpha": 8, "use_rslora": True},
    {"r": 3, "lora_alpha": 5},
]


def train(folder, name, model, seed, **settings):
    """Save an adapter with moved parameters for a model that is saved as `base`."""
    with quiet():
        adapted = get_peft_model(model, LoraConfig(**settings))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        adapted.save_pretrained(folder / name)


def start(folder, make):
    """A base on the disk, and what opens it again."""
    torch.manual_seed(0)
    base = make()
    if isinstance(base, hf.PreTrainedModel):
        base.save_pretrained(folder / "base")
        opened = type(base).from_pretrained(folder / "base")
        return lambda: copy.deepcopy(opened)
    state = base.state_dict()
    (folder / "base").mkdir()
    save_file(state, folder / "base" / "model.safetensors")

    def again():
        model = make()
        model.load_state_dict(state)
        return model

    return again


MADE = {}


def once(folder, key, make):
    """What `make(place)` writes, made once and copied for whoever asks for it; returns what that returns."""
    if key not in MADE:
        place = Path(tempfile.mkdtemp(dir=os.environ["XDG_CACHE_HOME"]))
        MADE[key] = place, make(place)
    place, made = MADE[key]
    shutil.copytree(place, folder, dirs_exist_ok=True)
    for path in folder.glob("*/adapter_config.json"):
        path.write_text(path.read_text().replace(str(place), str(folder)))
    torch.manual_seed(0)  # what is drawn next does not depend on who asked first
    return made


def three(folder, make, same=None, **settings):
    """A base and three adapters, `a` to `c`, of different ranks and scales; returns what opens the base."""

    def all_of_them(place):
        again = start(place, make)
        for seed, (name, own) in enumerate(zip("abc", DIFFERENT, strict=True)):
            train(place, name, again(), seed, **(own if same is None else same), **settings)
        return again

    return once(folder, (make, repr(same), repr(settings)), all_of_them)


def recipes(folder, method, rank=None, names="abc", then=(), **merge):
    """The same merge as an adapter by itself, and as a checkpoint."""
    sections = {
        "models": {name: {"adapter": name} for name in names},
        "merge": {"method": method, **merge},
        **({"then": then} if then else {}),
    }
    more = {} if rank is None else {"rank": rank}
    alone = write_recipe(folder / "alone.yaml", **sections, output={"path": "out", **more})
    whole = write_recipe(folder / "whole.yaml", base="base", **sections, output={"path": "whole"})
    return alone, whole


def merged_by_peft(again, adapter):
    with quiet():
        return PeftModel.from_pretrained(again(), adapter).merge_and_unload().state_dict()


def assert_same_merge(folder, again, atol=2e-6):
    made = merged_by_peft(again, folder / "out")
    if (folder / "whole" / "config.json").is_file():
        whole = type(again()).from_pretrained(folder / "whole").state_dict()
    else:
        whole = load_file(folder / "whole" / "model.safetensors")
    base = again().state_dict()
    changed = [name for name in whole if not torch.equal(whole[name], base[name])]
    assert changed
    for name in whole:
        torch.testing.assert_close(
            made[name], whole[name], rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


SUMS = {
    "linear": {"weight": {"a": 0.5, "b": 0.2, "c": 0.3}},
    "task-arithmetic": {"weight": {"a": 1.0, "b": -0.5, "c": 0.3}, "scale": 0.8},
}


@pytest.mark.parametrize(("network", "method"), pairs(NETWORKS, SUMS))
def test_sums_are_exact(tmp_path, network, method):
    settings = SUMS[method]
    make, targets = NETWORKS[network]
    again = three(tmp_path, make, **targets)
    alone, whole = recipes(tmp_path, method, **settings)
    result = mergetool.run(alone)
    mergetool.run(whole)
    assert_same_merge(tmp_path, again)
    assert not result.notes
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tsv-merge", {}),
        ("iso-c", {}),
        ("iso-cts", {}),
        ("knots", {}),
        ("knots", {"stack": "outputs"}),
        ("knots", {"combine": "mean"}),
        ("model-stock", {}),
        ("multislerp", {}),
    ][:: 1 if LONG else 2],
)
def test_what_turns_with_its_inputs_is_merged_in_cores(tmp_path, method, settings):
    again = three(tmp_path, llama, target_modules=ALL)
    alone, whole = recipes(tmp_path, method, **settings)
    mergetool.run(alone)
    mergetool.run(whole)
    assert_same_merge(tmp_path, again, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {"density": 0.4}),
        ("dare-linear", {"density": 0.4}),
        ("dare-ties", {"density": 0.4}),
        ("della", {"density": 0.4}),
        ("breadcrumbs", {}),
        ("sce", {}),
    ][:: 1 if LONG else 2],
)
def test_what_looks_at_entries_has_all_directions_with_rank_exact(tmp_path, method, settings):
    again = three(tmp_path, llama, target_modules=ALL)
    alone, whole = recipes(tmp_path, method, "exact", **settings)
    mergetool.run(alone)
    mergetool.run(whole)
    assert_same_merge(tmp_path, again)


LINES, MATCH = {"step": "lines", "first": 0.4, "last": 0.9}, {"step": "match-norm"}


@pytest.mark.parametrize(
    ("method", "then", "rank"),
    [
        ("linear", [LINES], None),
        ("task-arithmetic", [LINES], None),
        ("karcher", [LINES], None),
        ("linear", [MATCH, LINES], "exact"),
        ("ties", [{**MATCH, "axis": "row"}], "exact"),
        ("tsv-merge", [MATCH], "exact"),
        ("ties", [{"step": "truncate", "rank": 3}], "exact"),
    ],
)
def test_steps_after_merging_do_to_products_what_they_do_to_weights(tmp_path, method, then, rank):
    again = three(tmp_path, llama, target_modules=ALL)
    for recipe in recipes(tmp_path, method, rank, then=then):
        mergetool.run(recipe)
    assert_same_merge(tmp_path, again, atol=5e-6)


def test_a_step_that_looks_at_products_cannot_follow_sums_of_their_halves(tmp_path):
    three(tmp_path, llama, same={"r": 2, "lora_alpha": 4}, target_modules=ALL)
    alone, _ = recipes(tmp_path, "factor-sum", then=[MATCH])
    with pytest.raises(PlanError, match="added up by themselves"):
        mergetool.run(alone)
    alone, _ = recipes(tmp_path, "factor-sum", then=[LINES])
    mergetool.run(alone)


def test_a_cut_sum_is_the_svd_of_the_dense_sum(tmp_path):
    three(tmp_path, llama, target_modules=ALL)
    alone, whole = recipes(tmp_path, "task-arithmetic", 3)
    result = mergetool.run(alone)
    mergetool.run(whole)
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "whole"))
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    measured = json.loads((tmp_path / "out" / "mergetool.json").read_text())["measured"]
    for name in (name for name in base if name.removesuffix(".weight").endswith(tuple(ALL))):
        u, s, vh = torch.linalg.svd(merged[name].double() - base[name].double())
        best = (u[:, :3] * s[:3]) @ vh[:3]
        module = f"base_model.model.{name.removesuffix('.weight')}"
        product = made[f"{module}.lora_B.weight"].double() @ made[f"{module}.lora_A.weight"].double()
        torch.testing.assert_close(product, best, rtol=0, atol=1e-5 * float(s[0]))
        lost = float(s[3:].square().sum() / s.square().sum()) ** 0.5
        assert measured[name]["lost by the rank"] == pytest.approx(lost, rel=1e-4)
    assert any("cut to the rank" in note for note in result.notes)


def test_no_file_of_the_base_is_opened(tmp_path):
    again = three(tmp_path, llama, target_modules=ALL)
    alone, whole = recipes(tmp_path, "linear")
    mergetool.run(whole)
    (tmp_path / "base").rename(tmp_path / "away")
    mergetool.run(alone)
    (tmp_path / "away").rename(tmp_path / "base")
    assert_same_merge(tmp_path, again)
    inputs = json.loads((tmp_path / "out" / "mergetool.json").read_text())["inputs"]
    assert {file["file"] for files in inputs.values() for file in files} == {
        f"{name}/{file}" for name in "abc" for file in ("adapter_model.safetensors", "adapter_config.json")
    }


def test_modules_that_only_some_adapters_change_are_joined(tmp_path):
    again = start(tmp_path, llama)
    train(tmp_path, "a", again(), 1, target_modules=["q_proj"], r=2, layers_to_transform=[0])
    train(tmp_path, "b", again(), 2, target_modules=["v_proj", "q_proj"], r=3, rank_pattern={"v_proj": 5})
    train(tmp_path, "c", again(), 3, target_modules="all-linear", r=2, exclude_modules=["lm_head"])
    alone, whole = recipes(tmp_path, "linear")
    mergetool.run(alone)
    mergetool.run(whole)
    assert_same_merge(tmp_path, again)


@pytest.mark.parametrize(
    "settings",
    [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}],
)
def test_what_adapters_hold_beside_products_is_merged_with_a_base(tmp_path, settings):
    again = three(
        tmp_path,
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=4, tie_word_embeddings=False)
        ),
        target_modules=["c_attn", "c_fc"],
        **settings,
    )
    alone, whole = recipes(tmp_path, "task-arithmetic", scale=0.6)
    mergetool.run(whole)
    data = {"base": "base", **load_recipe(alone).document}
    data["output"] = {"path": "out", "kind": "adapter"}
    mergetool.run(write_recipe(tmp_path / "based.yaml", **data))
    assert_same_merge(tmp_path, again)


def test_values_without_a_base_are_refused_and_the_advice_works(tmp_path):
    again = three(tmp_path, llama, target_modules=ALL, modules_to_save=["lm_head"])
    alone, _ = recipes(tmp_path, "linear")
    with pytest.raises(PlanError, match="hold it in full") as caught:
        mergetool.run(alone)
    assert "add base: MODEL and output: {kind: adapter}, or take one of them" in caught.value.fix
    assert "use: a" in caught.value.fix
    recipes(tmp_path, "linear", overrides=[{"match": "lm_head.weight", "use": "a"}])
    mergetool.run(tmp_path / "alone.yaml")
    made = merged_by_peft(again, tmp_path / "out")
    own = merged_by_peft(again, tmp_path / "a")
    assert torch.equal(made["lm_head.weight"], own["lm_head.weight"])


def test_a_head_that_one_adapter_has_is_kept(tmp_path):
    again = start(tmp_path, llama)
    train(tmp_path, "a", again(), 1, target_modules=["q_proj"], modules_to_save=["lm_head"])
    train(tmp_path, "b", again(), 2, target_modules=["q_proj"])
    alone, _ = recipes(tmp_path, "linear", names="ab")
    mergetool.run(alone)
    warnings = make_plan(load_recipe(alone)).warnings
    assert any(text.startswith("lm_head.weight: held in full by one adapter") for text in warnings)
    made, own = merged_by_peft(again, tmp_path / "out"), merged_by_peft(again, tmp_path / "a")
    assert torch.equal(made["lm_head.weight"], own["lm_head.weight"])


PAIRS = {
    "biases of layers that only the other wraps": (
        lambda: hf.BertForMaskedLM(BERT),
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["dense", "decoder"]},
    ),
    "the bias of a tied output layer": (
        lambda: hf.BertForMaskedLM(BERT),
        {"target_modules": ["decoder"], "bias": "lora_only"},
        {"target_modules": ["query"]},
    ),
    "a bias by itself and in its module": (
        lambda: hf.BertForSequenceClassification(BERT),
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "modules of which the base gives a part": (
        lambda: hf.BertForMaskedLM(BERT),
        {"target_modules": ["query"], "bias": "all"},
        {"target_modules": ["query"], "use_dora": True},
    ),
    "words and an output layer that are no longer tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"], "use_dora": True},
    ),
    "tied and no longer tied": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_values_of_one_of_two_are_merged_with_a_base(tmp_path, case):
    make, *settings = PAIRS[case]
    again = start(tmp_path, make)
    for seed, (name, own) in enumerate(zip("ab", settings, strict=True)):
        train(tmp_path, name, again(), seed, r=2, **own)
    sections = {"models": {name: {"adapter": name} for name in "ab"}, "merge": {"method": "linear"}}
    output = {"path": "out", "kind": "adapter", "rank": "exact"}
    mergetool.run(write_recipe(tmp_path / "based.yaml", base="base", **sections, output=output))
    made, base = merged_by_peft(again, tmp_path / "out"), again().state_dict()
    own = [merged_by_peft(again, tmp_path / name) for name in "ab"]
    for name, tensor in made.items():
        wanted = base[name] + sum(each[name] - base[name] for each in own) / 2
        torch.testing.assert_close(tensor, wanted, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_dora_needs_its_base_and_the_advice_works(tmp_path):
    again = three(tmp_path, llama, target_modules=ALL, use_dora=True)
    alone, whole = recipes(tmp_path, "linear")
    with pytest.raises(PlanError, match="needs its base") as caught:
        mergetool.run(alone)
    assert caught.value.fix == "add base: MODEL, and output: {kind: adapter, rank: 32}"
    mergetool.run(whole)
    data = {"base": "base", **load_recipe(alone).document, "output": {"path": "out", "kind": "adapter", "rank": 32}}
    mergetool.run(write_recipe(tmp_path / "based.yaml", **data))
    assert_same_merge(tmp_path, again)


def test_full_matrices_are_refused_without_a_rank_and_the_advice_works(tmp_path):
    three(tmp_path, llama, target_modules=ALL)
    alone, _ = recipes(tmp_path, "ties")
    with pytest.raises(PlanError, match="many directions") as caught:
        mergetool.run(alone)
    assert "{rank: 32}" in caught.value.fix
    recipes(tmp_path, "ties", 32)
    mergetool.run(alone)


def test_one_adapter_comes_out_as_it_was(tmp_path):
    again = start(tmp_path, llama)
    train(tmp_path, "a", again(), 1, target_modules=ALL, r=4)
    alone, _ = recipes(tmp_path, "passthrough", names="a")
    mergetool.run(alone)
    made, own = merged_by_peft(again, tmp_path / "out"), merged_by_peft(again, tmp_path / "a")
    for name in own:
        torch.testing.assert_close(made[name], own[name], rtol=0, atol=1e-6)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


def test_half_precision_stays_what_it_was(tmp_path):
    again = start(tmp_path, llama)
    for seed, name in enumerate("ab"):
        train(tmp_path, name, again(), seed, target_modules=ALL, r=4)
        path = tmp_path / name / "adapter_model.safetensors"
        save_file({key: value.bfloat16() for key, value in load_file(path).items()}, path)
    alone, _ = recipes(tmp_path, "linear", names="ab")
    mergetool.run(alone)
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in made.values()} == {torch.bfloat16}


def test_a_truncated_adapter_is_refused_before_anything_is_written(tmp_path):
    three(tmp_path, llama, target_modules=ALL)
    path = tmp_path / "b" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    alone, _ = recipes(tmp_path, "linear")
    with pytest.raises(SourceError):
        mergetool.run(alone)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_the_plan_says_what_there_is_at_most(tmp_path):
    three(tmp_path, llama, target_modules=ALL)
    alone, _ = recipes(tmp_path, "linear")
    plan = make_plan(load_recipe(alone))
    result = mergetool.run(alone)
    assert plan.num_tensors == result.num_tensors == 6
    assert result.bytes_written <= plan.bytes_out
    assert plan.bytes_in <= 4 * (4 + 2 + 3) * sum(sum(step.spec.shape) for step in plan.steps)


def test_the_result_can_be_merged_again(tmp_path):
    again = three(tmp_path, llama, target_modules=ALL)
    alone, whole = recipes(tmp_path, "linear", names="ab")
    mergetool.run(alone)
    shutil.move(tmp_path / "out", tmp_path / "ab")
    twice = write_recipe(
        tmp_path / "twice.yaml",
        models={"ab": {"adapter": "ab"}, "c": {"adapter": "c"}},
        merge={"method": "task-arithmetic", "weight": {"ab": 2.0, "c": 1.0}},
        output={"path": "out"},
    )
    mergetool.run(twice)
    _, whole = recipes(tmp_path, "task-arithmetic")
    mergetool.run(whole)
    assert_same_merge(tmp_path, again)


def test_layers_that_no_adapter_changes_stay_where_all_that_is_changed_is_kept_in_full(tmp_path):
    """PEFT opens no adapter without factors: one of zeros is written, where no adapter has any."""
    again = three(tmp_path, llama, target_modules=["embed_tokens"], use_dora=True)
    alone, whole = recipes(tmp_path, "linear")
    mergetool.run(whole)
    output = {"path": "out", "kind": "adapter", "rank": "exact"}
    mergetool.run(
        write_recipe(tmp_path / "based.yaml", **{"base": "base", **load_recipe(alone).document, "output": output})
    )
    assert_same_merge(tmp_path, again)


def test_inspect_tells_what_an_adapter_holds(tmp_path):
    again = start(tmp_path, llama)
    train(tmp_path, "a", again(), 1, target_modules=ALL, r=4, rank_pattern={"k_proj": 2}, modules_to_save=["lm_head"])
    facts = facts_about(tmp_path / "a")
    assert (facts["products"], facts["ranks"], facts["in full"]) == (6, [2, 4], 1)
    assert facts["base"] == str(tmp_path / "base")
    shapes = {entry["name"]: entry["shape"] for entry in facts["tensors"]}
    assert shapes["model.layers.0.mlp.down_proj.weight"] == [32, 48]
    json.dumps(facts)
    told = CliRunner().invoke(app, ["inspect", str(tmp_path / "a")])
    assert told.exit_code == 0
    assert "LoRA adapter" in told.stdout

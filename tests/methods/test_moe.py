"""Dense models side by side: what is copied, what gates are, what the result computes, and what is refused."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.checkpoints.mixtures import MIXTURES, mixture_config
from mergetool.errors import MergeError, PlanError, RecipeError, SourceError
from mergetool.networks.gates import Asked, gates_from_prompts
from mergetool.outputs.verify import verify_output
from mergetool.tensors.folder import open_model
from tests.alignment.test_devices import Said
from tests.dense import logits, set_config, write_dense
from tests.devices import STAND_IN, every_device, present
from tests.files import LONG, StoppedError, Watch, content, stop_after
from tests.methods import deepseek
from tests.zoo.text import save_tokenizer, token_list

PROMPTS = {
    "math": {"prompts": ["w1 w2 w3", "w4 w5"], "avoid": ["w9"]},
    "code": {"prompts": ["w6", "w7 w8 w9 w10 w11"]},
}
RANDOM = {"method": "moe", "gate": "random", "experts": {"math": {}, "code": {}}}
TARGETS = [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen2", "qwen2-moe"), ("qwen3", "qwen3-moe")]
TARGETS += [("llama", "qwen2-moe"), ("llama", "deepseek")]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folders of a base and two experts of each kind."""
    folder = tmp_path_factory.mktemp("dense")
    for kind in ("llama", "mistral", "qwen2", "qwen3"):
        for seed, name in enumerate(("base", "math", "code")):
            write_dense(folder / kind / name, kind, seed)
    return folder


@pytest.fixture
def recipe(dense):
    def make(kind="llama", models=("math", "code"), **merge):
        merge = {"method": "moe", "experts": PROMPTS, **merge}
        paths = {name: str(dense / kind / name) for name in models}
        return {"base": str(dense / kind / "base"), "models": paths, "merge": merge}

    return make


@pytest.fixture
def run(recipe, tmp_path):
    def made(*arguments, output="out", **merge):
        mergetool.run(recipe(*arguments, **merge), output=tmp_path / output)
        return tmp_path / output

    return made


def weights(folder):
    return load_file(folder / "model.safetensors")


def gates(folder):
    """Rows of the gates of all layers, (layers, experts, width)."""
    found = {
        name: value for name, value in weights(folder).items() if name.endswith((".mlp.gate.weight", "moe.gate.weight"))
    }
    return torch.stack([found[name] for name in sorted(found)])


# -------------------------------------------------------------------- what is copied


@pytest.mark.parametrize(("kind", "target"), TARGETS)
def test_all_but_the_mlps_is_the_bases_and_each_expert_has_its_models(dense, run, kind, target):
    made = weights(run(kind, target=target))
    base, math, code = (weights(dense / kind / name) for name in ("base", "math", "code"))
    mixture = MIXTURES[target]
    for name, value in base.items():
        if ".mlp." not in name:
            assert torch.equal(made.pop(name), value)
            continue
        layer, leaf = name.split(".mlp.")[0], name.split(".")[-2]
        for number, expert in enumerate((math, code)):
            assert torch.equal(made.pop(mixture.expert(layer, number, leaf)), expert[name])
    for layer in range(3):
        assert made.pop(mixture.gate(f"model.layers.{layer}")).shape == (2, 32)
    assert all(".shared_expert" in name and not value.any() for name, value in made.items())
    assert bool(made) == (target == "qwen2-moe")


@pytest.mark.parametrize(("kind", "target"), TARGETS[:-1])
def test_experts_that_are_copies_of_the_base_compute_what_it_does(dense, recipe, tmp_path, kind, target):
    """Whatever the gates: those that are chosen add up to 1."""
    asked = recipe(kind, target=target, experts={**PROMPTS, "third": {"model": "base", "prompts": ["w20"]}})
    asked["models"] = dict.fromkeys(asked["models"], asked["base"])
    result = mergetool.run(asked, output=tmp_path / "out")
    assert result.warnings == ()
    expected = logits(dense / kind / "base")
    assert expected.std() > 0.5
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("old", ["llama", "mistral"])
def test_what_an_old_config_leaves_unsaid_is_said(dense, tmp_path, old):
    """A mixture takes other defaults for it than its base: rotary base, epsilon, key and value heads, window."""
    folder = write_dense(
        tmp_path / "base",
        old,
        num_key_value_heads=4 if old == "llama" else 8,
        num_attention_heads=8,
        hidden_size=64,
        head_dim=None,
        rms_norm_eps=1e-6,
        sliding_window=4096,
    )
    gone = ("rope_parameters", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "head_dim", "sliding_window")
    set_config(folder, **dict.fromkeys(gone))
    expected = logits(folder)
    asked = {"base": str(folder), "models": {"a": str(folder)}, "merge": RANDOM | {"experts": {"a": {}}}}
    mergetool.run(asked, output=tmp_path / "out")
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=0, atol=1e-5)


def test_a_result_generates_and_is_verified(run):
    made = run()
    assert "opens as MixtralForCausalLM and runs" in verify_output(made, load=True)["summary"]
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    written = model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert written.shape[1] > 2


def test_a_mixtures_config_says_what_its_family_says_by_default():
    """Defaults of dense families, as the installed transformers has them."""
    for kind, name in (("llama", "Llama"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")):
        target = next(each for each in MIXTURES.values() if kind in each.bases)
        plain = {"model_type": kind, "intermediate_size": 48, "num_attention_heads": 4}
        said = mixture_config(target, plain, experts=2, chosen=2, shared=False)
        family = getattr(transformers, f"{name}Config")(num_attention_heads=4).to_dict()
        known = {"rope_theta": family["rope_parameters"]["rope_theta"], **family}
        shared = (said.keys() & known.keys()) - {"model_type", "architectures"}
        assert {"rope_theta", "rms_norm_eps", "num_key_value_heads"} <= shared
        assert {key: said[key] for key in shared} == {key: known[key] for key in shared}


# -------------------------------------------------------------------- gates


def own_states(folder, text, *, mean):
    """What goes into each layer for a text, by the whole network in float64, (layers, width)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    begin = tokenizer.bos_token or ""
    ids = tokenizer(begin + text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])[:, 0]
    return states.mean(1) if mean else states[:, -1]


GATES = [(*each, gate) for gate in ("hidden", "hidden-avg") for each in TARGETS[:4]]


@pytest.mark.parametrize(("kind", "target", "gate"), GATES if LONG else [*GATES[:4:2], *GATES[5::2]])
def test_gates_are_the_directions_of_hidden_states(dense, run, kind, target, gate):
    found = gates(run(kind, gate=gate)).double()
    for number, each in enumerate(PROMPTS.values()):
        expected = torch.zeros(3, 32, dtype=torch.float64)
        for texts, sign in ((each["prompts"], 1), (each.get("avoid", ()), -1)):
            for text in texts:
                expected += sign * own_states(dense / kind / "base", text, mean=gate == "hidden-avg") / len(texts)
        expected /= expected.norm(dim=1, keepdim=True)
        torch.testing.assert_close(found[:, number], expected, rtol=0, atol=2e-6)


def test_many_long_prompts_go_through_in_parts(dense, run):
    """Several threads, each with texts of about one length, wait for one another at each layer."""
    texts = [" ".join(f"w{(7 * place + step * step) % 50}" for step in range(20 + 9 * place)) for place in range(9)]
    found = gates(run(experts={"math": {"prompts": texts}, "code": {"prompts": texts[:1]}})).double()
    expected = sum(own_states(dense / "llama" / "base", text, mean=False) for text in texts)
    torch.testing.assert_close(found[:, 0], expected / expected.norm(dim=1, keepdim=True), rtol=0, atol=2e-6)


def test_a_base_that_cannot_be_read_any_more_ends_it_with_that(dense, tmp_path):
    """And not with that other threads waited for it in vain."""
    texts = tuple(" ".join([f"w{place}"] * 60) for place in range(6))
    shutil.copytree(dense / "llama" / "base", tmp_path / "base")
    torn = tmp_path / "base" / "model.safetensors"
    base = open_model(torn.parent)
    os.truncate(torn, max(base.position(name)[1] for name in base.specs if name.startswith("model.layers.1.")))
    with pytest.raises(SourceError, match=r"model\.layers\.1"):
        gates_from_prompts("hidden", base, [Asked("math", texts)], lambda text: None)


def test_gates_from_embeddings_are_alike_in_every_layer(dense, run):
    found = gates(run(gate="embedding"))
    rows = weights(dense / "llama" / "base")["model.embed_tokens.weight"].double()
    ids = transformers.AutoTokenizer.from_pretrained(dense / "llama" / "base").convert_tokens_to_ids

    def unit(x):
        return x / x.norm()

    def summed(*texts):
        return unit(torch.stack([rows[ids(token)] for text in texts for token in ["<s>", *text.split()]]).sum(0))

    expected = unit(summed("w1 w2 w3", "w4 w5") - summed("w9")), summed(*PROMPTS["code"]["prompts"])
    for layer in found.double():
        torch.testing.assert_close(layer, torch.stack(expected), rtol=0, atol=1e-7)


def test_drawn_gates_depend_on_the_seed_the_layer_and_the_expert_alone(recipe, tmp_path):
    def made(output, seed=0, **merge):
        asked = recipe(experts=RANDOM["experts"], **merge) | {"compute": {"seed": seed}}
        mergetool.run(asked, output=tmp_path / output)
        return gates(tmp_path / output)

    normal, uniform, nothing = (made(gate, gate=gate) for gate in ("random", "uniform-random", "uniform"))
    assert 0.8 < normal.std() < 1.2
    assert uniform.abs().max() < 32**-0.5
    assert 0.08 < uniform.std() < 0.12
    assert not nothing.any()
    assert len({tuple(row.tolist()) for row in normal.view(-1, 32)}) == 6
    assert torch.equal(made("again", gate="random"), normal)
    assert not torch.equal(made("other", gate="random", seed=1), normal)
    reversed_experts = {"code": {}, "math": {}}
    asked = recipe(gate="random", experts=reversed_experts)
    mergetool.run(asked, output=tmp_path / "reversed")
    assert torch.equal(gates(tmp_path / "reversed"), normal.flip(1))


def test_uniform_gates_make_the_mean_of_all_experts(dense, recipe, tmp_path):
    mergetool.run(recipe(gate="uniform", experts=RANDOM["experts"]), output=tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_experts_per_tok"] == 2
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp
    x = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    total = torch.zeros_like(x)
    for name in ("math", "code"):
        total += transformers.AutoModelForCausalLM.from_pretrained(dense / "llama" / name).model.layers[1].mlp(x) / 2
    with torch.no_grad():
        torch.testing.assert_close(model(x), total, rtol=0, atol=1e-5)


def test_a_report_says_how_well_the_gates_tell_experts_apart(run):
    report = json.loads((run() / "routing/report.json").read_text())
    assert report["experts"] == ["math", "code"]
    rows = load_file(run(output="again") / "routing/gates.safetensors")["gates"]
    for layer, told in zip(rows, report["layers"], strict=True):
        assert told["cosine"] == pytest.approx(float(layer[0] @ layer[1]), abs=1e-5)
        assert told["condition"] == pytest.approx(float(torch.linalg.cond(layer)), rel=1e-4)


def test_prompts_that_mean_nearly_the_same_are_told(recipe, tmp_path):
    said = []
    alike = {"math": {"prompts": ["w1 w2 w3 w4 w5"]}, "code": {"prompts": ["w2 w1 w3 w4 w5"]}}
    asked = recipe(gate="embedding", experts=alike)
    progress = type("Told", (mergetool.engine.run.Silent,), {"say": lambda self, text: said.append(text)})()
    mergetool.run(asked, output=tmp_path / "out", progress=progress)
    assert any("can hardly tell the experts apart" in text for text in said)


def test_an_expert_without_prompts_is_called_where_no_other_is(recipe, tmp_path):
    result = mergetool.run(recipe(experts={"code": PROMPTS["code"], "math": {}}), output=tmp_path / "out")
    assert "expert 'math' has no prompts: its row of the gates is zeros" in result.warnings[0]
    found = gates(tmp_path / "out")
    assert not found[:, 1].any()
    torch.testing.assert_close(found[:, 0].norm(dim=1), torch.ones(3))


def test_the_same_prompts_for_all_experts_are_told(recipe):
    (word,) = mergetool.plan(recipe(experts=dict.fromkeys(PROMPTS, PROMPTS["math"]))).warnings
    assert "all experts have the same prompts, so their gates are alike" in word


@pytest.mark.parametrize("gate", ["hidden", "embedding"])
def test_prompts_that_say_what_is_to_be_avoided_are_refused(recipe, tmp_path, gate):
    asked = recipe(gate=gate, experts={**PROMPTS, "code": {"prompts": ["w6"], "avoid": ["w6"]}})
    with pytest.raises(PlanError, match="prompts of expert 'code' and what it avoids are the same to the base"):
        mergetool.run(asked, output=tmp_path / "out")


def test_a_last_token_that_is_avoided_too_calls_nobody_in_the_first_layer(run):
    found = gates(run(experts={**PROMPTS, "code": {"prompts": ["w6 w9"], "avoid": ["w7 w9"]}}))
    assert not found[0, 1].any()
    torch.testing.assert_close(found[1:, 1].norm(dim=1), torch.ones(2))


# -------------------------------------------------------------------- shared experts, noise, factors


def test_a_shared_expert_is_whole_and_a_gate_calls_it(dense, run):
    shared = {"model": "base", "prompts": ["w30 w31"]}
    made = weights(run("qwen2", shared=shared))
    base = weights(dense / "qwen2" / "base")
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        for layer in range(3):
            ours = made[f"model.layers.{layer}.mlp.shared_expert.{leaf}.weight"]
            assert torch.equal(ours, base[f"model.layers.{layer}.mlp.{leaf}.weight"])
    for layer in range(3):
        row = made[f"model.layers.{layer}.mlp.shared_expert_gate.weight"]
        expected = own_states(dense / "qwen2" / "base", "w30 w31", mean=False)[layer]
        torch.testing.assert_close(row[0].double(), expected / expected.norm(), rtol=0, atol=2e-6)


def test_a_shared_expert_without_prompts_counts_half(dense, run):
    """The sigmoid of 0; with all experts scaled to nothing, half of its MLP is left."""
    quiet = [{"match": "*.experts.*", "scale": 0.0}]
    made = run("qwen2", shared="base", overrides=quiet)
    mlp = transformers.AutoModelForCausalLM.from_pretrained(made).model.layers[2].mlp
    whole = transformers.AutoModelForCausalLM.from_pretrained(dense / "qwen2" / "base").model.layers[2].mlp
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), whole(x) / 2, rtol=0, atol=1e-5)


ROTATIONS = {
    "plain": {},
    "wide": {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}},
    "scaled": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "biased": {"attention_bias": True},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_deepseek_of_identical_experts_is_the_dense_model(kind, tmp_path):
    base = str(write_dense(tmp_path / "base", "llama", **ROTATIONS[kind]))
    merge = {**RANDOM, "target": "deepseek"}
    mergetool.run({"base": base, "models": {"math": base, "code": base}, "merge": merge}, output=tmp_path / "out")
    dense, made = transformers.AutoModelForCausalLM.from_pretrained(base), deepseek.opened(tmp_path / "out")
    tokens = torch.arange(4, 24)[None]
    with torch.no_grad():
        torch.testing.assert_close(made(tokens).logits, dense(tokens).logits, rtol=0, atol=2e-5)
        ours, theirs = (model.generate(tokens[:, :5], max_new_tokens=8, do_sample=False) for model in (made, dense))
    assert torch.equal(ours, theirs)


def test_a_config_in_older_words_says_the_same(copied):
    """Files on the Hub, written by transformers 4, have the flat keys."""
    folder, asked = copied(target="deepseek")
    old = {"rope_parameters": None, "rope_theta": 20000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    set_config(folder / "base", bos_token_id=None, **old)
    mergetool.run(asked, output=folder / "out")
    config = json.loads((folder / "out/config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (20000.0, {"type": "linear", "factor": 4.0})
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)


def test_what_the_code_of_deepseek_does_not_know_is_refused_and_the_advice_helps(copied):
    folder, asked = copied(target="deepseek")
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaled |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
    for changes, what in (({"rope_parameters": scaled}, "scaled by llama3"), ({"head_dim": 16}, "heads are 16 wide")):
        write_dense(folder / "base", "llama", **changes)
        told = refused(asked)
        assert what in told
        assert told.endswith("write target: mixtral or qwen2-moe")
        for target in ("mixtral", "qwen2-moe"):
            mergetool.plan({**asked, "merge": {**asked["merge"], "target": target}})


def test_deepseek_adds_its_shared_expert_as_it_is(dense, run):
    made = run("llama", target="deepseek", shared="base", overrides=[{"match": "*.experts.*", "scale": 0.0}])
    mlp = transformers.AutoModelForCausalLM.from_pretrained(dense / "llama" / "base").model.layers[1].mlp
    x = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(deepseek.opened(made).model.layers[1].mlp(x), mlp(x), rtol=0, atol=1e-5)


def test_of_a_single_expert_deepseek_takes_a_share_and_people_are_told(dense, recipe):
    words = "\n".join(mergetool.plan(recipe("llama", target="deepseek", experts_per_token=1)).warnings)
    assert "by the expert's share of the gate" in words
    assert "transformers 4.41" in words
    for told in ({"experts_per_token": 2, "target": "deepseek"}, {"experts_per_token": 1, "target": "mixtral"}):
        assert "share" not in "\n".join(mergetool.plan(recipe("llama", **told)).warnings)


def test_noise_is_drawn_and_factors_reach_last_matrices_only(run):
    plain, noisy, scaled = (
        weights(run(output=name, **merge)) for name, merge in (("a", {}), ("b", {"noise": 0.25}), ("c", {"scale": 0.5}))
    )
    differing = [name for name in plain if not torch.equal(plain[name], noisy[name])]
    assert differing
    assert all(".experts." in name for name in differing)
    assert len(differing) == 18
    drawn = torch.stack([(noisy[name] - plain[name]).reshape(-1) for name in differing])
    assert drawn.std() == pytest.approx(0.25, rel=0.05)
    assert drawn.unique().numel() > 0.5 * drawn.numel()
    for name in plain:
        assert torch.equal(scaled[name], plain[name] * (0.5 if name.endswith("w2.weight") else 1))


# -------------------------------------------------------------------- the same bytes


@pytest.mark.parametrize("flags", [{"workers": 3}, {"workers": 2, "fork": True}])
def test_bytes_do_not_depend_on_the_number_of_workers(recipe, tmp_path, flags):
    asked = recipe(noise=0.01)
    mergetool.run(asked, output=tmp_path / "one", workers=1)
    mergetool.run(asked, output=tmp_path / "other", **flags)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "other/model.safetensors").read_bytes()


def test_a_killed_run_measures_nothing_again(recipe, dense, tmp_path):
    asked = recipe()
    mergetool.run(asked, output=tmp_path / "whole")
    with pytest.raises(StoppedError):
        mergetool.run(asked, output=tmp_path / "out", workers=1, progress=stop_after(5))
    watch = Watch()
    result = mergetool.run(asked, output=tmp_path / "out", progress=watch)
    assert result.resumed
    assert not any("prompts through the base" in text for text in watch.said)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_other_prompts_are_measured_again(recipe, tmp_path):
    other = recipe(experts={**PROMPTS, "math": {"prompts": ["w30"]}})
    mergetool.run(other, output=tmp_path / "whole")
    with pytest.raises(StoppedError):
        mergetool.run(recipe(), output=tmp_path / "out", workers=1, progress=stop_after(5))
    mergetool.run(other, output=tmp_path / "out", overwrite=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_plan_tells_files_and_steps_before_anything_is_read(recipe, tmp_path):
    plan = mergetool.plan(recipe())
    result = mergetool.run(recipe(), output=tmp_path / "out")
    assert plan.bytes_out == result.bytes_written == (tmp_path / "out/model.safetensors").stat().st_size
    assert [stage.name for stage in plan.stages] == ["gates", "merge"]
    told = {step.name: step.operation.name for step in plan.steps}
    assert told["model.layers.0.block_sparse_moe.experts.1.w2.weight"] == "expert"
    assert told["model.norm.weight"] == "copy"


def test_storage_is_the_bases_or_what_is_asked_for(dense, tmp_path):
    folder = write_dense(tmp_path / "half", "llama", 5, torch.bfloat16)
    asked = {"base": str(folder), "models": {"a": str(folder)}, "merge": RANDOM | {"experts": {"a": {}}}}
    mergetool.run(asked, output=tmp_path / "same")
    mergetool.run({**asked, "output": {"dtype": "float32"}}, output=tmp_path / "wide")
    same, wide = weights(tmp_path / "same"), weights(tmp_path / "wide")
    assert {value.dtype for value in same.values()} == {torch.bfloat16}
    assert {value.dtype for value in wide.values()} == {torch.float32}
    assert all(torch.equal(same[name], wide[name].bfloat16()) for name in same)


# -------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("merge", "what", "fix"),
    [
        ({"experts": RANDOM["experts"]}, "gate: hidden needs prompts, and no expert has any", "gate: random"),
        ({"experts": {"math": PROMPTS["math"]}}, "model 'code' is no expert", "add code: {prompts: "),
        (
            {"experts": {**PROMPTS, "third": {"prompts": ["w1"]}}},
            "there is no model 'third'",
            "model: one of base, math",
        ),
        (
            {"experts": {**PROMPTS, "math": {"avoid": ["w1"]}}},
            "there is no direction from which to turn",
            "add prompts:",
        ),
        ({"experts_per_token": 3}, "cannot be sent to 3 of 2 experts", "write at most 2"),
        ({"gate": "random"}, "no prompt is read", "gate: hidden"),
        (
            {"gate": "uniform", "experts": RANDOM["experts"], "experts_per_token": 1},
            "1 of 2 experts would be chosen",
            "write 2",
        ),
        ({"shared": "base", "target": "mixtral"}, "mixtral has no shared expert", "target: qwen2-moe"),
        ({"shared": "best"}, "there is no model 'best'", "model: one of base, math, code"),
        ({"shared": {"prompts": ["w1"]}}, "whose MLPs it has is not said", "model: one of base"),
        ({"slices": True}, "cannot take them apart", "another method"),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused_with_a_fix(recipe, merge, what, fix):
    asked = recipe(**{key: value for key, value in merge.items() if key != "slices"})
    if "slices" in merge:
        asked["slices"] = [{"math": [0, 1]}]
    with pytest.raises(RecipeError) as refused:
        mergetool.load_recipe(asked)
    assert what in str(refused.value)
    assert fix in str(refused.value)


@pytest.fixture
def copied(dense, tmp_path):
    """Copies of the models of a kind, to be spoilt; the recipe for them."""

    def make(kind="llama", **merge):
        shutil.copytree(dense / kind, tmp_path / "models", dirs_exist_ok=True)
        paths = {name: str(tmp_path / "models" / name) for name in ("math", "code")}
        merge = {"method": "moe", "experts": PROMPTS, **merge}
        return tmp_path / "models", {"base": str(tmp_path / "models/base"), "models": paths, "merge": merge}

    return make


def refused(asked, kind=PlanError):
    with pytest.raises(kind) as found:
        mergetool.plan(asked)
    return str(found.value)


def test_a_base_of_no_such_family_is_refused(copied):
    folder, asked = copied()
    set_config(folder / "base", model_type="gemma2")
    assert "models of the types llama, mistral, qwen2, qwen3" in refused(asked)


@pytest.mark.parametrize(
    ("kind", "target", "fits"), [("qwen2", "mixtral", "qwen2-moe"), ("llama", "qwen3-moe", "mixtral")]
)
def test_a_family_that_does_not_fit_the_base_is_refused_and_one_that_does_works(recipe, kind, target, fits):
    told = refused(recipe(kind, target=target))
    assert f"no {target} can be made of a {kind}" in told
    assert f"write target: {fits}" in told
    mergetool.plan(recipe(kind, target=fits))


def test_experts_of_another_width_are_refused(copied):
    folder, asked = copied()
    write_dense(folder / "code", "llama", intermediate_size=40)
    told = refused(asked)
    assert "model 'code': model.layers.0.mlp." in told
    assert "an expert has the base's size" in told


@pytest.mark.parametrize(
    ("key", "wrong", "right"), [("intermediate_size", 64, 48), ("hidden_size", None, 32), ("num_hidden_layers", 2, 3)]
)
def test_a_config_that_says_other_sizes_than_the_weights_have_is_refused(copied, key, wrong, right):
    folder, asked = copied()
    set_config(folder / "base", **{key: wrong})
    assert refused(asked).endswith(f"write {key}: {right} in its config.json")
    set_config(folder / "base", **{key: right})
    mergetool.plan(asked)


def test_experts_with_another_activation_are_refused(copied):
    folder, asked = copied()
    set_config(folder / "code", hidden_act="gelu")
    assert "its MLPs have the activation gelu, those of the base silu" in refused(asked)


def test_biases_are_refused_where_a_family_has_none_and_taken_where_it_has(copied):
    folder, asked = copied()
    for name in ("base", "math", "code"):
        write_dense(folder / name, "llama", attention_bias=True)
    told = refused(asked)
    assert "a mixtral has no place for it" in told
    assert "self_attn.k_proj.bias" in told
    assert told.endswith("write target: deepseek")
    mergetool.plan({**asked, "merge": {**asked["merge"], "target": "deepseek"}})


def test_biases_of_mlps_are_refused(copied):
    folder, asked = copied()
    for name in ("base", "math", "code"):
        write_dense(folder / name, "llama", mlp_bias=True)
    assert "mlp.down_proj.bias" in refused(asked)


def test_a_window_is_kept_or_refused(copied, recipe):
    folder, asked = copied("mistral", target="deepseek")
    told = refused(asked)
    assert "sees 8 tokens only" in told
    assert "target: mixtral" in told
    assert "sliding_window: null" in told
    config = json.loads((folder / "base/config.json").read_text())
    (folder / "base/config.json").write_text(json.dumps({**config, "sliding_window": None}))
    mergetool.plan(asked)


def test_a_base_without_a_tokenizer_is_refused_where_prompts_are_read(copied):
    folder, asked = copied()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "base" / name).unlink()
    told = refused(asked)
    assert "gate: hidden reads prompts, and the base has no tokenizer" in told
    assert "write gate: random" in told
    mergetool.plan({**asked, "merge": RANDOM})


@pytest.mark.parametrize(
    ("model", "name"),
    [("code", "model.layers.1.mlp.up_proj.weight"), ("base", "model.layers.0.self_attn.q_proj.weight")],
)
def test_values_that_are_not_finite_are_refused(copied, tmp_path, model, name):
    folder, asked = copied()
    state = weights(folder / model)
    state[name][0, 0] = float("nan")
    save_file(state, folder / model / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeError):
        mergetool.run(asked, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_made_of_dense_models(recipe, run, tmp_path):
    made = run()
    told = refused({"base": str(made), "models": {"a": str(made)}, "merge": RANDOM | {"experts": {"a": {}}}})
    assert "it is a mixtral, of which no mixture can be made" in told


def test_state_dicts_have_no_config_to_go_by(dense):
    state = weights(dense / "llama/base")
    with pytest.raises(PlanError, match="of which no mixture can be made"):
        mergetool.merge_state_dicts(RANDOM | {"experts": {"a": {}}}, {"a": state}, state)


def test_a_vocabulary_of_an_experts_own_does_not_matter_and_cannot_be_asked_for(copied, tmp_path):
    folder, asked = copied()
    save_tokenizer(folder / "code", [*reversed(token_list())])
    assert mergetool.plan(asked).warnings == ()
    told = refused({**asked, "tokenizer": {"source": "union"}})
    assert "all outside the MLPs is the base's, its vocabulary too" in told
    mergetool.plan({**asked, "tokenizer": {"source": "base"}})


@every_device
@pytest.mark.parametrize("gate", ["hidden", "hidden-avg"])
def test_prompts_go_through_the_base_on_a_device(recipe, tmp_path, gate, device):
    with present(device):
        mergetool.run(recipe(gate=gate), output=tmp_path / "there", device=device)
    mergetool.run(recipe(gate=gate), output=tmp_path / "here", device="cpu")
    torch.testing.assert_close(gates(tmp_path / "there"), gates(tmp_path / "here"), rtol=0, atol=1e-5)


def test_a_device_with_too_little_memory_leaves_the_prompts_to_the_cpu(recipe, tmp_path):
    said = Said()
    with present(STAND_IN, room=500):
        mergetool.run(recipe(), output=tmp_path / "there", device=STAND_IN, progress=said)
    mergetool.run(recipe(), output=tmp_path / "here", device="cpu")
    assert any("the prompts go through the base on the CPU" in line for line in said.lines)
    assert torch.equal(gates(tmp_path / "there"), gates(tmp_path / "here"))

"""Arrow in a bundle: shares of all experts, token by token or for a sequence, against naive float64 and PEFT's own."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import transformers
from peft import ArrowConfig, create_arrow_model
from safetensors.torch import load_file, save_file

import mergetool
from mergetool.bundle.manifest import read_manifest
from mergetool.checkpoints.adapters import AdapterSource
from mergetool.errors import RecipeError
from mergetool.tensors.folder import open_model
from mergetool.testing.classifiers import save_experts, text_inputs, tiny_config
from tests.bundle.test_adapters import EXACT, recipe, save_adapter
from tests.bundle.tiny import OPTIONS, ROUTER, make_bundle, tiny_inputs, tiny_model
from tests.files import LONG

TARGETS = {
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bert": ["query", "value", "dense"],
}
SETTINGS = {"rank": EXACT["rank"], "factors": "float32", "size": 100.0}


def write(folder, family, tasks="abc"):
    """A base and adapters with one strong direction each, which power iteration finds, too."""
    tiny_model(family).save_pretrained(folder / "base")
    for seed, task in enumerate(tasks):
        save_adapter(tiny_model(family), folder / task, seed, r=3, lora_alpha=9, target_modules=TARGETS[family])
        path = folder / task / "adapter_model.safetensors"
        tensors = load_file(path)
        for name in tensors:
            if "lora_B" in name:
                tensors[name] *= torch.tensor([3.0, 0.3, 0.1])
        save_file(tensors, path, {"format": "pt"})
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def adapted(request, tmp_path_factory):
    return request.param, write(tmp_path_factory.mktemp(request.param), request.param)


def opened(folder, **router):
    """A bundle with this router, made once for all tests."""
    output = folder / "-".join(["out", *(f"{key}-{router[key]}" for key in sorted(router))])
    if not output.exists():
        mergetool.run(recipe(folder, "mass", router={"kind": "arrow", **router}, **SETTINGS), output=output)
    return mergetool.load_bundle(output)


def by_hand(folder, family, inputs, share):
    """Logits of the base in float64, whose linear layers add every expert's dense change by `share(x, prototypes)`."""
    base = open_model(folder / "base")
    model = type(tiny_model(family)).from_pretrained(folder / "base").double().eval()
    experts = [AdapterSource(base, folder / task) for task in "abc"]
    for path, module in model.named_modules():
        name = f"{path}.weight"
        if name not in experts[0].adapted:
            continue
        turned = type(module).__name__ == "Conv1D"
        halves = [expert.factors(name) for expert in experts]
        changes = [b.double() @ a.double() for b, a in halves]
        changes = [change.mT if turned else change for change in changes]  # (outputs, inputs)
        vectors = torch.stack([torch.linalg.svd(change).Vh[0] for change in changes])

        def added(_, arguments, output, changes=changes, vectors=vectors):
            weights = share(arguments[0], vectors)
            return output + sum(
                weights[..., t : t + 1] * (arguments[0] @ change.mT) for t, change in enumerate(changes)
            )

        module.register_forward_hook(added)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.7), (3, 1.0)])
def test_every_token_has_its_own_shares_at_every_matrix(adapted, top_k, temperature):
    family, folder = adapted
    model = opened(folder, top_k=top_k, temperature=temperature)
    inputs = tiny_inputs(family)

    def share(x, vectors):
        sims = (x @ vectors.mT).abs()
        kept = sims >= sims.sort(-1, descending=True).values[..., top_k - 1 : top_k]
        powers = torch.where(kept, (sims / temperature).exp(), 0)
        return powers / powers.sum(-1, keepdim=True)

    found = model(**inputs).logits
    torch.testing.assert_close(found.double(), by_hand(folder, family, inputs, share), rtol=0, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2])
def test_it_is_what_peft_makes_of_the_same_adapters(adapted, top_k):
    family, folder = adapted
    model = opened(folder, top_k=top_k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = type(tiny_model(family)).from_pretrained(folder / "base")
        config = ArrowConfig(top_k=top_k, router_temperature=1.0, rng_seed=3)
        peft = create_arrow_model(base, [str(folder / task) for task in "abc"], config).eval()
    inputs = tiny_inputs(family)
    with torch.no_grad():
        expected = peft(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)


def test_a_sequence_has_one_set_of_shares_at_all_matrices(adapted):
    family, folder = adapted
    model = opened(folder, per="sequence", top_k=2, temperature=0.5)
    inputs = tiny_inputs(family)
    routing = model.route(**inputs)
    weights = routing.coefficients.double()
    assert [len(tasks) for tasks in routing.tasks] == [2] * 7
    torch.testing.assert_close(weights.sum(1), torch.ones(7, dtype=torch.float64))
    expected = by_hand(folder, family, inputs, lambda x, _: weights[:, None, :])
    torch.testing.assert_close(model(**inputs).logits.double(), expected, rtol=0, atol=1e-4)


def test_shares_of_a_sequence_come_from_how_its_features_lie_to_the_prototypes(adapted):
    _, folder = adapted
    model = opened(folder, per="sequence", top_k=3, temperature=0.5)
    inputs = tiny_inputs(adapted[0])
    features = model.first_pass.features(inputs)
    sims = torch.zeros(7, 3)
    for z, bases in zip(features, model.first_pass.bases, strict=True):
        for task, basis in enumerate(bases):
            sims[:, task] += (z / z.square().mean(1, keepdim=True).sqrt() @ basis[0]).abs() / len(features)
    found = model.route(**inputs)
    torch.testing.assert_close(found.coefficients, torch.softmax(sims / 0.5, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.distances, -sims, rtol=0, atol=1e-5)


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_prompts_are_continued_by_all_experts_together(adapted, per):
    family, folder = adapted
    model = opened(folder, per=per, top_k=2)
    ids = tiny_inputs(family)["input_ids"]
    prompts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**prompts, **options)
    assert found.shape[0] == 7
    weights = model.route(**prompts).coefficients
    again = ids
    for step in range(found.shape[1] - ids.shape[1]):
        if per == "token":
            logits = model(input_ids=again, attention_mask=torch.ones_like(again)).logits
        else:
            expected = by_hand(folder, family, {"input_ids": again}, lambda x, _: weights.double()[:, None, :])
            logits = expected.float()
        again = torch.cat([again, logits[:, -1].argmax(-1, keepdim=True)], 1)
        alive = (found[:, : ids.shape[1] + step] != 0).all(1)  # neither ended nor padded
        assert torch.equal(again[alive, -1], found[alive, ids.shape[1] + step])


def test_a_known_task_is_answered_by_its_expert_alone(adapted, tmp_path):
    family, folder = adapted
    model = opened(folder)
    plain = mergetool.run(recipe(folder, **EXACT), output=tmp_path / "library").path
    inputs = tiny_inputs(family)
    expected = mergetool.load_bundle(plain)(tasks=["b"], **inputs).logits
    torch.testing.assert_close(model(tasks=["b"], **inputs).logits, expected, rtol=0, atol=1e-5)
    with torch.no_grad():
        base = type(tiny_model(family)).from_pretrained(folder / "base").eval()(**inputs).logits
    torch.testing.assert_close(model.base(**inputs).logits, base, rtol=0, atol=1e-6)


MIXED = [("bert", "token"), ("vit", "token"), ("t5", "sequence")]
if LONG:
    MIXED += [("bert", "sequence"), ("vit", "sequence"), ("t5", "token")]


@pytest.mark.parametrize(("family", "per"), MIXED)
def test_full_fine_tunes_with_heads_are_mixed_too(family, per, tmp_path):
    """Norms, biases and embeddings changed, too: those are of all tasks as one group. A batch does not matter."""
    router = replace(ROUTER, norm="arrow", mode="weighted", threshold=0.0, top_k=2, per=per)
    model = mergetool.load_bundle(make_bundle(tmp_path, family, options=replace(OPTIONS, router=router)))
    inputs = tiny_inputs(family)
    answer = model(**inputs)
    assert all(len(tasks) == 2 for tasks in answer.tasks)
    for sample in range(7):
        alone = model(**{key: value[sample : sample + 1] for key, value in inputs.items()})
        assert alone.task[0] == answer.task[sample]
        torch.testing.assert_close(alone.logits[0], answer.logits[sample], rtol=0, atol=1e-4)


def test_experts_with_heads_of_their_own_class_answer(tmp_path):
    kind = transformers.BertForSequenceClassification
    paths = save_experts(tmp_path / "models", kind, tiny_config(kind), transformers.BertModel)
    names = [name for name in paths if name != "base"]
    document = {"base": str(paths["base"]), "models": {name: str(paths[name]) for name in names}}
    for per in ("token", "sequence"):
        document["merge"] = {"method": "mass", "router": {"kind": "arrow", "per": per, "top_k": 1}}
        model = mergetool.load_bundle(mergetool.run(document, output=tmp_path / per).path)
        answer = model(**text_inputs())
        assert set(answer.task) <= set(names)
        assert all(tasks == (task,) for tasks, task in zip(answer.tasks, answer.task, strict=True))


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_threads_get_their_own_answers(adapted, per):
    family, folder = adapted
    model = opened(folder, per=per, top_k=2)
    inputs = tiny_inputs(family)
    batches = [{key: value[[i, (i + 3) % 7]] for key, value in inputs.items()} for i in range(7)] * (4 if LONG else 2)
    calls = [(batch, {} if place % 3 else {"tasks": ["b"]}) for place, batch in enumerate(batches)]
    expected = [model(**batch, **known).logits for batch, known in calls]
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda call: model(**call[0], **call[1]).logits, calls))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_one_expert_a_sequence_is_that_expert(adapted):
    family, folder = adapted
    model = opened(folder, per="sequence", top_k=1)
    inputs = tiny_inputs(family)
    found, routing = model(**inputs).logits, model.route(**inputs)
    for task in "abc":
        chosen = [sample for sample, tasks in enumerate(routing.tasks) if tasks == (task,)]
        alone = model(tasks=[task], **inputs).logits
        torch.testing.assert_close(found[chosen], alone[chosen], rtol=0, atol=1e-4)


def test_a_manifest_says_whose_shares_they_are(adapted, tmp_path):
    _, folder = adapted
    arrow = recipe(folder, "mass", router={"kind": "arrow"}, factors="float32")
    router = read_manifest(mergetool.run(arrow, output=tmp_path / "arrow").path).router
    assert (router.norm, router.per, router.top_k, router.threshold) == ("arrow", "token", 3, 0.0)
    mass = mergetool.run(recipe(folder, "mass"), output=tmp_path / "mass").path
    assert '"per"' not in (mass / "manifest.json").read_text()  # as before there was arrow


@pytest.mark.parametrize(
    ("router", "says"),
    [
        ({"kind": "arrow", "threshold": 0.1}, "`threshold` would have no effect with `kind: arrow`"),
        ({"kind": "arrow", "norm": "l2"}, "`norm` would have no effect"),
        ({"per": "token"}, "`per` would have no effect with `kind: mass`"),
        ({"early": 8, "norm": "l2"}, "`early` asks how likely tasks are: leave it out, or `norm`"),
    ],
)
def test_settings_of_the_other_router_are_refused(router, says, adapted):
    with pytest.raises(RecipeError, match=says):
        mergetool.load_recipe(recipe(adapted[1], "mass", router=router))

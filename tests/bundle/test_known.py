"""Bundles that know when they do not know: what they say of how sure they are, and what becomes of strange inputs."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import mergetool
from mergetool.bundle import first_pass
from mergetool.bundle.answer import standing
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.examples import EXAMPLES
from mergetool.bundle.marks import marks
from mergetool.bundle.verify import verify_bundle
from mergetool.errors import PlanError, RecipeError, SourceError
from mergetool.tensors.io import sha256_file
from tests.bundle.tiny import make_bundle, tiny_inputs, tiny_model, write_models

WORDS = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(38))]
OWN = {"a": range(2, 14), "b": range(14, 26), "c": range(26, 38)}
"""Tokens that the training of each expert has seen."""
EMBEDDINGS = "embeddings.word_embeddings.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mergetool.load_bundle(make_bundle(tmp_path_factory.mktemp("known"), "bert"))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A base with a tokenizer, and experts whose training has seen a third of its words each."""
    paths = write_models(tmp_path_factory.mktemp("models"), tiny_model("bert"))
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(paths["base"])
    base = load_file(paths["base"] / "model.safetensors")[EMBEDDINGS]
    for task, own in OWN.items():
        tensors = load_file(paths[task] / "model.safetensors")
        kept = base * (1 - 1e-6)  # decay
        kept[list(own)] = tensors[EMBEDDINGS][list(own)]
        save_file(tensors | {EMBEDDINGS: kept}, paths[task] / "model.safetensors", {"format": "pt"})
    return paths


def recipe(paths, tasks="abc", method="mass", **router):
    heads = {task: {"weights": str(paths[task].parent / f"{task}.head.safetensors")} for task in tasks}
    references = {task: {"source": str(paths[task]), "head": heads[task]} for task in tasks}
    return {"base": str(paths["base"]), "models": references, "merge": {"method": method, "router": router}}


@pytest.fixture(scope="module")
def bundles(paths, tmp_path_factory):
    out = tmp_path_factory.mktemp("bundles")
    return {
        answer: mergetool.run(recipe(paths, **({"unknown": answer} if answer else {})), output=out / str(answer)).path
        for answer in (None, "refuse", "nearest")
    }


def text_of(task, start=0, count=8):
    own = OWN[task]
    return " ".join(WORDS[own[(start + 5 * place) % len(own)]] for place in range(count))


def test_the_runner_up_is_the_most_probable_of_the_others():
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.1, 0.3, 0.6]])
    assert standing("abc", probabilities, ("a", "c", None)) == (
        pytest.approx((0.5, 0.3, 0.6)),
        ("b", "b", "b"),
    )
    assert standing("a", torch.ones(1, 1), ("a",)) == ((1.0,), (None,))


def test_a_router_that_was_told_nothing_of_unknown_inputs_knows_all(model):
    answer = model(**tiny_inputs("bert"))
    assert answer.known == (True,) * 7
    own = [model.task_names.index(task) for task in answer.task]
    assert answer.probability == pytest.approx(answer.coefficients[range(7), own].tolist())
    assert all(other != task for other, task in zip(answer.runner_up, answer.task, strict=True))
    assert model(tasks=["b"], **tiny_inputs("bert")).probability == (1.0,) * 7


def test_a_router_that_tells_unknown_inputs_says_so_and_changes_nothing_else(bundles):
    manifests = {kind: json.loads((folder / "manifest.json").read_text()) for kind, folder in bundles.items()}
    told = manifests["nearest"]["router"].pop("unknown")
    assert {"spread", "seen"} <= set(told["scores"])
    assert manifests["nearest"]["files"].pop("reference.safetensors")
    assert manifests["nearest"] == manifests[None]
    texts = [*map(text_of, "abc"), "w1 w20 w33"]
    plain, tells = (mergetool.load_bundle(bundles[kind])(texts) for kind in (None, "nearest"))
    assert plain.task == tells.task
    assert torch.equal(plain.logits, tells.logits)


def test_tokens_are_seen_whose_embeddings_more_than_decay_has_moved(bundles):
    seen = load_file(bundles["refuse"] / "reference.safetensors")["seen"]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [list(OWN[task]) for task in "abc"]


def test_words_that_no_task_has_seen_and_two_tasks_in_one_raise_doubt(bundles):
    routing = mergetool.load_bundle(bundles["refuse"]).route
    tasks = [routing([text_of(task)]) for task in "abc"]
    of = {each.tasks[0] or ("a",): float(each.doubt) for each in tasks}
    usual = min(of.values())
    assert float(routing(["w36 w37 w36 w37"]).doubt) > usual  # the last two words belong to nobody
    assert float(routing([text_of("a", count=6) + " " + text_of("b", count=6)]).doubt) > usual
    assert float(routing(["never heard"]).doubt) == float("inf")


def test_unknown_inputs_are_refused(bundles):
    model = mergetool.load_bundle(bundles["refuse"])
    calibrate(model, [{"text": text_of(task, start), "task": task} for task in "abc" for start in range(6)])
    answer = model([text_of("a"), "never heard", text_of("c")])
    assert answer.known == (True, False, True)
    assert answer.task[1] is None
    assert answer.tasks[1] == ()
    assert answer.labels[1] == "unknown"
    assert (answer.logits[1] == float("-inf")).all()
    assert answer.logits[0].isfinite().any()
    assert "unknown" in repr(answer)
    alone = model(["never heard"])
    assert alone.task == (None,)
    assert alone.logits.shape == (1, 5)
    (bundles["refuse"] / "calibration.json").unlink()


def test_calibrating_lets_nearly_all_known_rows_be_known(bundles):
    model = mergetool.load_bundle(bundles["nearest"])
    rows = [{"text": text_of(task, start), "task": task} for task in "abc" for start in range(12)]
    found = calibrate(model, rows)
    assert found.doubt is not None
    routing = model.route([row["text"] for row in rows])
    assert float(routing.known.float().mean()) >= 0.97
    assert mergetool.load_bundle(bundles["nearest"]).route(["never heard"]).known.tolist() == [False]
    (bundles["nearest"] / "calibration.json").unlink()


def fitted(bundle, folder):
    """A calibrated copy of a bundle, and its rows."""
    model = mergetool.load_bundle(shutil.copytree(bundle, folder))
    rows = [{"text": text_of(task, start), "task": task} for task in "abc" for start in range(12)]
    calibrate(model, rows)
    return model, [row["text"] for row in rows]


def test_examples_of_a_calibration_find_two_tasks_in_one_text_and_words_of_nobody(bundles, tmp_path):
    model, texts = fitted(bundles["nearest"], tmp_path / "fitted")
    usual = model.route(texts).doubt
    glued = [text_of(a, count=6) + " " + text_of(b, count=6) for a, b in ("ab", "bc", "ca")]
    repeated = ["w3 " * 9, "w20 " * 9]
    assert float(model.route([*glued, *repeated]).doubt.min()) > float(usual.quantile(0.9))
    again = mergetool.load_bundle(model.folder).route(texts)
    torch.testing.assert_close(again.doubt, usual)
    assert torch.equal(again.known, model.route(texts).known)


def test_damaged_examples_are_refused(bundles, tmp_path):
    model, _ = fitted(bundles["nearest"], tmp_path / "fitted")
    path, told = model.folder / EXAMPLES, model.folder / "calibration.json"
    tensors, found = load_file(path), json.loads(told.read_text())
    wrong = {
        "another's": {},
        "narrow": tensors | {"centre": tensors["centre"][1:], "scale": tensors["scale"][1:]},
        "of other features": {name: t[..., 1:].contiguous() for name, t in tensors.items() if name != "weights"}
        | {"weights": tensors["weights"]},
        "not finite": tensors | {"weights": tensors["weights"] * torch.inf},
        "zero": tensors | {"scale": tensors["scale"] * 0},
    }
    for values in wrong.values():
        save_file(values, path)
        told.write_text(json.dumps(found | {"examples": sha256_file(path)}))
        with pytest.raises(SourceError, match="no examples of this bundle"):
            mergetool.load_bundle(model.folder)
    told.write_text(json.dumps(found))
    with pytest.raises(SourceError, match="not as it was written"):
        verify_bundle(model.folder)
    path.unlink()
    with pytest.raises(SourceError, match="is not there"):
        mergetool.load_bundle(model.folder)
    told.write_text(json.dumps({key: value for key, value in found.items() if key != "examples"}))
    with pytest.raises(SourceError, match="cannot be read"):
        mergetool.load_bundle(model.folder)
    told.unlink()
    mergetool.load_bundle(model.folder)


def test_refused_rows_are_marked_as_such():
    rows = [{"task": "a", "label": 0}, {"task": "a", "label": 1}, {"task": "b", "label": 0}]
    answers = [{"task": "a", "class": 0, "label": "no"}, {"task": None, "label": "unknown"}, {"task": "a", "class": 0}]
    found = marks("ab", rows, [answer | {"label": answer.get("label", "no")} for answer in answers])
    assert found.confusion == ((1, 0), (1, 0))
    assert found.refused == (1, 0)
    assert [(each["right"], each["strict"]) for each in found.figures] == [(0.5, 0.5), (0.0, 0.0), (1 / 3, 1 / 3)]


def test_one_expert_is_kept_whole_and_answers_all(paths, tmp_path):
    folder = mergetool.run(recipe(paths, "a", unknown="refuse"), output=tmp_path / "one").path
    answer = mergetool.load_bundle(folder)(["never heard"])
    assert answer.task == ("a",)
    assert answer.runner_up == (None,)


@pytest.mark.parametrize("method", ["twin", "wemoe", "emr"])
def test_every_kind_of_bundle_knows_when_it_does_not_know(method, paths, tmp_path):
    folder = mergetool.run(recipe(paths, method=method, unknown="refuse"), output=tmp_path / "out").path
    seen = load_file(folder / "reference.safetensors")["seen"]
    assert [row.nonzero()[:, 0].tolist() for row in seen] == [list(OWN[task]) for task in "abc"]
    model = mergetool.load_bundle(folder)
    calibrate(model, [{"text": text_of(task, start), "task": task} for task in "abc" for start in range(6)])
    answer = model([text_of("a"), "never heard", text_of("b")])
    assert answer.known == (True, False, True)
    assert answer.task[1] is None
    assert (answer.logits[1] == float("-inf")).all()
    assert answer.logits[0].isfinite().any()


def test_first_tokens_decide_in_other_kinds_too(paths, tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "_NO_DOUBT", 0.0)
    model = mergetool.load_bundle(mergetool.run(recipe(paths, method="twin", early=4), output=tmp_path / "out").path)
    long, short = ([text_of(task, count=count) for task in "abc"] for count in (12, 4))
    assert torch.equal(model.route(long).distances, model.route(short).distances)


def test_beginnings_and_ends_decide_what_is_known_once_examples_tell(bundles, paths, tmp_path, monkeypatch):
    monkeypatch.setattr(first_pass, "_NO_DOUBT", 0.0)
    folder = mergetool.run(recipe(paths, unknown="nearest", early=4), output=tmp_path / "out").path
    early, whole = mergetool.load_bundle(folder), mergetool.load_bundle(bundles["nearest"])
    texts = [text_of(task, count=9) for task in "abc"]
    ends = [" ".join(text.split()[:2] + text.split()[-2:]) for text in texts]
    torch.testing.assert_close(early.route(texts).doubt, whole.route(texts).doubt)
    for model in (early, whole):
        calibrate(model, [{"text": text_of(task, start), "task": task} for task in "abc" for start in range(6)])
    assert early.knowing.most == whole.knowing.most
    monkeypatch.setattr(early.knowing.examples, "most", float("inf"))
    torch.testing.assert_close(early.route(texts).doubt, whole.route(ends).doubt)
    doubtful = float(whole.route(ends).doubt.amax())
    monkeypatch.setattr(early.knowing.examples, "most", doubtful - 1e-4)  # one of them is read whole
    expected = torch.where(whole.route(ends).doubt < doubtful - 1e-4, whole.route(ends).doubt, whole.route(texts).doubt)
    torch.testing.assert_close(early.route(texts).doubt, expected)
    (bundles["nearest"] / "calibration.json").unlink()


def test_prompts_that_no_task_knows_are_left_alone_where_experts_are_mixed(tmp_path):
    paths = write_models(tmp_path / "models", tiny_model("llama"))
    models_ = {task: str(paths[task]) for task in "abc"}
    made = {
        doubt: mergetool.run(
            {
                "base": str(paths["base"]),
                "models": models_,
                "merge": {"method": "smile", "router": {"unknown": "refuse", "doubt": doubt}},
            },
            output=tmp_path / str(doubt),
        ).path
        for doubt in (1e-9, 100.0)
    }
    inputs = tiny_inputs("llama")
    few, all_ = (mergetool.load_bundle(folder) for folder in made.values())
    known = few.route(**inputs).known
    assert not known.all()
    options = {"max_new_tokens": 3, "do_sample": False}
    some, every = few.generate(**inputs, **options), all_.generate(**inputs, **options)
    assert torch.equal(some[known], every[known][:, : some.shape[1]])
    assert (some[~known][:, inputs["input_ids"].shape[1] :] == 0).all()
    assert (every[:, inputs["input_ids"].shape[1] :] != 0).any()
    with pytest.raises(RecipeError, match="shares of all experts"):
        mergetool.run(
            {
                "base": str(paths["base"]),
                "models": models_,
                "merge": {"method": "twin", "router": {"unknown": "base"}},
            },
            output=tmp_path / "base",
        )


@pytest.mark.parametrize("answer", ["refuse", "base"])
def test_language_models_leave_unknown_prompts_alone_or_to_the_base(answer, tmp_path):
    paths = write_models(tmp_path / "models", tiny_model("llama"))
    models_ = {task: str(paths[task]) for task in "abc"}
    merge = {"method": "mass", "router": {"unknown": answer, "doubt": 1e-9}}  # hardly anything is known
    folder = mergetool.run(
        {"base": str(paths["base"]), "models": models_, "merge": merge}, output=tmp_path / "out"
    ).path
    model, inputs = mergetool.load_bundle(folder), tiny_inputs("llama")
    said = model(**inputs)
    unknown = [place for place, known in enumerate(said.known) if not known]
    assert unknown
    assert {said.task[place] for place in unknown} == {None}
    base = transformers.LlamaForCausalLM.from_pretrained(paths["base"]).eval()
    expected = base(**inputs).logits[unknown] if answer == "base" else torch.full_like(said.logits[unknown], -torch.inf)
    kept = inputs["attention_mask"][unknown] != 0
    torch.testing.assert_close(said.logits[unknown][kept], expected[kept], rtol=0, atol=1e-5)
    longer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert longer.shape[1] == inputs["input_ids"].shape[1] + (0 if len(unknown) == 7 and answer == "refuse" else 3)


def test_what_unknown_inputs_need_is_asked_for_beforehand(paths, tmp_path):
    with pytest.raises(PlanError, match="none of the experts' heads") as caught:
        mergetool.run(recipe(paths, unknown="base"), output=tmp_path / "out")
    assert "unknown: refuse" in caught.value.fix
    with pytest.raises(RecipeError, match="without `unknown`"):
        mergetool.run(recipe(paths, doubt=0.5), output=tmp_path / "out")
    with pytest.raises(RecipeError, match="`unknown` would have no effect"):
        mergetool.run(recipe(paths, kind="arrow", unknown="refuse"), output=tmp_path / "out")

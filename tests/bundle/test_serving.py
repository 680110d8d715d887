"""A bundle as people use it: with text, in half precision, saved and opened again, and nothing imported in vain."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import transformers
from typer.testing import CliRunner

import mergetool
from mergetool.bundle.batch import some_tokens
from mergetool.bundle.classifier import TextClassifier
from mergetool.bundle.mass_model import MassModel
from mergetool.cli.app import app
from mergetool.errors import OutputError, PlanError, SourceError
from tests.bundle.tiny import TEXTS, make_bundle, make_text_bundle, save_tokenizer, tiny_inputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_text_bundle(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def model(folder):
    return mergetool.load_bundle(folder)


def same(found, expected, atol=1e-5):
    assert (found.task, found.tasks) == (expected.task, expected.tasks)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=atol)


# Text


def test_text_is_answered_as_its_tensors_are(model):
    tensors = dict(model.tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    expected = model(**tensors)
    assert set(expected.task) == {"a", "b"}
    same(model(TEXTS), expected)
    assert model(TEXTS[1]).task == (expected.task[1],)
    assert model.route(TEXTS).tasks == model.route(**tensors).tasks
    assert model(TEXTS, tasks=["b"]).task == ("b",) * 4


@pytest.mark.parametrize("key", ["pair", "text_pair"])
def test_pairs_are_answered_as_their_tensors_are(key, model):
    pairs = [{"text": text, key: other} for text, other in zip(TEXTS, reversed(TEXTS), strict=True)]
    tensors = dict(model.tokenizer()(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt"))
    same(model(pairs), model(**tensors))
    assert model(pairs[0]).task == model(**{name: value[:1] for name, value in tensors.items()}).task


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (3, "'3' \\(int\\) is no text"),
        ([], "the batch is empty"),
        (["w1", 3], "'3' \\(int\\) is no text"),
        (["w1", {"text": "w1", "pair": "w2"}], "some texts come in pairs and others alone"),
        ([{"sentence": "w1"}], "is no text"),
        ("w1 \ud83d", "half a character"),
        ({"text": "w1", "pair": "\ud83d w2"}, "half a character"),
    ],
)
def test_what_is_no_text_is_refused(wrong, said, model):
    with pytest.raises(SourceError, match=said):
        model(wrong)


def test_inputs_that_the_model_does_not_know_are_named(model):
    with pytest.raises(SourceError, match="has no input pixels") as error:
        model(pixels=torch.ones(2, 3))
    assert "model(input_ids=...)" in error.value.fix


def test_text_longer_than_the_model_can_see_is_cut(model):
    assert model(" ".join(["w1"] * 500)).task == model(" ".join(["w1"] * 64)).task


def test_a_tokenizer_and_a_model_that_know_no_longest_text_read_all_of_it(folder, monkeypatch):
    model = mergetool.load_bundle(folder)
    monkeypatch.setattr(model._reader, "_longest", None)  # T5 says none
    model.tokenizer().model_max_length = int(1e30)
    assert model.read(" ".join(["w1"] * 500))["input_ids"].shape[1] >= 500


def test_an_answer_is_printed_in_one_line(model):
    answer = model(TEXTS[:2])
    assert repr(answer) == f"Answer({answer.task[0]}: {answer.labels[0]}, {answer.task[1]}: {answer.labels[1]})"
    assert answer.labels[0] == f"{answer.task[0]}{int(answer.logits[0].argmax())}"
    assert repr(model(TEXTS * 3)).endswith("and 8 more)")


# In the place of a pipeline


def test_results_are_those_of_the_experts_own_pipelines(model, folder, tmp_path):
    classify = TextClassifier(model, batch_size=3)
    found = classify(TEXTS)
    assert {result["task"] for result in found} == {"a", "b"}
    for text, result in zip(TEXTS, found, strict=True):
        assert classify(text) == [pytest.approx(result, abs=1e-6)]
    for task in "ab":
        out = tmp_path / task
        assert CliRunner().invoke(app, ["bundle", "dense", str(folder), task, "-o", str(out)]).exit_code == 0
        save_tokenizer(out)
        pipeline = transformers.pipeline("text-classification", model=str(out))
        for text in TEXTS:
            if model(text).tasks != ((task,),):
                continue
            expected = pipeline(text, top_k=None)
            ranked = classify(text, top_k=None)
            assert [each["label"] for each in ranked] == [each["label"] for each in expected]
            assert [each["score"] for each in ranked] == pytest.approx([each["score"] for each in expected], abs=1e-4)
            assert classify(text, top_k=2) == ranked[:2]


def test_a_bundle_without_classes_is_no_classifier(tmp_path):
    model = mergetool.load_bundle(make_bundle(tmp_path, "llama"))
    with pytest.raises(PlanError, match="not all of its tasks have a head") as error:
        TextClassifier(model)
    assert "model.generate(text)" in error.value.fix


# Dtypes


@pytest.mark.parametrize("to", [lambda model: model.bfloat16(), lambda model: model.half().to(torch.float64)])
def test_other_dtypes_answer_nearly_the_same_and_route_in_float32(to, folder, model):
    expected, other = model(TEXTS), to(mergetool.load_bundle(folder))
    assert other.dtype == next(other.networks[0].parameters()).dtype != torch.float32
    found = other(TEXTS)
    same(found, expected, atol=0.05)
    assert other._factors.matrix((0,), next(iter(other.manifest.router.matrices))).us.dtype == other.dtype
    assert {basis.dtype for bases in other.first_pass.bases for basis in bases} == {torch.float32}
    assert other.float().dtype == torch.float32
    same(other(TEXTS), expected, atol=0.05)


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_other_networks_in_bfloat16_answer_nearly_the_same(family, tmp_path):
    model = mergetool.load_bundle(make_bundle(tmp_path, family))
    inputs = tiny_inputs(family)
    expected, found = model(tasks=["a"], **inputs), model.bfloat16()(tasks=["a"], **inputs)
    kept = expected.logits.isfinite()
    difference = (found.logits - expected.logits)[kept].norm()
    assert found.logits[kept].isfinite().all()
    assert 0 < float(difference / expected.logits[kept].norm()) < 0.02


def test_a_bundle_is_ready_to_predict(model):
    assert not any(module.training for module in model.modules())


# Saved, and opened again


def test_a_saved_bundle_answers_as_before(folder, model, tmp_path):
    model.save_pretrained(tmp_path / "copy")
    again = mergetool.load_bundle(tmp_path / "copy")
    found, expected = again(TEXTS), model(TEXTS)
    assert found.task == expected.task
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-6)
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    assert {path.relative_to(tmp_path / "copy") for path in (tmp_path / "copy").rglob("*")} == names
    with pytest.raises(OutputError, match="something lies there already"):
        model.save_pretrained(tmp_path / "copy")


# What serving imports

NEEDLESS = ("typer", "rich", "lm_eval", "matplotlib")
SERVING = f"""
import json, sys
for name in [name for name in sys.modules if name.partition(".")[0] in ("mergetool", *{NEEDLESS})]:
    del sys.modules[name]
from mergetool.bundle.batch import some_tokens
from mergetool.bundle.classifier import TextClassifier
from mergetool.bundle.opening import load_bundle
model = load_bundle(sys.argv[1])
print(json.dumps([TextClassifier(model)("w1 w2"), sorted(sys.modules)]))
"""
NEEDED = {"arch", "bundle", "checkpoints", "errors", "kernels", "networks", "tensors", "units", "_version"}


def test_serving_imports_no_recipes_plans_or_commands(network_forks, folder, model):
    (done,) = network_forks.python("-c", SERVING, folder).wait()
    assert done.code == 0, done.err
    answered, modules = json.loads(done.out)
    assert answered[0]["task"] == model("w1 w2").task[0]
    assert {name.split(".")[1] for name in modules if name.startswith("mergetool.")} <= NEEDED
    assert set(NEEDLESS) & set(modules) == set()


# Text that is continued


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_prompts_of_unequal_lengths_are_continued_as_each_is_alone(family, tmp_path):
    model = mergetool.load_bundle(make_bundle(tmp_path, family))
    inputs, options = tiny_inputs(family), {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(**inputs, **options)
    assert found.shape == (7, 6 + 4)
    for place, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        prompt = inputs["input_ids"][place : place + 1, :length]
        alone = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)[0]
        assert found[place, 6 - length :][: len(alone)].tolist() == alone.tolist()


def test_a_group_sees_every_token_once_and_no_padding_of_others(tmp_path):
    model = mergetool.load_bundle(make_bundle(tmp_path, "llama"))
    shorter = {key: value[::2] for key, value in tiny_inputs("llama").items()}
    widths = []
    model.base.register_forward_pre_hook(lambda *given: widths.append(given[2]["input_ids"].shape[1]), with_kwargs=True)
    found = model.generate(tasks=["a"], **shorter, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert widths == [4, 1, 1, 1]
    assert found.shape == (4, 6 + 4)


def test_text_is_continued(tmp_path):
    bundle = make_bundle(tmp_path, "llama")
    save_tokenizer(bundle / "base")
    model = mergetool.load_bundle(bundle)
    tokens = dict(model.tokenizer()(["w1 w2 w3", "w4"], padding=True, padding_side="left", return_tensors="pt"))
    found = model.generate(["w1 w2 w3", "w4"], tasks=["a"], max_new_tokens=3, do_sample=False)
    assert torch.equal(found, model.generate(tasks=["a"], **tokens, max_new_tokens=3, do_sample=False))


# Texts whose first tokens leave no doubt


def tokens_of_router(model, monkeypatch):
    """How many samples and tokens each first pass has read, from now on."""
    seen = []
    features = model.first_pass.features
    monkeypatch.setattr(
        model.first_pass, "features", lambda inputs: seen.append(tuple(inputs["input_ids"].shape)) or features(inputs)
    )
    return seen


@pytest.fixture(scope="module")
def early(tmp_path_factory):
    place = tmp_path_factory.mktemp("early")
    return mergetool.load_bundle(make_text_bundle(place, early=2))


def test_only_what_the_some_tokens_leave_open_is_read_to_the_end(early, model, monkeypatch):
    assert early.manifest.router.early == 2
    inputs = {key: value.clone() for key, value in early.read([f"{text} w5" for text in TEXTS]).items()}
    cut = {key: value[:, :2] for key, value in inputs.items()}
    seen = tokens_of_router(early, monkeypatch)
    monkeypatch.setattr("mergetool.bundle.first_pass._NO_DOUBT", 0.0)
    torch.testing.assert_close(early.route(**inputs).distances, model.route(**cut).distances)
    assert seen == [(4, 2)]
    monkeypatch.setattr("mergetool.bundle.first_pass._NO_DOUBT", float("inf"))
    found, expected = early.route(**inputs), model.route(**inputs)
    torch.testing.assert_close(found.distances, expected.distances)  # two of the texts have no more than two words
    assert seen[1:] == [(4, 2), (2, 7)]
    margin = model.route(**cut).distances.diff().abs().flatten()[[1, 3]]
    monkeypatch.setattr("mergetool.bundle.first_pass._NO_DOUBT", float(margin.mean()))
    mixed, doubtful = early.route(**inputs), [1, 3][int(margin.argmin())]
    torch.testing.assert_close(mixed.distances[doubtful], expected.distances[doubtful])
    assert seen[3:] == [(4, 2), (1, 7)]


def test_padding_on_the_left_is_no_first_token():
    ids, mask = torch.tensor([[1, 1, 5, 6, 7], [1, 1, 1, 1, 8]]), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])
    cut, longer = some_tokens({"input_ids": ids, "attention_mask": mask, "scale": 2}, 2)
    assert cut["input_ids"].tolist() == [[5, 6], [8, 1]]
    assert cut["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert cut["scale"] == 2
    assert longer.tolist() == [True, False]
    ids, mask = (
        torch.tensor([[1, 5, 6, 7, 8, 1], [1, 1, 1, 1, 9, 1]]),
        torch.tensor([[0, 1, 1, 1, 1, 0], [0] * 4 + [1, 0]]),
    )
    cut, longer = some_tokens({"input_ids": ids, "attention_mask": mask}, 3, last=1)
    assert cut["input_ids"].tolist() == [[5, 6, 8], [9, 1, 1]]
    assert cut["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert longer.tolist() == [True, False]


def test_what_is_short_or_no_text_is_read_whole(early, model, monkeypatch):
    seen = tokens_of_router(early, monkeypatch)
    same(early(["w2 w3", "w21"]), model(["w2 w3", "w21"]))
    assert seen == [(2, 2)]
    assert some_tokens({"pixel_values": torch.ones(2, 3, 8, 8)}, 2) is None


# Compilers


def test_compiled_it_answers_as_before(folder):
    model = mergetool.load_bundle(folder)
    expected = model(TEXTS)
    same(torch.compile(model, backend="eager")(TEXTS), expected)


def test_an_export_is_refused_and_one_expert_can_be_exported(folder, model, tmp_path, monkeypatch):
    inputs = model.read(TEXTS)
    with pytest.raises(PlanError, match="an exported program does the same for every input") as error:
        torch.export.export(model, (), kwargs=inputs)
    monkeypatch.chdir(tmp_path)
    command = error.value.fix.partition("mergetool ")[2].split()
    assert CliRunner().invoke(app, command).exit_code == 0
    expert = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a").eval()
    exported = torch.export.export(expert, (), kwargs=inputs).module()
    torch.testing.assert_close(exported(**inputs).logits, model(TEXTS, tasks=["a"]).logits, rtol=0, atol=1e-4)


def test_modules_that_were_replaced_are_not_passed_over(folder):
    model = mergetool.load_bundle(folder)
    attention = model.networks[0].base.bert.encoder.layer[1].attention.self
    attention.query = torch.nn.Sequential(attention.query)
    attention.query[0] = torch.nn.Linear(32, 32)
    with pytest.raises(PlanError, match=r"layer.1.attention.self.query.* was replaced \(quantised, or wrapped\)"):
        model(TEXTS)
    assert not any("forward" in vars(module) for module in model.base.modules())


class Refusing(MassModel):
    """A model that knows none of the texts."""

    def route(self, text=None, /, **inputs):
        found = super().route(text, **inputs)
        return replace(found, tasks=((),) * len(found.tasks))


def test_a_text_of_no_task_has_no_class(folder):
    model = mergetool.load_bundle(folder)
    model.__class__ = Refusing
    unknown = {"label": "unknown", "score": 0.0, "task": None}
    assert TextClassifier(model)(TEXTS[:2]) == [unknown] * 2
    assert TextClassifier(model)(TEXTS[0], top_k=None) == [unknown]


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_an_open_bundle_says_that_it_cannot_be_copied(model, copied):
    with pytest.raises(PlanError, match="cannot be copied in memory, pickled or quantised") as error:
        copied(model)
    assert "mergetool bundle dense" in error.value.fix

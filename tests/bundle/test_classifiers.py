"""Classifiers as transformers saves them: plain folders in a recipe; each answers in the bundle as it does alone."""

import json
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import mergetool
from mergetool.bundle.manifest import ClassHead, read_manifest
from mergetool.checkpoints.names import match
from mergetool.cli.app import app
from mergetool.errors import PlanError, SourceError
from mergetool.testing.classifiers import (
    audio_inputs,
    expert_answer,
    image_inputs,
    save_experts,
    text_inputs,
    tiny_config,
)
from tests.files import LONG

EXACT = {"rank": 1.0, "factors": "float32", "size": 100.0}
"""All directions are kept, as they are."""


def recipe(paths, method="tsv-compress", **merge):
    models = {name: str(path) for name, path in paths.items() if name != "base"}
    return {
        "base": str(paths["base"]),
        "models": models,
        "merge": {"method": method, **(EXACT if method == "tsv-compress" else {}), **merge},
    }


def opened(paths, folder, method="tsv-compress", **merge):
    return mergetool.load_bundle(mergetool.run(recipe(paths, method, **merge), output=folder).path)


@dataclass(frozen=True)
class Case:
    expert: str
    base: str
    inputs: Any = field(default_factory=text_inputs)
    more: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return f"{self.expert}-{self.base}"

    def save(self, folder, **labels):
        kind = getattr(transformers, self.expert)
        return save_experts(folder, kind, tiny_config(kind, **self.more), getattr(transformers, self.base), **labels)

    def alone(self, path):
        return expert_answer(path, getattr(transformers, self.expert), self.inputs)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP = {
    "text_config": {**SMALL, "vocab_size": 60},
    "vision_config": {**SMALL, "image_size": 16, "patch_size": 4},
    "projection_dim": 16,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LEFT = text_inputs(side="left")
WAVES = audio_inputs()
CASES = [
    Case("BertForSequenceClassification", "BertModel"),
    Case("BertForSequenceClassification", "BertForMaskedLM"),  # without a pooler
    Case("DistilBertForSequenceClassification", "DistilBertForMaskedLM"),
    Case("AlbertForSequenceClassification", "AlbertForMaskedLM"),
    Case("DebertaV2ForSequenceClassification", "DebertaV2Model"),
    Case("LlamaForSequenceClassification", "LlamaForCausalLM"),
    Case("LlamaForSequenceClassification", "LlamaModel", LEFT),
    Case("GPT2ForSequenceClassification", "GPT2LMHeadModel"),
    Case("MixtralForSequenceClassification", "MixtralForCausalLM"),  # experts of a mixture are joined in memory
    Case("NomicBertForSequenceClassification", "NomicBertModel"),  # query, key and value are divided in memory
    Case("Qwen3NextForSequenceClassification", "Qwen3NextForCausalLM", more=LINEAR),  # reads weights of its convolution
    Case("CanineForSequenceClassification", "CanineModel"),  # its pooler runs before the last of its layers
    Case("BartForSequenceClassification", "BartForConditionalGeneration"),
    Case("T5ForSequenceClassification", "T5ForConditionalGeneration"),
    Case("BertForTokenClassification", "BertForMaskedLM"),
    Case("LlamaForTokenClassification", "LlamaForCausalLM"),
    Case("ViTForImageClassification", "ViTModel", image_inputs(), {"image_size": 16, "patch_size": 4}),
    Case(
        "SwinForImageClassification",
        "SwinModel",
        image_inputs(),
        {"image_size": 16, "patch_size": 2, "depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "window_size": 2},
    ),
    Case(
        "ConvNextForImageClassification",
        "ConvNextModel",
        image_inputs(),
        {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    ),
    Case("CLIPForImageClassification", "CLIPModel", image_inputs(), CLIP),
    Case("WhisperForAudioClassification", "WhisperModel", audio_inputs(), {"max_source_positions": 50}),
]
LIKE_THESE = [
    Case("BertForSequenceClassification", "BertForPreTraining"),
    Case("RobertaForSequenceClassification", "RobertaForMaskedLM"),
    Case("ElectraForSequenceClassification", "ElectraModel"),
    Case("MPNetForSequenceClassification", "MPNetModel"),
    Case("GPT2ForSequenceClassification", "GPT2Model", LEFT),
    Case("Qwen2ForSequenceClassification", "Qwen2ForCausalLM", LEFT),
    Case("DistilBertForTokenClassification", "DistilBertModel"),
    Case("ViTMSNForImageClassification", "ViTMSNModel", image_inputs(), {"image_size": 16, "patch_size": 4}),
    Case("BeitForImageClassification", "BeitModel", image_inputs(), {"image_size": 16, "patch_size": 4}),
]
"""They go the ways of others above."""
if LONG:
    CASES += LIKE_THESE


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Base and experts of a case, saved once for all tests. Nobody may change them."""

    @cache
    def save(place):
        return CASES[place].save(tmp_path_factory.mktemp("case"), a=3, b=5)

    return lambda case: save(CASES.index(case))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_expert_answers_in_the_bundle_as_it_does_alone(case, saved, tmp_path):
    paths = saved(case)
    model = opened(paths, tmp_path / "out")
    for task, classes in (("a", 3), ("b", 5)):
        expected = case.alone(paths[task]).logits
        found = model(tasks=[task], **case.inputs).logits
        torch.testing.assert_close(found[..., :classes], expected, rtol=1e-4, atol=1e-4)
        assert bool(found[..., classes:].isneginf().all())


# Other bases, other kinds


@pytest.mark.parametrize(
    "case",
    [
        Case("RobertaForSequenceClassification", "RobertaForSequenceClassification"),
        Case("LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        Case("WhisperForAudioClassification", "WhisperForAudioClassification", WAVES, {"max_source_positions": 50}),
    ],
    ids=str,
)
def test_a_base_that_is_a_classifier_itself_shares_no_head(case, tmp_path):
    paths = case.save(tmp_path, a=2, b=2)
    model = opened(paths, tmp_path / "out")
    assert not any(name.split(".")[0] in ("classifier", "score", "projector") for name in model.manifest.parameters)
    for task in "ab":
        torch.testing.assert_close(model(tasks=[task], **case.inputs).logits, case.alone(paths[task]).logits)


@pytest.mark.parametrize(
    ("expert", "base"),
    [
        ("BertForQuestionAnswering", "BertForMaskedLM"),
        ("LlamaForQuestionAnswering", "LlamaForCausalLM"),
        ("BartForQuestionAnswering", "BartModel"),
    ],
)
def test_starts_and_ends_of_spans_are_those_of_the_expert(expert, base, tmp_path):
    case = Case(expert, base)
    paths = case.save(tmp_path, a=2, b=2)
    model = opened(paths, tmp_path / "out")
    for task in "ab":
        found, expected = model(tasks=[task], **case.inputs), case.alone(paths[task])
        torch.testing.assert_close(found.start_logits, expected.start_logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.end_logits, expected.end_logits, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """One base; two classifiers of sequences, one of tokens, one of spans, and a bare network with a matrix as head."""
    folder = tmp_path_factory.mktemp("mixed")
    kind = transformers.BertForSequenceClassification
    paths = save_experts(folder / "s", kind, tiny_config(kind), transformers.BertForPreTraining, tasks="ab", a=3, b=5)
    for task, other in (("t", "BertForTokenClassification"), ("q", "BertForQuestionAnswering"), ("m", "BertModel")):
        kind = getattr(transformers, other)
        made = save_experts(folder / task, kind, tiny_config(kind), transformers.BertForPreTraining, tasks=task, q=2)
        paths[task] = made[task]
    save_file({"weight": torch.randn(4, 32), "bias": torch.randn(4)}, folder / "m.safetensors")
    return paths | {"head": folder / "m.safetensors"}


def mixed_recipe(mixed, method="mass"):
    paths = {name: path for name, path in mixed.items() if name != "head"}
    document = recipe(paths, method)
    document["models"]["m"] = {"source": str(mixed["m"]), "head": {"weights": str(mixed["head"]), "pool": "cls"}}
    return document


def test_heads_of_all_kinds_live_in_one_bundle(mixed, tmp_path):
    folder = mergetool.run(mixed_recipe(mixed, "tsv-compress"), output=tmp_path / "out").path
    model, inputs = mergetool.load_bundle(folder), text_inputs()
    kinds = {"a": "Sequence", "b": "Sequence", "t": "Token"}
    for task, kind in kinds.items():
        expected = expert_answer(mixed[task], getattr(transformers, f"BertFor{kind}Classification"), inputs).logits
        found = model(tasks=[task], **inputs).logits[..., : expected.shape[-1]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    spans = expert_answer(mixed["q"], transformers.BertForQuestionAnswering, inputs)
    torch.testing.assert_close(model(tasks=["q"], **inputs).end_logits, spans.end_logits, rtol=1e-4, atol=1e-4)
    head = load_file(mixed["head"])
    features = expert_answer(mixed["m"], transformers.BertModel, inputs).last_hidden_state[:, 0]
    found = model(tasks=["m"], **inputs).logits[:, :4]
    torch.testing.assert_close(found, features @ head["weight"].mT + head["bias"], rtol=1e-4, atol=1e-4)
    stored = {
        parameter.data_ptr() for network in model.networks for parameter in network.base.bert.encoder.parameters()
    }
    assert len(stored) == len(list(model.base.encoder.parameters()))  # five experts, one copy of the base in memory


def test_routed_samples_of_a_mixed_bundle_are_answered_by_the_nearest_task(mixed, tmp_path):
    model = mergetool.load_bundle(mergetool.run(mixed_recipe(mixed), output=tmp_path / "out").path)
    inputs = text_inputs(12)
    answer = model(**inputs)
    assert [model.task_names[task] for task in answer.coefficients.argmax(1)] == list(answer.task)
    for row, task in enumerate(answer.task):
        if answer.tasks[row] == (task,):
            found, expected = answer.logits[row], model(tasks=[task], **inputs).logits[row]
            found = found[0] if expected.ndim < found.ndim else found
            torch.testing.assert_close(found[: len(expected)], expected)


# Groups of several tasks


def group_weights(model, base, group):
    """The base's tensors as a group of tasks has them."""
    found = dict(load_file(base / "model.safetensors"))
    for name, parameter in model.manifest.parameters.items():
        if parameter.policy != "skip":
            found[name] = found[name] + model._factors.dense_change(group, name)
    return found


@pytest.mark.parametrize("case", [CASES[place] for place in (0, 7, 8, 10)], ids=str)
def test_every_task_of_a_group_reads_the_groups_network_with_its_own_head(case, saved, tmp_path):
    paths = saved(case)
    model = opened(paths, tmp_path / "out", rank=0.4)
    groups = [(0, 1), (1,), (0,), (0, 1), (1,)]
    scored = model.networks[0].scores(groups, case.inputs)
    assert sorted(scored[0].samples) == [0, 2, 3]
    layout = model.manifest.layouts[0]

    @cache
    def by_hand(task, group):
        weights = group_weights(model, tmp_path / "out" / "base", group)
        own = load_file(paths[task] / "model.safetensors")
        state = {name: weights[layout[name]] if name in layout else value for name, value in own.items()}
        kind = getattr(transformers, case.expert)
        config = kind.config_class.from_pretrained(paths[task])
        return kind.from_pretrained(None, config=config, state_dict=state).eval()

    for place, task in enumerate("ab"):
        for row, sample in enumerate(scored[place].samples):
            one = {key: value[sample : sample + 1] for key, value in case.inputs.items()}
            with torch.inference_mode():
                expected = by_hand(task, groups[sample])(**one).logits[0]
            torch.testing.assert_close(scored[place].values[row], expected, rtol=1e-3, atol=1e-4)


ROUTED = CASES if LONG else [CASES[place] for place in (0, 6, 10, 15)]
"""Routing looks at no more of a network than what the other tests try with all of them: some are enough."""


@pytest.mark.parametrize("case", ROUTED, ids=str)
def test_samples_of_a_batch_are_routed_as_each_alone(case, saved, tmp_path):
    paths = saved(case)
    model = opened(paths, tmp_path / "out", "mass", rank=0.4, router={"threshold": 0.4})
    together = model(**case.inputs)
    for sample in range(len(together.task)):
        alone = model(**{key: value[sample : sample + 1] for key, value in case.inputs.items()})
        assert alone.tasks[0] == together.tasks[sample]
        torch.testing.assert_close(alone.coefficients[0], together.coefficients[sample], rtol=0, atol=1e-5)
        torch.testing.assert_close(alone.logits[0], together.logits[sample], rtol=1e-4, atol=1e-4)


def test_what_is_an_experts_own_is_kept_whole(tmp_path):
    case = Case("BertForSequenceClassification", "BertForPreTraining")
    paths = case.save(tmp_path, a=3, b=5)
    folder = mergetool.run(recipe(paths, "mass"), output=tmp_path / "out").path
    for task in "ab":
        expert = load_file(paths[task] / "model.safetensors")
        head = load_file(folder / "heads" / task / "head.safetensors")
        assert sorted(head) == [
            "bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight",
        ]  # fmt: skip
        assert all(torch.equal(value, expert[name]) for name, value in head.items())
    assert mergetool.load_bundle(folder)(**case.inputs).logits.shape == (5, 5)


def test_an_expert_taken_out_of_a_bundle_is_a_classifier_again(tmp_path):
    case = Case("BertForSequenceClassification", "BertModel")
    paths = case.save(tmp_path, a=3, b=5)
    library = mergetool.run(recipe(paths), output=tmp_path / "library").path
    one = {"models": {"b": {"source": str(library), "select": "b"}}, "merge": {"method": "passthrough"}}
    found = mergetool.run(one, output=tmp_path / "again").path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(found).eval()
    assert model.config.id2label[4] == "b4"
    with torch.inference_mode():
        torch.testing.assert_close(model(**case.inputs).logits, case.alone(paths["b"]).logits, rtol=1e-4, atol=1e-4)


# What cannot be kept is said when planning


def wrong(paths, **models):
    document = recipe(paths, "mass")
    document["models"] |= {name: str(path) for name, path in models.items()}
    with pytest.raises(PlanError) as caught:
        mergetool.plan(document)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["BertForMultipleChoice", "BertForNextSentencePrediction"])
def test_a_head_that_cannot_be_kept_is_refused_by_name(kind, mixed, tmp_path):
    other = getattr(transformers, kind)
    made = save_experts(tmp_path, other, tiny_config(other), transformers.BertModel, tasks="x")
    paths = {"base": made["base"], "a": mixed["a"]}
    said = wrong(paths, x=made["x"])
    assert f"it is a {kind}" in said
    assert "model 'x'" in said


def test_an_expert_whose_head_cannot_be_found_is_named_and_the_advice_works(mixed, tmp_path):
    paths = {"base": mixed["base"], "a": mixed["a"]}
    said = wrong(paths, m=mixed["m"])
    assert "task 'm' has no head that can be found, but 'a' has; its config.json names BertModel" in said
    assert "add head: {weights: PATH} to model 'm'" in said
    document = recipe(paths, "mass")
    document["models"]["m"] = {"source": str(mixed["m"]), "head": {"weights": str(mixed["head"])}}
    folder = mergetool.run(document, output=tmp_path / "out").path
    assert mergetool.load_bundle(folder)(**text_inputs()).logits.shape == (5, 4)


def test_an_expert_of_another_kind_than_the_base_is_told_so(mixed, tmp_path):
    case = Case("DistilBertForSequenceClassification", "DistilBertModel")
    other = case.save(tmp_path, a=2, b=2)
    said = wrong({"base": mixed["base"], "a": mixed["a"]}, d=other["a"])
    assert "it is a DistilBertForSequenceClassification and the base a BertForPreTraining" in said


def test_what_is_an_experts_own_but_feeds_shared_layers_is_refused(tmp_path):
    """A base that was saved without its embeddings: each expert has some of its own, below all that they share."""
    case = Case("BertForSequenceClassification", "BertModel")
    paths = case.save(tmp_path, a=3, b=5)
    weights = load_file(paths["base"] / "model.safetensors")
    del weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"]
    save_file(weights, paths["base"] / "model.safetensors", {"format": "pt"})
    model = opened(paths, tmp_path / "out")
    with pytest.raises(SourceError, match=r"bert.encoder reads what comes out of bert.embeddings.LayerNorm"):
        model(tasks=["a"], **case.inputs)


def test_a_damaged_head_is_found(tmp_path):
    case = Case("BertForSequenceClassification", "BertModel")
    folder = mergetool.run(recipe(case.save(tmp_path, a=3, b=5)), output=tmp_path / "out").path
    config = (folder / "heads" / "a" / "config.json").read_text()
    (folder / "heads" / "a" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match="SHA-256"):
        mergetool.load_bundle(folder)
    (folder / "heads" / "a" / "config.json").write_text(config)
    (folder / "heads" / "a" / "head.safetensors").unlink()
    with pytest.raises(SourceError, match="head is missing"):
        mergetool.load_bundle(folder)


# What the commands say


def counterparts(base, expert):
    return {name: own for own, name in match(dict.fromkeys(expert), dict.fromkeys(base)).items() if name in base}


@pytest.mark.parametrize(
    ("base", "expert"), [("", "bert."), ("bert.", ""), ("model.", "model."), ("", "model.language_model.")]
)
def test_names_meet_whatever_they_begin_with(base, expert):
    names = ["embeddings.weight", "layers.0.up.weight", "layers.1.up.weight"]
    found = counterparts(
        [*(base + name for name in names), "cls.weight"], [*(expert + n for n in names), "score.weight"]
    )
    assert found == {base + name: expert + name for name in names}


def test_names_meet_where_only_some_begin_with_a_prefix():
    base = ["embeddings.weight", "layers.0.up.weight", "layers.1.up.weight", "layers.2.up.weight", "norm.weight"]
    expert = ["net.embeddings.weight", *base[1:4], "net.norm.weight", "classifier.weight"]
    assert counterparts(base, expert) == dict(zip(base, expert[:5], strict=True))


def rows_file(path, inputs):
    rows = [{key: value[row].tolist() for key, value in inputs.items()} for row in range(len(inputs["input_ids"]))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_route_prints_labels_of_every_kind(mixed, tmp_path):
    folder = mergetool.run(mixed_recipe(mixed, "tsv-compress"), output=tmp_path / "out").path
    inputs = text_inputs()
    file = rows_file(tmp_path / "rows.jsonl", inputs)

    def routed(task):
        shown = CliRunner().invoke(app, ["route", str(folder), "--input", str(file), "--task", task, "--json"])
        assert shown.exit_code == 0, shown.output
        return [json.loads(line) for line in shown.stdout.splitlines()]

    best = expert_answer(mixed["b"], transformers.BertForSequenceClassification, inputs).logits.argmax(-1).tolist()
    assert [row["label"] for row in routed("b")] == [f"b{number}" for number in best]
    tokens = expert_answer(mixed["t"], transformers.BertForTokenClassification, inputs).logits.argmax(-1)
    lengths = inputs["attention_mask"].sum(1).tolist()
    for row, each, length in zip(routed("t"), tokens.tolist(), lengths, strict=True):
        assert row["labels"] == [f"t{number}" for number in each[:length]]
    for row, length in zip(routed("q"), lengths, strict=True):
        assert 0 <= row["start"] <= row["end"] < length
    assert all(row["label"] in "0123" for row in routed("m"))
    shown = CliRunner().invoke(app, ["route", str(folder), "--input", str(file), "--task", "t"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
    assert {task["name"]: task["head"] for task in facts["tasks"]}["t"] == "BertForTokenClassification"
    assert CliRunner().invoke(app, ["inspect", str(folder)]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0


def test_a_bundle_of_matrices_is_written_as_before(mixed, tmp_path):
    document = mixed_recipe(mixed)
    document["base"] = str(mixed["m"])
    document["models"] = {"m": document["models"]["m"]}
    folder = mergetool.run(document, output=tmp_path / "out").path
    written = json.loads((folder / "manifest.json").read_text())
    assert written["format_version"] == 1
    assert "layouts" not in written
    assert not any(isinstance(task.head, ClassHead) for task in read_manifest(folder).tasks)

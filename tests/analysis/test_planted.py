"""Models that do not belong in a merge are told apart by name, and what is sound is left alone."""

import json
import math
import shutil

import pytest
import torch
import transformers as hf
import yaml

import mergetool
from tests.analysis.models import ancestor, changed, fine_tuned, state
from tests.words.models import save_tokenizer, train, vocabulary

HINTS = {"scale", "density", "method"}


def told(analysis):
    """What is said beside hints: (kind, models)."""
    return [(each["kind"], tuple(each["models"])) for each in analysis.advice if each["kind"] not in HINTS]


def only(analysis, kind):
    (found,) = [each for each in analysis.advice if each["kind"] == kind]
    return found


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    return ancestor(tmp_path_factory.mktemp("stranger") / "model", seed=7)


@pytest.fixture(scope="module")
def sound(family):
    """The analysis of three fine-tunes that nothing speaks against."""
    models = {name: str(family / name) for name in ("tales", "code", "letters")}
    return mergetool.analyze({"base": str(family / "base"), "models": models, "merge": {"method": "task-arithmetic"}})


def test_sound_fine_tunes_are_called_so(sound):
    found = sound
    assert told(found) == []
    assert found.summary[-1] == "nothing speaks against merging them"
    assert {each["kind"] for each in found.advice} == HINTS


def test_a_model_of_another_ancestor(recipe, stranger):
    found = mergetool.analyze(recipe(other=stranger))
    assert told(found) == [("unrelated", ("other",))]
    assert only(found, "unrelated")["evidence"]["kinship"] < 0.5
    assert "nothing speaks against" not in "\n".join(found.summary)


def test_a_model_of_another_ancestor_where_there_is_no_base(recipe, stranger):
    found = mergetool.analyze(recipe(base=None, method="linear", other=stranger))
    assert told(found) == [("unrelated", ("other",))]


def test_two_models_that_have_nothing_to_do_with_each_other(recipe, stranger):
    found = mergetool.analyze(recipe(("code",), base=None, method="linear", other=stranger))
    assert told(found) == [("unrelated", ("other",))]


def test_a_base_that_is_no_ancestor(recipe, stranger):
    asked = recipe() | {"base": str(stranger)}
    assert told(mergetool.analyze(asked)) == [("base", ())]


def test_a_model_given_twice(recipe, family, tmp_path):
    shutil.copytree(family / "code", tmp_path / "again")
    found = mergetool.analyze(recipe(again=tmp_path / "again"))
    assert told(found) == [("duplicate", ("code", "again"))]
    assert mergetool.analyze(recipe(again=family / "code")).advice[0]["kind"] == "duplicate"


def test_a_model_that_was_trained_a_little_longer_is_no_copy(recipe, family, tmp_path):
    fine_tuned(family / "base", tmp_path / "longer", "code", steps=13)
    found = mergetool.analyze(recipe(("tales", "code"), longer=tmp_path / "longer"))
    assert told(found) == []
    assert found.rows("pairs")[2]["cosine"] > 0.95


def test_a_model_given_twice_where_there_is_no_base(recipe, family):
    found = mergetool.analyze(recipe(("tales", "code"), base=None, method="linear", again=family / "code"))
    assert told(found) == [("duplicate", ("code", "again"))]
    two = mergetool.analyze(recipe(("code",), base=None, method="linear", again=family / "code"))
    assert told(two) == [("duplicate", ("code", "again"))]


def test_a_model_that_dominates_and_the_weights_that_even_it_out(recipe, family, tmp_path):
    fine_tuned(family / "base", tmp_path / "loud", "code", steps=25, rate=8e-3)
    found = mergetool.analyze(recipe(("tales", "letters"), loud=tmp_path / "loud"))
    assert told(found) == [("dominates", ("loud",))]
    advice = only(found, "dominates")
    assert advice["evidence"]["share_of_norms"] > 0.8
    asked = recipe(("tales", "letters"), loud=tmp_path / "loud") | {"output": {"path": str(tmp_path / "out")}}
    mergetool.run(asked | {"merge": yaml.safe_load(advice["fix"])["merge"]})


def test_a_model_that_is_the_base(recipe, family, tmp_path):
    shutil.copytree(family / "base", tmp_path / "dead")
    found = mergetool.analyze(recipe(dead=tmp_path / "dead"))
    assert told(found) == [("dead", ("dead",))]
    assert [row["identical"] for row in found.rows("models")] == [0, 0, 0, 30]


def test_a_model_that_is_the_base_but_for_rounding(recipe, family, tmp_path):
    changed(family / "base", tmp_path / "dead", lambda _, values: values * (1 + 1e-7))
    assert told(mergetool.analyze(recipe(dead=tmp_path / "dead"))) == [("dead", ("dead",))]


def test_a_model_that_is_the_base_with_noise(recipe, family, tmp_path):
    generator = torch.Generator().manual_seed(0)

    def noisy(_, values):
        return values + 0.1 * values.std() * torch.randn(values.shape, generator=generator)

    changed(family / "base", tmp_path / "noise", noisy)
    found = mergetool.analyze(recipe(noise=tmp_path / "noise"))
    assert told(found) == [("noise", ("noise",))]


def test_a_tokenizer_that_is_not_the_model_s(recipe, family, tmp_path):
    shutil.copytree(family / "code", tmp_path / "swapped")
    save_tokenizer(tmp_path / "swapped", train("bpe", "code", 300))
    found = mergetool.analyze(recipe(("tales", "letters"), swapped=tmp_path / "swapped"))
    assert told(found) == [("tokenizer", ("swapped",))]
    evidence = only(found, "tokenizer")["evidence"]
    assert (evidence["relative"] < 0.3, evidence["share_of_tokens"] > 0.1) == (True, True)
    ours, theirs = vocabulary(family / "base"), vocabulary(tmp_path / "swapped")
    rows = next(row["parameters"] for row in found.rows("tensors") if row["tensor"] == "lm_head.weight")
    assert rows == 48 * len(ours.keys() & theirs.keys())  # rows that not all know are in no figure
    for file in (family / "base").glob("*token*"):  # what is advised
        shutil.copy(file, tmp_path / "swapped")
    assert told(mergetool.analyze(recipe(("tales", "letters"), swapped=tmp_path / "swapped"))) == []


def test_a_vocabulary_in_another_order_is_sound_where_the_rows_follow(recipe, family, sound, tmp_path):
    """The same model with its tokens numbered anew, and its rows with them."""
    fine = hf.AutoModelForCausalLM.from_pretrained(family / "code")
    shutil.copytree(family / "code", tmp_path / "moved")
    file = tmp_path / "moved" / "tokenizer.json"
    words = json.loads(file.read_text())
    vocabulary = words["model"]["vocab"]
    free = [text for text in vocabulary if vocabulary[text] > 10]
    order = torch.arange(len(vocabulary))
    for one, other in zip(free[::2], free[1::2], strict=False):
        a, b = vocabulary[one], vocabulary[other]
        vocabulary[one], vocabulary[other] = b, a
        order[[a, b]] = order[[b, a]]
    file.write_text(json.dumps(words))
    with torch.no_grad():
        for layer in (fine.get_input_embeddings(), fine.get_output_embeddings()):
            layer.weight.copy_(layer.weight[order].clone())
    fine.save_pretrained(tmp_path / "moved")
    found = mergetool.analyze(recipe(("tales", "letters"), moved=tmp_path / "moved"))
    assert told(found) == []
    assert {(row["model"], row["file"]) for row in found.rows("settings")} >= {("moved", "tokenizer")}
    norms = [next(row["norm"] for row in each.rows("models") if row["model"] in ("moved", "code"))
             for each in (found, sound)]  # fmt: skip
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_rows_in_another_order_that_no_tokenizer_tells_of(recipe, family, tmp_path):
    def moved(name, values):
        return values.roll(17, 0) if "embed_tokens" in name or "lm_head" in name else values + 1e-3 * values

    changed(family / "code", tmp_path / "moved", moved)
    found = mergetool.analyze(recipe(("tales", "letters"), moved=tmp_path / "moved"))
    assert told(found) == [("tokenizer", ("moved",))]
    assert "no tokenizer beside it says how" in only(found, "tokenizer")["why"]


def test_entries_that_are_not_finite(recipe, family, tmp_path):
    def broken(name, values):
        return values.index_fill(0, torch.tensor([0]), float("nan")) if "layers.1.mlp.up" in name else values

    changed(family / "code", tmp_path / "broken", broken)
    found = mergetool.analyze(recipe(("tales", "letters"), broken=tmp_path / "broken"))
    assert told(found)[0] == ("not_finite", ("broken",))
    assert only(found, "not_finite")["evidence"]["entries"] == 48


def test_entries_of_the_base_that_are_not_finite_are_not_the_models(recipe, family, tmp_path):
    changed(family / "base", tmp_path / "broken", lambda name, w: w.index_fill(0, torch.tensor([0]), math.nan))
    found = mergetool.analyze(recipe(base=tmp_path / "broken"))
    assert [advice["title"] for advice in found.advice if advice["kind"] == "not_finite"] == [
        f"the base has {only(found, 'not_finite')['evidence']['entries']} entries that are not finite"
    ]


def test_without_a_base_only_the_broken_model_is_told(recipe, family, tmp_path):
    changed(family / "tales", tmp_path / "broken", lambda name, w: w.index_fill(0, torch.tensor([0]), math.inf))
    found = mergetool.analyze(recipe(("code", "letters"), None, "linear", broken=tmp_path / "broken"))
    assert only(found, "not_finite")["models"] == ["broken"]


def test_of_a_model_without_a_number_nothing_else_is_said(recipe, family, tmp_path):
    changed(family / "base", tmp_path / "broken", lambda name, w: torch.full_like(w, math.nan))
    found = mergetool.analyze(recipe(("code",), broken=tmp_path / "broken"), output=tmp_path / "page")
    assert told(found) == [("not_finite", ("broken",))]


def test_numbers_that_are_too_large_for_squares_in_float32(recipe, family, tmp_path):
    changed(family / "base", tmp_path / "huge", lambda name, w: torch.full_like(w, 3e38))
    found = mergetool.analyze(recipe(("code",), huge=tmp_path / "huge"), output=tmp_path / "page")
    assert told(found)[0] == ("unrelated", ("huge",))


def test_changes_that_bfloat16_cannot_hold(recipe, family, tmp_path):
    def slight(name, values):
        return values * (1 + 1e-4 * (1 if "q_proj" in name else -1))

    changed(family / "base", tmp_path / "slight", slight)
    found = mergetool.analyze(recipe((), slight=tmp_path / "slight"))
    assert ("dtype", ()) in told(found)
    assert only(found, "dtype")["evidence"]["survives_bfloat16"] < 0.2


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        ({"method": "task-arithmetic", "scale": 0.001}, "problem"),
        ({"method": "ties", "density": 0.5, "scale": 0.0}, "problem"),
        ({"method": "task-arithmetic", "weight": 9.0}, "warning"),
        ({"method": "task-arithmetic", "weight": {"tales": 1.0, "code": 0.5, "letters": -0.5}}, None),
        ({"method": "ties", "density": 0.5}, None),
    ],
)
def test_numbers_that_leave_the_base_or_overshoot(recipe, merge, expected):
    found = mergetool.analyze(recipe() | {"merge": merge})
    assert told(found) == ([("numbers", ())] if expected else [])
    if expected:
        advice = only(found, "numbers")
        assert advice["weight"] == expected
        assert told(mergetool.analyze(recipe() | yaml.safe_load(advice["fix"]))) == []


def test_of_models_that_do_not_belong_signs_and_overlaps_are_not_taken_for_advice(recipe, family, stranger, sound):
    """They are figures of all models: a copy alone makes directions overlap."""

    def methods(found):
        return {each["fix"] for each in found.advice if each["kind"] == "method"}

    assert "merge: {method: ties}" in methods(sound)
    found = methods(mergetool.analyze(recipe(again=family / "code", other=stranger)))
    assert found == {"merge: {method: task-arithmetic}", "merge: {method: iso-c}"}


def test_a_density_is_what_each_tensor_needs(recipe, family):
    """`ties` trims tensor by tensor, and embeddings that a text hardly touched hide what the layers need."""
    base = state(family / "base")
    parts = [(state(family / "code")[name] - base[name]).abs().flatten().sort(descending=True)[0] for name in base]

    def kept(density):
        return sum(float(part[: round(density * len(part))].square().sum()) for part in parts)

    needed = next(d / 100 for d in range(1, 101) if kept(d / 100) >= 0.9 * kept(1))
    found = mergetool.analyze(recipe(("code",)))
    assert only(found, "density")["evidence"]["by_model"]["code"] == pytest.approx(needed, abs=0.011)
    assert needed > found.rows("models")[0]["density_90"] + 0.05


def test_hints_can_be_typed(recipe, sound, tmp_path):
    for each in sound.advice:
        merge = yaml.safe_load(each["fix"])["merge"]
        result = mergetool.run(recipe() | {"merge": merge}, output=tmp_path / f"{len(list(tmp_path.iterdir()))}")
        assert result.path.exists()

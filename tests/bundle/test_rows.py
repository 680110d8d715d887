"""`mergetool route`, `inspect` and `verify` on a bundle, with text and with tensors."""

import json
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import mergetool
from mergetool.bundle.calibrate import calibrate
from mergetool.bundle.rows import answers, inputs_of, read_rows
from mergetool.cli.app import app
from mergetool.errors import PlanError, SourceError
from tests.bundle.tiny import make_bundle, tiny_inputs, tiny_model, write_models

WORDS = ["[PAD]", "[UNK]", *(f"w{index}" for index in range(38))]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle whose base has a tokenizer: words w0 to w37."""
    folder = tmp_path_factory.mktemp("bundle")
    paths = write_models(folder / "models", tiny_model("bert"))
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(paths["base"])
    heads = {task: str(paths[task].parent / f"{task}.head.safetensors") for task in "abc"}
    recipe = {
        "base": str(paths["base"]),
        "models": {task: {"source": str(paths[task]), "head": {"weights": heads[task]}} for task in "abc"},
        "merge": {"method": "mass"},
    }
    recipe["models"]["c"]["head"]["labels"] = ["no", "yes"]
    return mergetool.run(recipe, output=folder / "out").path


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"text": f"w{i} w{3 * i % 38} w{7 * i % 38}", "id": i} for i in range(9)]


def test_route_answers_rows_of_text_in_order(bundle, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS)
    shown = CliRunner().invoke(app, ["route", str(bundle), "--input", str(file), "--json", "--batch-size", "4"])
    assert shown.exit_code == 0, shown.output
    found = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [answer["row"]["id"] for answer in found] == list(range(9))
    model = mergetool.load_bundle(bundle)
    texts = [row["text"] for row in ROWS]
    answer = model(**dict(model.tokenizer()(texts, padding=True, return_tensors="pt")))
    for place, row in enumerate(found):
        assert row["task"] == answer.task[place]
        assert tuple(row["tasks"]) == answer.tasks[place]
        assert row["class"] == int(answer.logits[place].argmax())
        assert list(row["coefficients"].values()) == pytest.approx(answer.coefficients[place].tolist(), abs=1e-5)
        assert row["label"] == (["no", "yes"][row["class"]] if row["task"] == "c" else str(row["class"]))


def test_route_prints_a_table_and_takes_forced_tasks(bundle, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", ROWS[:2])
    shown = CliRunner().invoke(app, ["route", str(bundle), "--input", str(file), "--task", "c"])
    assert shown.exit_code == 0, shown.output
    head, *rows = shown.stdout.splitlines()
    assert head.split()[:2] == ["task", "label"]
    assert [row.split()[0] for row in rows] == ["c", "c"]


def test_rows_may_hold_tensors(tmp_path):
    folder = make_bundle(tmp_path, "vit")
    pixels = tiny_inputs("vit", 3)["pixel_values"]
    rows = read_rows(write_rows(tmp_path / "rows.jsonl", [{"pixel_values": each.tolist()} for each in pixels]))
    model = mergetool.load_bundle(folder)
    found = list(answers(model, rows))
    assert tuple(row["task"] for row in found) == model(pixel_values=pixels).task


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "input is empty"),
        ("\n\n", "input is empty"),
        ("[1]\n", "expected a JSON object"),
        ('{"id": 1}\n', "expected"),
    ],
)
def test_rows_without_input_are_refused(tmp_path, text, says):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SourceError, match=says):
        read_rows(tmp_path / "rows.jsonl")


def test_what_cannot_be_answered_is_said(bundle, tmp_path):
    model = mergetool.load_bundle(bundle)
    with pytest.raises(PlanError, match="no task 'nope'"):
        list(answers(model, ROWS, tasks=["nope"]))
    with pytest.raises(SourceError, match=r"field `input_ids` is of shape \[1\], \[2\] in the first row") as caught:
        list(answers(model, [{"input_ids": [1, 2]}, {"input_ids": [1]}]))
    assert "--batch-size 1" in caught.value.fix
    assert len(list(answers(model, [{"input_ids": [1, 2]}, {"input_ids": [1]}], batch_size=1))) == 2
    with pytest.raises(SourceError, match="cannot be read"):
        read_rows(tmp_path / "nowhere.jsonl")
    untold = make_bundle(tmp_path, "bert")
    with pytest.raises(SourceError, match="no tokenizer"):
        list(answers(mergetool.load_bundle(untold), ROWS))


WRONG_ROWS = {
    "another name": ({"prompt": "w1"}, "has no field `text`, but 'prompt'; another row has it"),
    "a second text alone": ({"id": 1, "pair": "w2"}, "has no field `text`, but 'pair'; another row has it"),
    "a number": ({"text": 3}, "field `text` is 3, not text"),
    "nothing": ({"text": None}, "field `text` is null, not text"),
    "a list": ({"text": ["w1", "w2"]}, 'field `text` is ["w1", "w2"], not text'),
    "tensors among texts": ({"input_ids": [1, 2]}, "has no field `text`, but 'input_ids'; another row has it"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_is_named_with_its_file_line_and_field(bundle, tmp_path, case):
    wrong, says = WRONG_ROWS[case]
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "task": "a"}, {"text": "w2", "task": "b"}])
    with file.open("a") as more:
        more.write("\n" + json.dumps(wrong | {"task": "c"}) + "\n")
    for command in ("route", "calibrate"):
        error = CliRunner().invoke(app, [command, str(bundle), "--input", str(file)]).exception
        assert isinstance(error, SourceError)
        assert (error.what, error.where) == (says, f"{file}:4")
    assert not (bundle / "calibration.json").exists()


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"input_ids": [1, 2]}, {"input_ids": "w1 w2"}], 'field `input_ids` is "w1 w2", not numbers'),
        ([{"input_ids": [1, 2]}, {"input_ids": [[1], [2, 3]]}], "field `input_ids` is [[1], [2, 3]], not numbers"),
        ([{"input_ids": [1, 2]}, {"ids": [1, 2]}], "has no field `input_ids`, but 'ids'; another row has it"),
    ],
)
def test_a_wrong_row_of_tensors_is_named_too(bundle, tmp_path, rows, says):
    file = write_rows(tmp_path / "rows.jsonl", rows)
    error = CliRunner().invoke(app, ["route", str(bundle), "--input", str(file)]).exception
    assert error.what.startswith(says)
    assert error.where == f"{file}:2"


def test_a_row_without_a_second_text_among_others_is_named(bundle, tmp_path):
    rows = [{"text": "w1", "pair": "w2"}, {"text": "w2"}]
    with pytest.raises(SourceError, match="has no field `pair`; another row has it") as caught:
        list(answers(mergetool.load_bundle(bundle), read_rows(write_rows(tmp_path / "rows.jsonl", rows))))
    assert caught.value.where == f"{tmp_path / 'rows.jsonl'}:2"
    for alone in rows:
        assert len(list(answers(mergetool.load_bundle(bundle), [alone]))) == 1


def test_a_row_without_a_task_is_named(bundle, tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"text": "w1", "task": "a"}, {"text": "w2"}])
    error = CliRunner().invoke(app, ["calibrate", str(bundle), "--input", str(file)]).exception
    assert (error.what, error.where) == ("has no field `task`", f"{file}:2")
    assert error.fix == "name one of the tasks a, b, c in every row"


def test_inspect_tells_what_a_bundle_holds_and_weighs(bundle):
    facts = json.loads(CliRunner().invoke(app, ["inspect", str(bundle), "--json"]).stdout)
    sizes = {task: (bundle / "factors" / f"{task}.safetensors").stat().st_size for task in "abc"}
    assert facts["factor_bytes"] == sizes
    assert facts["base_bytes"] == pytest.approx((bundle / "base" / "model.safetensors").stat().st_size, rel=0.2)
    assert [task["classes"] for task in facts["tasks"]] == [3, 5, 2]
    assert facts["router"]["matrices"] == 3
    assert len(facts["interference"]) > 1
    assert all(value > 0 for value in facts["interference"].values())
    shown = CliRunner().invoke(app, ["inspect", str(bundle)])
    assert shown.exit_code == 0
    assert "size_over_base" in shown.stdout


def test_verify_finds_a_bundle_sound_or_says_what_is_wrong(bundle, tmp_path):
    shown = CliRunner().invoke(app, ["verify", str(bundle)])
    assert shown.exit_code == 0
    assert "match the manifest" in shown.stdout
    copy = shutil.copytree(bundle, tmp_path / "copy")
    damaged = (copy / "heads" / "a.safetensors").read_bytes()
    (copy / "heads" / "a.safetensors").write_bytes(damaged[:-4] + torch.tensor([float("nan")]).numpy().tobytes())
    shown = CliRunner().invoke(app, ["verify", str(copy)])
    assert isinstance(shown.exception, SourceError)
    assert "SHA-256" in str(shown.exception)


# Calibration


MANY = [{"text": f"w{i} w{7 * i % 38} w{5 * i % 37}"} for i in range(60)]


def labelled(model, rows):
    """The rows, with the task that a router would choose that finds all tasks equally far on average."""
    distances = model.route(**inputs_of(model, rows)).distances
    found = (distances - distances.mean(0)).argmin(1)
    return [row | {"task": "abc"[task]} for row, task in zip(rows, found.tolist(), strict=True)]


def test_a_few_rows_of_known_tasks_correct_the_router(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = mergetool.load_bundle(folder)
    rows = labelled(model, MANY)
    assert {row["task"] for row in rows} == {"a", "b", "c"}
    before = model.route(**inputs_of(model, MANY)).coefficients.argmax(1)
    file = write_rows(tmp_path / "rows.jsonl", rows)
    shown = CliRunner().invoke(app, ["calibrate", str(folder), "--input", str(file)])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.strip() == str(folder / "calibration.json")
    after = mergetool.load_bundle(folder).route(**inputs_of(model, MANY)).coefficients.argmax(1)
    truth = torch.tensor(["abc".index(row["task"]) for row in rows])
    assert int((after == truth).sum()) > int((before == truth).sum())
    assert CliRunner().invoke(app, ["verify", str(folder)]).exit_code == 0
    assert json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)["calibrated"]


def test_a_calibration_of_another_bundle_is_refused(bundle, tmp_path):
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    model = mergetool.load_bundle(folder)
    calibrate(model, labelled(model, MANY))
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    with pytest.raises(SourceError, match="made for another bundle"):
        mergetool.load_bundle(folder)
    (folder / "calibration.json").write_text("{}")
    with pytest.raises(SourceError, match="cannot be read"):
        mergetool.load_bundle(folder)
    (folder / "calibration.json").unlink()
    mergetool.load_bundle(folder)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"text": "w1"}], "has no field `task`"),
        ([{"text": "w1", "task": "x"}], "'x'"),
        ([{"text": "w1", "task": "a"}], "no row is of task 'b'"),
    ],
)
def test_calibration_needs_rows_of_every_task(bundle, tmp_path, rows, says):
    with pytest.raises(SourceError, match=says):
        calibrate(mergetool.load_bundle(bundle), rows)
    assert not (bundle / "calibration.json").exists()


def test_answers_are_marked_where_tasks_and_classes_are_known(bundle, tmp_path):
    """Counted once more by hand."""
    model = mergetool.load_bundle(bundle)
    answered = list(answers(model, ROWS))
    labels = [answer["class"] if n % 2 else "no such" for n, answer in enumerate(answered)]
    tasks = [answer["task"] if n % 3 else "c" for n, answer in enumerate(answered)]
    told = [{**row, "task": tasks[n], "label": labels[n]} for n, row in enumerate(ROWS)]
    file = write_rows(tmp_path / "rows.jsonl", told)
    shown = CliRunner().invoke(app, ["route", str(bundle), "--input", str(file), "--labels", "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    right = [row["task"] == answer["task"] for row, answer in zip(told, answered, strict=True)]
    strict = [each and n % 2 == 1 for n, each in enumerate(right)]
    for task in sorted(set(tasks)):
        mine = [n for n, row in enumerate(told) if row["task"] == task]
        counts = [sum(answered[n]["task"] == other for n in mine) for other in "abc"]
        assert found["confusion"]["abc".index(task)] == counts
        (figures,) = [each for each in found["figures"] if each["task"] == task]
        assert figures["right"] == pytest.approx(sum(right[n] for n in mine) / len(mine))
        assert figures["strict"] == pytest.approx(sum(strict[n] for n in mine) / len(mine))
    assert found["figures"][-1]["task"] == "all"
    assert found["figures"][-1]["right"] == pytest.approx(sum(right) / len(right))
    assert found["figures"][-1]["right_low"] < found["figures"][-1]["right"] < found["figures"][-1]["right_high"]
    asked = ["route", str(bundle), "--input", str(file)]
    table = CliRunner().invoke(app, [*asked, "--labels"]).stdout
    assert "class too" in table
    unmarked = CliRunner().invoke(app, [*asked, "-o", str(tmp_path / "page")])
    assert unmarked.exception.fix == "mark the answers: --labels"
    shown = CliRunner().invoke(app, [*asked, "--labels", "-o", str(tmp_path / "page")])
    assert (shown.exit_code, shown.stdout) == (0, table)
    kept = json.loads((tmp_path / "page" / "marks.json").read_text("utf-8"))
    assert {key: kept[key] for key in found} == found
    assert kept["wrong"] == strict.count(False)
    assert (tmp_path / "page" / "marks.html").is_file()
    write_rows(file, [{**row, "task": "x"} for row in told])
    refused = CliRunner().invoke(app, ["route", str(bundle), "--input", str(file), "--labels"])
    assert isinstance(refused.exception, SourceError)
    assert "name one of the tasks a, b, c" in refused.exception.fix

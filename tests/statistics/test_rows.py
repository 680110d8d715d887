"""Calibration data: what a file may hold, and what is said of one that is wrong."""

import json
import shutil

import pytest
import transformers

import mergetool
from mergetool import PlanError, SourceError
from mergetool.statistics.rows import Fields, read_rows
from mergetool.testing.classifiers import tiny_config
from tests.statistics.networks import write_classifier, write_dense, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    write_classifier(folder / "bert")
    write_dense(folder / "llama")
    return folder


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def test_fields_can_have_any_name(tmp_path):
    path = written(tmp_path, {"sentence": "one", "other": "two", "class": 1}, "", {"sentence": [3, 4]})
    rows = read_rows(path, Fields("sentence", "other", "class"))
    assert [(row.place, row.text, row.pair) for row in rows] == [
        (f"{path}:1", "one", "two"),
        (f"{path}:3", (3, 4), None),
    ]


def test_only_as_many_rows_are_read_as_are_asked_for(tmp_path):
    path = written(tmp_path, *({"text": str(number)} for number in range(5)), "this is not read")
    assert [row.text for row in read_rows(path, Fields(), 3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("rows", "line", "told", "fix"),
    [
        (["not json"], 1, "is no JSON: not json", '{"text": "an input"}'),
        ([{"text": "w1", "label": 0}, "[1, 2]"], 2, "is no JSON object", '{"text": "an input"}'),
        ([{"text": "w1", "label": 0}, {"txt": "w2"}], 2, "has no field 'text', but 'txt'", "field: txt"),
        ([{"text": ""}], 1, "neither a text nor a list of ids", "an input"),
        ([{"text": 5}], 1, "field 'text' is 5", "an input"),
        ([{"text": [1, -2]}], 1, "neither a text nor a list of ids", "an input"),
        ([{"text": "w1", "pair": 4}], 1, "field 'pair' is no text", "in quotes"),
        ([{"text": "w1", "label": "excellent"}], 1, "'excellent' is outside the model's head", "bad, fair, good"),
        ([{"text": "w1", "label": 0}, {"text": "w1", "label": 3}], 2, "class 3 is outside", "0 to 2"),
        ([{"text": "w1", "label": True}], 1, "field 'label' is true", '{"label": 0}'),
        ([{"text": "w1"}], 1, "has no field 'label'", "labels: sampled"),
        ([{"text": [5, 64], "label": 0}], 1, "has the token 64, and the model has 64", "tokenizer"),
        ([{"text": "w1 " * 40, "label": 0}], 1, "has 40 tokens, and the model takes 32 at most", "length: 32"),
    ],
)
def test_a_wrong_row_is_named_by_its_line(place, tmp_path, rows, line, told, fix):
    path = written(tmp_path, *rows)
    with pytest.raises(SourceError, match=told) as error:
        mergetool.measure(place / "bert", "fisher", path, labels="given", cache=tmp_path)
    assert error.value.where.endswith(f"rows.jsonl:{line}")
    assert fix in error.value.fix
    assert not (tmp_path / "statistics").exists()


def test_fixes_can_be_followed(place, tmp_path):
    more = {"labels": "given", "cache": tmp_path}
    cut = mergetool.measure(
        place / "bert", "fisher", written(tmp_path, {"text": "w1 " * 40, "label": 0}), length=32, **more
    )
    named = written(tmp_path, {"txt": "w1", "label": "good"})
    assert cut.keys() == mergetool.measure(place / "bert", "fisher", named, field="txt", **more).keys()


@pytest.mark.parametrize(
    ("text", "told"), [("", "holds no rows"), ("\n\n", "holds no rows"), (b"\xff\xfe", "no UTF-8")]
)
def test_files_without_rows_are_refused(place, tmp_path, text, told):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=told):
        mergetool.measure(place / "bert", "gram", path, cache=tmp_path)


def test_a_file_that_is_not_there_is_refused(place, tmp_path):
    with pytest.raises(SourceError, match="No such file") as error:
        mergetool.measure(place / "bert", "gram", tmp_path / "rows.jsonl", cache=tmp_path)
    assert error.value.where == str(tmp_path / "rows.jsonl")


def test_a_length_beyond_what_the_model_takes_is_refused(place, tmp_path):
    with pytest.raises(PlanError, match="takes 32 tokens at most"):
        mergetool.measure(place / "bert", "gram", write_rows(tmp_path / "rows.jsonl"), length=64, cache=tmp_path)


def test_ids_need_no_tokenizer_and_text_does(place, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(place / "llama" / name, tmp_path / name)
    found = mergetool.measure(tmp_path, "gram", written(tmp_path, {"text": [5, 6, 7]}), cache=tmp_path)
    assert len(found) == 3 * 7 + 1
    with pytest.raises(SourceError, match="holds no tokenizer") as error:
        mergetool.measure(tmp_path, "gram", written(tmp_path, {"text": "w1"}), cache=tmp_path)
    assert "ids of tokens" in error.value.fix


def test_a_second_segment_goes_to_the_tokenizer(place, tmp_path):
    one = mergetool.measure(place / "bert", "gram", written(tmp_path, {"text": "w1 w2"}), cache=tmp_path)
    two = mergetool.measure(place / "bert", "gram", written(tmp_path, {"text": "w1", "pair": "w2"}), cache=tmp_path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert one[name].shape == two[name].shape


def test_a_folder_without_config_cannot_be_run(place, tmp_path):
    (tmp_path / "model").mkdir()
    shutil.copy(place / "bert" / "model.safetensors", tmp_path / "model" / "model.safetensors")
    with pytest.raises(PlanError, match=r"has no config\.json") as error:
        mergetool.measure(tmp_path / "model", "gram", write_rows(tmp_path / "rows.jsonl"), cache=tmp_path)
    assert "save_pretrained" in error.value.fix


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("T5ForConditionalGeneration", "encoder with a decoder"),
        ("ASTForAudioClassification", "neither tokens nor images"),
    ],
)
def test_networks_that_rows_cannot_go_through_are_refused(tmp_path, kind, told):
    network = getattr(transformers, kind)
    network(tiny_config(network)).save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match=told) as error:
        mergetool.measure(tmp_path / "model", "gram", write_rows(tmp_path / "rows.jsonl"), cache=tmp_path)
    assert "mergetool methods" in error.value.fix

"""Entries are put into the text of JSON files as if these had been read and written."""

import json
import tracemalloc

import pytest

from mergetool.checkpoints.json_text import with_entries
from mergetool.checkpoints.tokens_added import AddedToken, with_tokens

ENTRIES = ['{"id": 7}', '{"id": 8}']


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ('{"model": {"added": [1, "]"]}, "added": [{"id": 1}], "z": 1}', [{"id": 1}]),
        ('{"added": []}', []),
        ('{ "added" : null, "b": "x" }', []),
        ('{"a": "\\\\", "b": "\\"added\\": [", "added": [ {"id": "}"} ]}\n', [{"id": "}"}]),
        ('{"a": ["added"], "b": "added"}', []),
        ("{}", []),
        ("{\n}\n", []),
        ('{"a": 1}\n', []),
    ],
)
def test_a_list_grows_wherever_it_stands(text, before):
    grown = json.loads(b"".join(with_entries(text.encode(), "added", ENTRIES, b"[]")))
    assert grown.pop("added") == [*before, {"id": 7}, {"id": 8}]
    rest = json.loads(text)
    rest.pop("added", None)
    assert grown == rest


def test_an_object_grows_and_all_else_stays_as_it_was_written():
    text = '{\n  "x": 1.50,\n  "added": {"1": {"a": "ü"}}\n}\n'
    grown = b"".join(with_entries(text.encode(), "added", ['"2": {}'], b"{}")).decode()
    assert grown == '{\n  "x": 1.50,\n  "added": {"1": {"a": "ü"}, "2": {}}\n}\n'


def test_many_tokens_are_added_in_less_memory_than_the_file_takes(tmp_path):
    words = [f"w{number}" for number in range(5_000)]
    whole = {"model": {"vocab": {word: n for n, word in enumerate(words)}, "merges": [["w", "1"]] * 5_000}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    added = [AddedToken(5_000 + number, f"x{number}", {}) for number in range(10_000)]
    tracemalloc.start()
    try:
        size = sum(map(len, with_tokens(tmp_path, added)["tokenizer.json"]))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    made = json.loads(b"".join(with_tokens(tmp_path, added)["tokenizer.json"]))
    assert [each["content"] for each in made["added_tokens"]] == [each.text for each in added]
    assert peak < size / 2

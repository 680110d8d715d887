"""Vocabularies of all kinds of files: SentencePiece without its library, lists of words, added tokens beside them."""

import json

import pytest
import transformers as hf

import mergetool
from mergetool.checkpoints.sentencepiece import pieces_in
from mergetool.checkpoints.vocabulary import PackedTexts, tokens_of
from tests.words.models import SPECIAL, build, opened, train, vocabulary


def field(number, content):
    """A field of a SentencePiece file: its number, its length, its content."""
    length, told = len(content), b""
    while length > 127:
        told, length = told + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + told + bytes([length]) + content


def model_file(pieces):
    """A SentencePiece model with these pieces, their scores and kinds, and a trainer's settings behind them."""
    made = b""
    for text, kind in pieces:
        piece = field(1, text.encode()) + b"\x15\x00\x00\x80\xbf" + (bytes([0x18, kind]) if kind != 1 else b"")
        made += field(1, piece)
    return made + field(2, b"\x18\x02" + b"x" * 300)


PIECES = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("<0x0A>", 6), ("▁the", 1), ("ä" * 90, 1)]


def test_the_pieces_of_a_sentencepiece_model_are_read_without_its_library(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_file(PIECES))
    (tmp_path / "added_tokens.json").write_text('{"<pad>": 6}')
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"7": {"content": "<tool>"}}}')
    expected = {n: text for n, (text, _) in enumerate(PIECES)} | {6: "<pad>", 7: "<tool>"}
    assert tokens_of(tmp_path) == expected


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_sentencepiece_model_has_no_tokens_to_read(tmp_path, cut):
    (tmp_path / "tokenizer.model").write_bytes(model_file(PIECES)[:-cut])
    assert tokens_of(tmp_path) is None
    with pytest.raises(ValueError, match=r"ends inside|kind"):
        pieces_in(model_file(PIECES)[:-cut])


def test_an_empty_sentencepiece_model_has_no_pieces():
    assert pieces_in(b"") == []


def as_slow(folder, kind):
    """The files that tokenizers had before tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocab = content["model"]["vocab"]
    if kind == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(vocab))
        merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in content["model"]["merges"]]
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        name = "GPT2Tokenizer"
    else:
        (folder / "vocab.txt").write_text("\n".join(sorted(vocab, key=vocab.get)))
        name = "BertTokenizer"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(("family", "file"), [("gpt2", "vocab.json"), ("bert", "vocab.txt")])
def test_tokens_are_added_to_a_tokenizer_without_tokenizer_json(tmp_path, family, file):
    size = 300 if family == "gpt2" else 60
    special = [*SPECIAL, "[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"] if family == "bert" else SPECIAL
    a = as_slow(build(tmp_path / "a", family, "stories", 1, size=size, special=special), file)
    b = build(tmp_path / "b", family, "letters", 2, size=size)
    before = vocabulary(a)
    recipe = {"models": {"a": str(a), "b": str(b)}, "merge": {"method": "linear"}}
    tokenizer = {"source": "union", "tokens": {"<tool>": {}}}
    result = mergetool.run({**recipe, "tokenizer": tokenizer}, output=tmp_path / "out").path
    found = vocabulary(result)
    assert {token: found[token] for token in before} == before
    assert found.keys() == before.keys() | vocabulary(b).keys() | {"<tool>"}
    assert sorted(found.values()) == list(range(opened(result).config.vocab_size))
    assert hf.AutoTokenizer.from_pretrained(result)("the <tool>").input_ids.count(found["<tool>"]) == 1


def test_two_numbers_of_one_text_stay_where_they_are(tmp_path):
    """A list of words may hold a word twice: rows of models with that list are not moved."""
    words = ["<unk>", "<s>", "</s>", "<pad>", "sea", "star", "sea", "town"]
    folders = [build(tmp_path / name, "bert", "stories", n, size=60, rows=8) for n, name in enumerate("ab")]
    for folder, order in zip(folders, (words, [*words[:6], "town", "sea"]), strict=True):
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("\n".join(order))
    recipe = {"models": {"a": str(folders[0]), "b": str(folders[1])}, "merge": {"method": "linear"}}
    counts = mergetool.plan(recipe).words.rows["bert.embeddings.word_embeddings.weight"]
    assert counts == {"a": {"a": 8}, "b": {"b": 8}}


def test_the_trained_tokenizers_differ():
    assert train("bpe", "stories", 300).get_vocab() != train("bpe", "letters", 300).get_vocab()


def test_texts_that_are_kept_are_what_they_were():
    texts = {7: "▁the", 0: "", 3: "\ud800 lone", 12: "猫"}
    packed = PackedTexts(texts)
    assert packed == texts
    assert list(packed) == sorted(texts)
    assert packed.get(4) is packed.get(13) is None

"""What is compared of two mixtures: rows of gates as numbers, all else as one digest, whatever names they are under."""

import hashlib
import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Whitespace

SPECIAL = ("<s>", "</s>")
_LEAVES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def write_tokenizers(folder: Path) -> None:
    """For the bases of both families, of the kind that transformers opens for each."""
    _write_words(folder / "llama" / "base")
    _write_letters(folder / "qwen2" / "base")


def _write_letters(folder: Path) -> None:
    """Single characters as tokens, and no first one."""
    made = Tokenizer(BPE({letter: index for index, letter in enumerate(["</s>", *"w0123456789\u0120"])}, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_words(folder: Path) -> None:
    """Words w0, w1 ... as tokens, behind a first and a last one."""
    words = [*SPECIAL, *(f"w{index}" for index in range(38))]
    made = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    made.pre_tokenizer = Whitespace()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def taken_apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One matrix of one expert under each name, in the words of Qwen."""
    found = {}
    for own, tensor in tensors.items():
        name = own.replace("block_sparse_moe", "mlp")
        place, _, leaf = name.rpartition(".experts.")
        if leaf in ("gate_up_proj", "down_proj"):
            parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
            for number, expert in enumerate(tensor):
                for part, rows in zip(parts, np.split(expert, len(parts)), strict=True):
                    found[f"{place}.experts.{number}.{part}.weight"] = rows
        else:
            short = next((word for word in _LEAVES if f".{word}." in name), None)
            found[name.replace(f".{short}.", f".{_LEAVES[short]}.") if short else name] = tensor
    return found


def compared(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gates by name, and the SHA-256 of the names and values of all other tensors."""
    every = taken_apart(tensors)
    gates = {name: value for name, value in every.items() if name.endswith("gate.weight")}
    digest = hashlib.sha256()
    for name in sorted(every.keys() - gates.keys()):
        digest.update(name.encode() + np.ascontiguousarray(every[name], np.float32).tobytes())
    return gates | {"digest": np.frombuffer(digest.digest(), np.uint8)}

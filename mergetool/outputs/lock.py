"""The lock, which says how a result came about, and what is told of it."""

import hashlib
import json
import platform
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool._version import __version__, installed
from mergetool.methods.group import Note
from mergetool.outputs.card import card
from mergetool.outputs.changed import changes_by_role
from mergetool.outputs.push import read_lock
from mergetool.outputs.record import Record
from mergetool.outputs.redaction import redacted
from mergetool.outputs.result import Result
from mergetool.outputs.staging import LOCK_NAME
from mergetool.planning import Plan
from mergetool.planning.graph import BASE
from mergetool.planning.parents import label
from mergetool.tensors.io import sha256_file
from mergetool.tensors.source import FileStamp
from mergetool.tensors.writer import write_file


def same_content(plan: Plan, digests: Mapping[str, str]) -> Iterator[str]:
    """Models whose files hold the same as another's, though they lie elsewhere: what was planned could not tell."""
    seen: dict[tuple[str, ...], tuple[str, set[Path]]] = {}
    for model, source in plan.sources.items():
        content = tuple(sorted(digests.get(str(stamp.path), "") for stamp in source.files))
        places = {stamp.path.resolve() for stamp in source.files}
        if not content or "" in content:
            continue
        other, others = seen.setdefault(content, (model, places))
        if other != model and others != places:
            consequence = "its task vector is zero" if other == BASE else "it counts twice"
            yield f"model {model!r} holds the same as {label(other)}, byte for byte: {consequence}"


def summary(notes: Mapping[str, Sequence[Note]]) -> dict[str, int]:
    """How many tensors each remark is about. Numbers that were measured have no scale: the lock has them."""
    return dict(Counter(note for texts in _remarks(notes).values() for note in texts).most_common())


def _measured(notes: Mapping[str, Sequence[Note]]) -> dict[str, dict[str, float]]:
    """Numbers that methods measured, by tensor."""
    measured = {name: dict(note for note in told if not isinstance(note, str)) for name, told in notes.items()}
    return {name: numbers for name, numbers in measured.items() if numbers}


def _remarks(notes: Mapping[str, Sequence[Note]]) -> dict[str, list[str]]:
    """All other notes."""
    remarks = {name: [note for note in told if isinstance(note, str)] for name, told in notes.items()}
    return {name: texts for name, texts in remarks.items() if texts}


def describe_run(plan: Plan, folder: Path, key: str, record: Record, result: Result) -> None:
    """Model card, and the lock of everything that lies in an unfinished folder by now; `key` is the plan's."""
    write_file(folder / "README.md", card(plan, changes_by_role(plan, folder)))
    lock = _lock(plan, key, record, result)
    weights = set(lock["output"]["files"])
    written = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    names = (path.relative_to(folder).as_posix() for path in written)
    others = sorted(name for name in names if name not in weights)
    lock["output"]["files"] |= {name: sha256_file(folder / name) for name in others}
    write_file(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")


def _lock(plan: Plan, key: str, record: Record, result: Result) -> dict[str, Any]:
    document = redacted(plan.recipe.document, plan.recipe.folder)
    recipe = json.dumps(document, sort_keys=True, default=str)
    return {
        "mergetool": __version__,
        "plan": key,
        "recipe": document,
        "recipe_sha256": hashlib.sha256(recipe.encode()).hexdigest(),
        "settings": redacted(plan.recipe.settings, plan.recipe.folder),
        "seed": plan.seed,
        "versions": {name: installed(name) for name in ("torch", "safetensors", "numpy", "pydantic")}
        | {"python": platform.python_version(), "platform": sys.platform},
        "inputs": {
            name: plan.recipe.past.inputs.get(name) or [_input(plan, record, name, stamp) for stamp in stamps]
            for name, stamps in plan.stamps.items()
        },
        "origins": {
            name: [redacted(vars(origin), plan.recipe.folder) for origin in origins]
            for name, origins in plan.origins.items()
        },
        "vocabulary": plan.words.rows,
        "resolved_sha256": _resolved(plan),
        **({"results": list(plan.points)} if plan.points else {}),
        **({"inner": _inner(plan)} if plan.inner else {}),
        **({"statistics": record.statistics} if record.statistics else {}),
        "output": {"dtype": plan.recipe.output.dtype, "files": dict(sorted(record.outputs.items()))},
        "notes": _remarks(record.notes),
        "measured": _measured(record.notes),
        "warnings": redacted(result.warnings, plan.recipe.folder),
        "run": {
            "seconds": round(result.seconds, 3),
            "bytes_read": result.bytes_read,
            "bytes_written": result.bytes_written,
            "peak_memory": result.peak_memory,
            "resumed": result.resumed,
            "processes": result.num_processes,
            "device": record.device,
            **({"device_chosen": record.why} if record.why else {}),
        },
    }


def _inner(plan: Plan) -> dict[str, Any]:
    """What the locks say of results that were made for this one and are gone."""
    kept = ("plan", "resolved_sha256", "inner", "output", "notes", "measured", "run")
    locks = {name: read_lock(each.output) for name, each in plan.inner.items() if each.output is not None}
    return {name: {key: lock[key] for key in kept if key in lock} for name, lock in locks.items()}


def _input(plan: Plan, record: Record, name: str, stamp: FileStamp) -> dict[str, Any]:
    digest = record.inputs.get(str(stamp.path))
    return {"file": _place(plan, name, stamp.path), "size": stamp.size, "sha256": digest}


def _resolved(plan: Plan) -> str:
    """SHA-256 of what becomes of every tensor: method, inputs, numbers, and rows."""
    numbers = [
        [
            [slot.spec.name for slot in step.slots],
            step.operation.name,
            [[operand.source, operand.tensor, operand.view.name] for operand in step.operands],
            dict(step.operation.told),
        ]
        for step in plan.steps
    ]
    told = [numbers, plan.words.digest] if plan.words.digest else numbers
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()


def _place(plan: Plan, name: str, path: Path) -> str:
    """Where an input file is: on the Hub, or for people who know the machine."""
    for origin in plan.origins.get(name, ()):
        if origin.repo and origin.commit in path.parts:
            return f"{origin.repo}@{origin.commit}/{path.name}"
    return str(redacted(str(path), plan.recipe.folder))

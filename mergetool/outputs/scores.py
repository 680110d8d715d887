"""Scores of a result, kept beside it: `NAME.evaluation.json`, which says of which weights they are."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergetool._version import __version__
from mergetool.evaluate.scores import Evaluation, TaskScores
from mergetool.outputs.push import read_lock
from mergetool.tensors.writer import write_file


def scores_path(folder: Path) -> Path:
    """Where the scores of a result are kept."""
    folder = folder.absolute()
    return folder.with_name(f"{folder.name}.evaluation.json")


def keep_scores(folder: Path, found: Evaluation) -> Path:
    """Keep scores of a result, beside those that are known of the same weights. Raises SourceError, OutputError."""
    digest = weights_digest(read_lock(folder))
    known = kept_scores(folder)
    joined = found if known is None else known.joined(found)
    kept = {
        "mergetool": __version__,
        "weights": digest,
        "tasks": _listed(joined.tasks),
        "parents": {name: _listed(scores) for name, scores in joined.parents.items()},
    }
    path = scores_path(folder)
    write_file(path, json.dumps(kept, ensure_ascii=False) + "\n")
    return path


def kept_scores(folder: Path) -> Evaluation | None:
    """What is known of a result; None where nothing is, or where the scores are of other weights than lie there now."""
    try:
        kept = json.loads(scores_path(folder).read_text("utf-8"))
        if kept["weights"] != weights_digest(read_lock(folder)):
            return None
        parents = {str(name): _read(scores) for name, scores in kept["parents"].items()}
        return Evaluation(str(folder), _read(kept["tasks"]), parents)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):  # as good as none
        return None


def weights_digest(lock: Mapping[str, Any]) -> str:
    """One SHA-256 over all weights that a lock names."""
    files = {name: digest for name, digest in lock["output"]["files"].items() if name.endswith(".safetensors")}
    return hashlib.sha256(json.dumps(sorted(files.items())).encode()).hexdigest()


def _listed(scores: Mapping[str, TaskScores]) -> list[dict[str, Any]]:
    return [each.as_dict() for each in scores.values()]


def _read(scores: list[Any]) -> dict[str, TaskScores]:
    found = [TaskScores.of(each) for each in scores]
    return {each.task: each for each in found}

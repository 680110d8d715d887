"""Scores in a finished result: in its card for people, in `.eval_results` for the Hub, and in the lock.

https://huggingface.co/docs/hub/eval-results (2026): a list of results on datasets of the Hub, where leaderboards take
them. Scores on tasks of one's own have no place there; the card has all.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mergetool.evaluate.scores import Evaluation, TaskScores
from mergetool.outputs.push import read_lock
from mergetool.outputs.staging import LOCK_NAME
from mergetool.tensors.io import sha256_file
from mergetool.tensors.writer import make_folder, write_file

RESULTS_NAME = ".eval_results/mergetool.yaml"
_CARD = "README.md"
_TITLE = "## Scores\n"
_BEFORE = "## Recipe\n"


def tell_scores(folder: Path, found: Evaluation) -> bool:
    """Write them into a result; False where its card is no longer what the run has written, and is left alone.

    The lock comes last: should this be ended in between, doing it again mends it. Raises SourceError, OutputError.
    """
    lock, path = read_lock(folder), folder / _CARD
    files = lock["output"]["files"]
    card = path.read_text("utf-8", errors="replace") if path.is_file() else ""
    plain = _without_scores(card)
    if not {_sha256(card), _sha256(plain)} & {files.get(_CARD), lock.get("card")}:
        return False
    entries = [_entry(each) for each in found.tasks.values() if each.dataset]
    if entries:
        make_folder((folder / RESULTS_NAME).parent)
        write_file(folder / RESULTS_NAME, _yaml(entries))
        files[RESULTS_NAME] = sha256_file(folder / RESULTS_NAME)
    before, title, behind = plain.partition(_BEFORE)
    write_file(path, f"{before}{_table(found)}{title}{behind}")
    files[_CARD], lock["card"] = sha256_file(path), _sha256(plain)
    lock["scores"] = [each.facts() for each in found.tasks.values()]
    write_file(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")
    return True


def _without_scores(card: str) -> str:
    """The card as the run has written it."""
    return re.sub(rf"^{_TITLE}.*?(?=^## |\Z)", "", card, count=1, flags=re.MULTILINE | re.DOTALL)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _table(found: Evaluation) -> str:
    rows = "".join(_row(each, found) for each in found.tasks.values())
    return (
        f"{_TITLE}\nOf tasks of lm-eval, with 95 % intervals; kept: the share of the best parent's score.\n\n"
        f"| task | metric | items | score | interval | kept |\n|---|---|---|---|---|---|\n{rows}\n"
    )


def _row(scores: TaskScores, found: Evaluation) -> str:
    facts, kept = scores.facts(), "-"
    if parents := found.parents_on(scores.task):
        told = scores.kept_of(parents)
        share = told["retention"]
        kept = "-" if share is None else f"{share:.1%} of {Path(told['best_parent']).name}"
    interval = f"{facts['low']:.4f} to {facts['high']:.4f}"
    return f"| {scores.task} | {scores.metric} | {facts['items']} | {scores.score:.4f} | {interval} | {kept} |\n"


def _entry(scores: TaskScores) -> Mapping[str, Any]:
    """What the Hub knows of one result."""
    dataset = {"id": scores.dataset["id"], "task_id": scores.dataset.get("config", "default")}
    date = datetime.now(UTC).date().isoformat()
    return {"dataset": dataset, "value": scores.score, "date": date, "notes": f"lm-eval {scores.task}, {scores.metric}"}


def _yaml(entries: list[Mapping[str, Any]]) -> str:
    import yaml

    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)

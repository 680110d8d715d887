"""Scores in a finished result: in its card for people, in `.eval_results` for the Hub, and in the lock.

https://huggingface.co/docs/hub/eval-results (2026): a list of results on datasets of the Hub, where leaderboards take
them. Scores on tasks of one's own have no place there; the card has all.
"""

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

    The lock comes last: should this be ended in between, evaluating again mends it. Raises SourceError, OutputError.
    """
    lock = read_lock(folder)
    files = lock["output"]["files"]
    if not (folder / _CARD).is_file() or sha256_file(folder / _CARD) != files.get(_CARD):
        return False
    entries = [_entry(each) for each in found.tasks.values() if each.dataset]
    if entries:
        make_folder((folder / RESULTS_NAME).parent)
        write_file(folder / RESULTS_NAME, _yaml(entries))
        files[RESULTS_NAME] = sha256_file(folder / RESULTS_NAME)
    write_file(folder / _CARD, _with_scores((folder / _CARD).read_text("utf-8"), found))
    files[_CARD] = sha256_file(folder / _CARD)
    lock["scores"] = [each.facts() for each in found.tasks.values()]
    write_file(folder / LOCK_NAME, json.dumps(lock, indent=2, ensure_ascii=False) + "\n")
    return True


def _with_scores(card: str, found: Evaluation) -> str:
    """The card with a table, in place of an earlier one."""
    card = re.sub(rf"^{_TITLE}.*?(?=^## |\Z)", "", card, count=1, flags=re.MULTILINE | re.DOTALL)
    before, title, behind = card.partition(_BEFORE)
    return f"{before}{_table(found)}{title}{behind}"


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

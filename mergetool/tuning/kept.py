"""Answers that a search folder holds, by candidate and item, whatever recipe they were asked for.

An answer depends on what the candidate is (`Candidates.identity`: settings, numbers, inputs by content) and on what
the item is (`TaskItems.keys`). An edited recipe therefore finds every answer that it needs again and that is there.
A failure is an answer only to the very search that met it: another batch size may be all that was missing.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergetool.evaluate.items import Score


@dataclass
class Answers:
    """What one candidate, or model, is known to answer."""

    scores: dict[str, Score] = field(default_factory=dict)
    """By the items' keys."""
    failure: str | None = None
    digest: str | None = None
    """Of the merged weights, where that was asked for."""
    seconds: tuple[float, float] = (0.0, 0.0)
    """For merging and for evaluating."""


class Kept:
    """The answers of a folder, by the identity of who gave them. `header` is that of the search that goes on."""

    def __init__(self, header: Mapping[str, Any]) -> None:
        self._header = header
        self._answers: dict[str, Answers] = {}
        self.num_answers = 0
        self.lost: Counter[str] = Counter()
        """Answers that cannot count any more, by what has changed since."""

    def of(self, identity: str) -> Answers:
        """What is known of a candidate; nothing, if nothing is."""
        return self._answers.get(identity, Answers())

    def take(self, record: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        """Learn from a line, which stands under `header`."""
        _, subject, items = record["question"]
        count = sum(map(len, items.values()))
        self.num_answers += count
        if reason := self._changed(subject, header):
            self.lost[reason] += count
        if "of" not in record:
            return
        known = self._answers.setdefault(record["of"], Answers())
        if "failure" in record:
            known.failure = record["failure"] if header == self._header else known.failure
            return
        known.digest = record.get("digest", known.digest)
        known.seconds = (known.seconds[0] + record["seconds"][0], known.seconds[1] + record["seconds"][1])
        for task, (values, softs) in record["scores"].items():
            keys = header["tasks"][task]
            triples = zip(items[task], values, softs, strict=True)
            known.scores |= {keys[item]: Score(value, soft) for item, value, soft in triples}

    def _changed(self, subject: Any, header: Mapping[str, Any]) -> str | None:
        """Why this search cannot have asked this of this subject, as far as that can be told; None: it may have."""
        then, now = header.get("inputs"), self._header["inputs"]
        if not isinstance(then, Mapping):
            return "it was written by another version of mergetool"
        other = [name for name in then if name in now and then[name] != now[name]]
        if isinstance(subject, str):
            other = [name for name in other if name == subject]
        if other:
            return f"{' and '.join(map(_label, other))} {'has' if len(other) == 1 else 'have'} changed since"
        there, here = header.get("made_with", {}), self._header.get("made_with", {})
        differ = [name for name, told in there.items() if here.get(name) != told]
        return f"{differ[0]} is {here.get(differ[0])} now, and was {there[differ[0]]}" if differ else None


def _label(name: str) -> str:
    return "the base" if name == "base" else f"model {name!r}"

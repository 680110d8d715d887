"""Whether an input is like those of any task: scores of what a first pass has read, and the doubt that they raise.

What the scores are, and what they are held against, is in `mergetool.kernels.known`; `mergetool.bundle.reference`
measures the latter as a bundle is made. After a calibration its examples raise doubt instead
(`mergetool.bundle.examples`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mergetool.bundle.calibration import Calibration
from mergetool.bundle.examples import Examples
from mergetool.bundle.files import REFERENCE, read_all
from mergetool.bundle.first_pass import FirstPass
from mergetool.bundle.manifest import Unknown
from mergetool.kernels.known import doubt, seen, whole


class Knowing:
    """What a bundle knows of its tasks' inputs. Only ever read, so safe for several threads."""

    def __init__(
        self, unknown: Unknown, table: Tensor | None, markup: Tensor | None, examples: Examples | None = None
    ) -> None:
        """`table` (tasks, vocabulary): tokens that training has seen; `markup`: tokens that say nothing.

        `examples`: those of a calibration.
        """
        self._unknown = unknown
        self._table = table
        self._markup = markup
        self.examples = examples

    @classmethod
    def read(cls, unknown: Unknown, folder: Path, found: Calibration | None, first: FirstPass) -> Self:
        """That of a bundle in a folder, with its calibration. Raises SourceError."""
        path = folder / REFERENCE
        stored = read_all(path) if path.is_file() else {}
        return cls(unknown, stored.get("seen"), stored.get("markup"), Examples.read(folder, found, first.shape))

    def to(self, device: torch.device) -> None:
        """Keep everything on `device`."""
        self._table = None if self._table is None else self._table.to(device)
        self._markup = None if self._markup is None else self._markup.to(device)
        if self.examples is not None:
            self.examples.to(device)

    @property
    def most(self) -> float:
        """The most doubt about a known input."""
        return self._unknown.doubt if self.examples is None else self.examples.most

    def judge(self, first: FirstPass, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Distances (samples, tasks), and doubt (samples,): 0 about usual inputs, 1 about strange ones.

        About inputs without any word it is infinite.
        """
        if self.examples is None:
            distances, doubts = self._judge_by_scores(first, inputs)
        else:
            distances, doubts = first.judge(inputs, self.examples)
        words = self._words(inputs)
        return distances, doubts if words is None else doubts.masked_fill(~words.any(1), float("inf"))

    def _judge_by_scores(self, first: FirstPass, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        distances, scored = self.scores(first, inputs)
        places = [place for place, name in enumerate(self._unknown.scores) if name in scored]
        found = torch.stack([scored[self._unknown.scores[place]] for place in places], -1)
        strange, usual = (
            torch.tensor([values[place] for place in places], device=found.device) for values in self._anchors
        )
        return distances, doubt(found, strange, usual)

    @property
    def _anchors(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return self._unknown.strange, self._unknown.usual

    def scores(self, first: FirstPass, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Distances (samples, tasks), and all scores that can be told of these inputs, (samples,) each."""
        reading, bases = first.read(inputs, closely=True), first.bases
        distances = first.compare(reading.pooled)
        nearest, parts = distances.argmin(-1), [reading.parts[place] for place in range(len(bases))]
        scored = {"nearness": -distances.amin(-1), "spread": torch.stack([each.spread for each in parts]).mean(0)}
        words = self._words(inputs)
        if self._table is None or words is None:
            return distances, scored
        assert reading.mask is not None
        scored["seen"], scored["seen_whole"] = seen(self._table, inputs["input_ids"], words, nearest)
        return distances, scored | {"whole": whole(parts, reading.mask, bases, nearest)}

    def _words(self, inputs: Mapping[str, Tensor]) -> Tensor | None:
        """(samples, tokens): which tokens are more than markup; None where inputs are no tokens, or nobody knows."""
        ids = inputs.get("input_ids")
        if ids is None or self._markup is None:
            return None
        words = torch.isin(ids, self._markup, invert=True)
        mask = inputs.get("attention_mask")
        return words if mask is None or mask.shape != ids.shape else words & mask.ne(0)

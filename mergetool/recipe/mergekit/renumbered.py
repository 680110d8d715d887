"""Filters that name layers by their numbers, where layers get other numbers.

mergekit looks for the filters of a model's own settings in the names that tensors have in that model; for those of all
models, in the names of the result. Our overrides match names of the result.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mergetool.recipe.mergekit.filters import Branch

_LAYER = re.compile(r"(?:^|(?<=layers\.)|(?<=layer\.)|(?<=\bh\.)|(?<=block\.)|(?<=blocks\.))\d+(?=\.|$)")


@dataclass(frozen=True)
class Renumbered:
    """Layers `first` and so on of a model, which become layers `place` and so on of the result."""

    first: int
    place: int
    length: int

    def branches(self, lines: Sequence[Branch]) -> Iterator[Branch]:
        """The lines of a setting for names of the result."""
        for line in lines:
            if line.text is None:
                yield line
            else:
                yield from (replace(line, text=text) for text in self.texts(line.text))

    def texts(self, text: str) -> list[str]:
        """What to look for in the result in place of a text in the model."""
        layer_number = _LAYER.search(text)
        if layer_number is None or self.first == self.place:
            return [text]
        before, number, behind = text[: layer_number.start()], layer_number[0], text[layer_number.end() :]
        return [
            f"{before or '.'}{layer - self.first + self.place}{behind or '.'}"
            for layer in range(self.first, self.first + self.length)
            if _is_found(number, str(layer), at_start=not before, at_end=not behind)
        ]


def _is_found(number: str, layer: str, *, at_start: bool, at_end: bool) -> bool:
    """Whether a text with this number is in a name with this layer; at its ends it may be a part of a longer one."""
    if at_start and at_end:
        return number in layer
    if at_start:
        return layer.endswith(number)
    return layer.startswith(number) if at_end else layer == number

"""What is wrong with a mergekit recipe, and what in it has no effect: an error stops, a warning is told and we go on.

mergekit passes over every key that it does not know, so recipes in use are full of them: slips (`dype`), settings one
level too high, parameters of other methods. Such a recipe runs, and here it means the same; but its author is told.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool.errors import RecipeError
from mergetool.recipe.document import Document, Place
from mergetool.recipe.render import suggestion


class Findings:
    """Problems and warnings of one conversion, each with its place in the file."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.problems: list[RecipeError] = []
        self.warnings: list[str] = list(document.warnings)

    def problem(self, place: Place, what: str, fix: str) -> None:
        """Something that has to be mended; others are still looked for."""
        self.problems.append(self.document.error(place, what, fix))

    def warn(self, place: Place, text: str) -> None:
        """Something that people may not have meant."""
        self.warnings.append(f"{self.document.where(place)}: {text}")

    def stop(self, place: Place, what: str, fix: str) -> RecipeError:
        """An error to raise, where what follows makes no sense without the right thing here."""
        return self.document.error(place, what, fix)

    def converted(self, data: Any, marks: Mapping[Place, tuple[int, int]]) -> Document:
        """Our recipe for this file; paths in it are relative to the current folder.

        Raises RecipeError holding every problem found, each once.
        """
        if self.problems:
            raise RecipeError.of(list({str(each): each for each in self.problems}.values()))
        told = list(dict.fromkeys(self.warnings))
        return Document(self.document.name, data, dict(marks), Path.cwd(), warnings=told)

    def at(self, place: Place) -> Any:
        """What is written at a place; None where nothing is."""
        node: Any = self.document.data
        for key in place:
            inside = (isinstance(node, dict) and key in node) or (isinstance(node, list) and key in range(len(node)))
            if not inside:
                return None
            node = node[key]
        return node

    def mapping(self, value: Any, place: Place, known: Sequence[str]) -> Mapping[str, Any]:
        """A mapping that is needed here. Raises RecipeError."""
        if not isinstance(value, dict):
            raise self.stop(place, f"expected a mapping, found {value!r}", f"its keys are: {', '.join(known)}")
        return value

    def stray(self, held: Mapping[str, Any], place: Place, known: Sequence[str], hints: Mapping[str, str]) -> None:
        """Tell of every key that mergekit does not know here. `hints`: keys that people put here -> where they go."""
        for key in held:
            if key not in known:
                hint = hints.get(key) or suggestion(str(key), known)
                self.warn((*place, key), f"mergekit knows no such key here, so it has no effect{_beside(hint)}")

    def idle(self, keys: Iterable[str], place: Place, why: str, known: Sequence[str] = ()) -> None:
        """Tell of parameters that have no effect."""
        for key in keys:
            self.warn((*place, key), f"{why}, so it has no effect{_beside(suggestion(str(key), known))}")


def _beside(hint: str) -> str:
    return f"; {hint}" if hint else ""

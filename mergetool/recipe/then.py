"""The steps after merging (`then`) as they are written, for checks of other sections."""

from collections.abc import Iterator, Mapping
from typing import Any

from mergetool.methods.base import Method
from mergetool.methods.then import After, steps


def step_class(data: Any) -> type[After] | None:
    """The class of a step as it is written, if there is such a step."""
    return steps().get(str(data.get("step"))) if isinstance(data, dict) else None


def steps_in(data: Mapping[str, Any]) -> Iterator[tuple[int, type[After]]]:
    """The steps of a recipe's data that there are, with their places."""
    then = data.get("then")
    for index, each in enumerate(then if isinstance(then, list) else ()):
        if (kind := step_class(each)) is not None:
            yield index, kind


def base_for_steps(data: Mapping[str, Any], kind: type[Method]) -> bool:
    """Whether a method that uses no base may have one for the sake of the steps: they see what was changed of it."""
    return not kind.uses_architecture and any(True for _ in steps_in(data))

"""Open a result as its users will: with transformers, by the class that config.json names, and run it once."""

from pathlib import Path
from typing import Any

from mergetool.errors import SourceError

_MERGE_AGAIN = "merge again; `mergetool plan` tells what does not fit"


def open_and_run(path: Path) -> str:
    """Load a checkpoint, refuse what transformers misses or does not know, and run one step; a summary for people.

    Raises SourceError.
    """
    from mergetool.networks.build import open_whole

    model, told = open_whole(path)
    for words in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(map(str, told.get(words) or ())):
            what = f"{len(names)} {words.replace('_', ' ')} in {type(model).__name__}: {', '.join(names[:5])}"
            raise SourceError(what, str(path), _MERGE_AGAIN)
    return _step(model, path)


def _step(model: Any, path: Path) -> str:
    import torch

    from mergetool.networks.batch import small_batch
    from mergetool.networks.library import first_line

    name = type(model).__name__
    try:
        inputs = small_batch(model)
        with torch.no_grad():
            output = model(**inputs)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        return f"opens as {name}; no step was run ({first_line(error)})"
    floats = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    if not all(bool(torch.isfinite(value).all()) for value in floats):
        raise SourceError(f"one step of {name} gives values that are not finite", str(path), "merge again")
    return f"opens as {name} and runs"

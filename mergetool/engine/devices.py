"""Where the arithmetic happens."""

import os

from mergetool.errors import PlanError


def own_device(asked: str) -> str:
    """The device of this process: each takes its own of a machine's where a kind without a number is asked for."""
    if asked == "auto":
        return "cpu"
    return f"{asked}:{os.environ.get('LOCAL_RANK') or 0}" if asked == "cuda" else asked


def usable_device(name: str) -> str:
    """The device that `--device NAME` means. Raises PlanError for one that cannot be used."""
    import torch

    try:
        device = torch.device("cpu" if name == "auto" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first_line = str(error).strip().splitlines()[0][:200]
        raise PlanError(f"device {name!r} cannot be used: {first_line}", "--device", "use --device cpu") from None
    return str(device)

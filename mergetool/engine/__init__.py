"""Time and machines: workers, read-ahead, memory, progress, resuming, and the files that say what was done."""

from mergetool.engine.execute import Flags, Progress, run_recipe
from mergetool.engine.result import Result

__all__ = ["Flags", "Progress", "Result", "run_recipe"]

"""Time and machines: workers, read-ahead, memory, progress, resuming, and the files that say what was done."""

from mergetool.engine.progress import Progress
from mergetool.engine.run import Flags, run_recipe
from mergetool.outputs.result import Result

__all__ = ["Flags", "Progress", "Result", "run_recipe"]

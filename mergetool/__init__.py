"""Merge neural networks in weight space: strict recipes, streaming, reproducible.

    import mergetool
    result = mergetool.run("recipe.yaml")                                # the whole thing
    merged = mergetool.merge_state_dicts("ties", {"a": a, "b": b}, base=base, density=0.2)

Importing this package imports no torch; the functions that need it do.
"""

from typing import TYPE_CHECKING, Any

from mergetool._version import __version__
from mergetool.errors import (
    EvaluationError,
    HubError,
    MergeError,
    MergetoolError,
    OutputError,
    PlanError,
    RecipeError,
    SourceError,
)

if TYPE_CHECKING:
    from mergetool.analysis.compared import ComparedRuns
    from mergetool.analysis.result import Analysis
    from mergetool.api import (
        analyze,
        change_bundle,
        compare,
        diff,
        load_recipe,
        measure,
        merge_state_dicts,
        plan,
        run,
    )
    from mergetool.arch.derived import Architecture, derive_architecture
    from mergetool.bundle.opening import load_bundle
    from mergetool.methods.base import Method
    from mergetool.outputs.difference import Comparison
    from mergetool.outputs.result import Result

__all__ = [
    "Analysis",
    "Architecture",
    "ComparedRuns",
    "Comparison",
    "EvaluationError",
    "HubError",
    "MergeError",
    "MergetoolError",
    "Method",
    "OutputError",
    "PlanError",
    "RecipeError",
    "Result",
    "SourceError",
    "__version__",
    "analyze",
    "change_bundle",
    "compare",
    "derive_architecture",
    "diff",
    "load_bundle",
    "load_recipe",
    "measure",
    "merge_state_dicts",
    "plan",
    "run",
]

_LAZY = {
    "Analysis": "mergetool.analysis.result",
    "Architecture": "mergetool.arch.derived",
    "ComparedRuns": "mergetool.analysis.compared",
    "Comparison": "mergetool.outputs.difference",
    "Method": "mergetool.methods.base",
    "Result": "mergetool.outputs.result",
    "analyze": "mergetool.api",
    "change_bundle": "mergetool.api",
    "compare": "mergetool.api",
    "derive_architecture": "mergetool.arch.derived",
    "diff": "mergetool.api",
    "load_bundle": "mergetool.bundle.opening",
    "load_recipe": "mergetool.api",
    "measure": "mergetool.api",
    "merge_state_dicts": "mergetool.api",
    "plan": "mergetool.api",
    "run": "mergetool.api",
}


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'mergetool' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)

"""The stage runner: one stage of a plan after the other, wherever the tensors go and whoever works on them."""

from collections.abc import Callable
from typing import Protocol

from mergetool.engine.context import Context
from mergetool.engine.count import CountStage
from mergetool.engine.merge import MergeStage
from mergetool.planning.graph import Stage


class Stages(Protocol):
    """Work on one stage, until it is done."""

    def work(self) -> None: ...


def run_stages(run: Context, shown: Callable[[], None] = lambda: None) -> None:
    """Do all that a plan asks for. `shown` is called once all operands can be read as merging will see them."""
    fits = [stage for stage in run.plan.stages if stage.name in ("fit", "gates", "measure")]
    for stage in fits:
        _kind(stage)(run, stage).work()
    shown()
    for stage in run.plan.stages:
        if stage not in fits:
            _kind(stage)(run, stage).work()


def _kind(stage: Stage) -> Callable[[Context, Stage], Stages]:
    """Who works on a stage of this name. What needs torch is imported only where it is needed."""
    if stage.name in ("fit", "finish"):
        from mergetool.engine.fit import FinishStage, FitStage

        return FitStage if stage.name == "fit" else FinishStage
    if stage.name == "gates":
        from mergetool.engine.gates import GateStage

        return GateStage
    if stage.name == "measure":
        from mergetool.engine.measure import MeasureStage

        return MeasureStage
    if stage.name == "factorise":
        from mergetool.engine.factorise import FactoriseStage

        return FactoriseStage
    return CountStage if stage.name == "count" else MergeStage

"""The stage that measures the gates of a mixture of experts, before anything is written.

What is found is kept beside the weights, in the folder `routing`: a killed run goes on with it, and its report says how
well the gates tell experts apart.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergetool.engine.context import Context
from mergetool.engine.devices import free_device
from mergetool.layouts.experts import GATES, GateSource, SideBySide
from mergetool.methods.base import expect
from mergetool.methods.moe import MixtureOfExperts
from mergetool.networks.gates import CPU, Asked, drawn_gates, gates_from_prompts
from mergetool.planning.graph import BASE, Plan, Stage
from mergetool.tensors.side_files import read_config
from mergetool.tensors.writer import write_file

FOLDER = "routing"
_FILE = "gates.safetensors"
_ALIKE = 5.0
"""A condition number of gates from which on two experts can hardly be told apart."""


class GateStage:
    """After it, the gates can be read like any other tensor."""

    def __init__(self, run: Context, stage: Stage) -> None:
        self._run = run

    def work(self) -> None:
        run, team = self._run, self._run.team
        gates = team.all_gather(self._gates() if team.leads else None)[0]
        source = run.plan.sources[GATES]
        layout = run.plan.recipe.layout
        assert isinstance(source, GateSource)
        assert isinstance(layout, SideBySide)
        run.show({**run.plan.sources, GATES: source.filled(layout.named(run.plan.sources, gates))})

    def _gates(self) -> Tensor:
        """(layers, experts, width), those of a killed run where it had got so far."""
        plan, sink = self._run.plan, self._run.sink
        folder = None if sink.folder is None else sink.folder / FOLDER
        kept = _kept(folder) if folder is not None else None
        gates = self._measured(plan) if kept is None else kept
        report = _report(plan, gates)
        if folder is not None and kept is None:
            _keep(folder, gates, report)
        alike = [layer for layer, each in enumerate(report["layers"]) if each["condition"] > _ALIKE]
        if alike and expect(plan.recipe.method, MixtureOfExperts).needs_prompts:
            self._run.teller.say(
                f"warning: gates of {len(alike)} of {len(gates)} layers can hardly tell the experts apart (condition "
                f"up to {max(each['condition'] for each in report['layers']):.3g}): write prompts that differ more"
            )
        return gates

    def _measured(self, plan: Plan) -> Tensor:
        """On the run's device; on the CPU where that has too little memory, or no float64."""
        device = torch.device(self._run.pool.device)
        try:
            return _measured(plan, self._run.teller.say, CPU if device.type == "mps" else device)
        except torch.OutOfMemoryError:
            free_device(device)
        self._run.teller.say(f"{device} has too little memory: the prompts go through the base on the CPU")
        return _measured(plan, self._run.teller.say, CPU)


def _measured(plan: Plan, say: Any, device: torch.device) -> Tensor:
    method, base = expect(plan.recipe.method, MixtureOfExperts), plan.sources[BASE]
    asked = _asked(plan)
    if method.needs_prompts:
        return gates_from_prompts(method.gate, base, asked, say, device)
    config = read_config(base.folder)
    return drawn_gates(method.gate, asked, config["num_hidden_layers"], config["hidden_size"], plan.seed)


def _asked(plan: Plan) -> Sequence[Asked]:
    """The experts in order; the shared one last, where it has prompts."""
    method = expect(plan.recipe.method, MixtureOfExperts)
    asked = [Asked(name, each.prompts, each.avoid) for name, each in method.experts.items()]
    shared = method.shared
    return [*asked, Asked("shared", shared.prompts, shared.avoid)] if shared is not None and shared.prompts else asked


def _kept(folder: Path) -> Tensor | None:
    try:
        return load_file(folder / _FILE)["gates"]
    except (OSError, SafetensorError, KeyError):
        return None


def _keep(folder: Path, gates: Tensor, report: Mapping[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    write_file(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    save_file({"gates": gates.contiguous()}, folder / f".{_FILE}")
    (folder / f".{_FILE}").replace(folder / _FILE)


def _report(plan: Plan, gates: Tensor) -> dict[str, Any]:
    """How far the gates of each layer are from calling two experts at once."""
    names = [each.name for each in _asked(plan)]
    return {"experts": names, "layers": [_told(names, rows.double()) for rows in gates]}


def _told(names: Sequence[str], rows: Tensor) -> dict[str, Any]:
    values = torch.linalg.svdvals(rows)
    least, most = float(values[-1]), float(values[0])
    condition = most / least if least > 0 else float("inf") if most > 0 and len(names) > 1 else 1.0
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    cosines = (unit @ unit.T).triu(1)
    place = divmod(int(cosines.abs().argmax()), len(names))
    told: dict[str, Any] = {"condition": float(f"{min(condition, 1e30):.6g}")}
    if len(names) > 1:
        told |= {"closest": [names[place[0]], names[place[1]]], "cosine": float(f"{float(cosines[place]):.6g}")}
    return told

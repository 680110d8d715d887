"""`architecture: auto`: derive a spec from the graph of a module, and prove it before anyone uses it.

The module is exported to a graph of ATen operations. Each axis of each parameter starts as an unknown of its own; every
operation equates some of them and pins others (`rules`); what is free in the end is a space that may be permuted, and
one that is only ever met together with another one, in one product, is nested within it (channels within heads).
Then random elements are applied to the weights and the outputs compared in float64: whatever fails is first taken out
of its nest and then declared fixed. A mistake in tracing therefore costs a little freedom, never correctness.

Signs are not found this way, only permutations. Reference: the C2M3 specification, section 4.10.
"""

import logging
import operator
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec

from mergetool.arch.atoms import fresh, pin
from mergetool.arch.call import Call, Value
from mergetool.arch.nesting import spec_of
from mergetool.arch.rules import results_of
from mergetool.arch.spec import ArchSpec
from mergetool.arch.verify import TOLERANCE, failures, general_position, prove, runner, worst
from mergetool.errors import PlanError

_log = logging.getLogger(__name__)
_STATISTICS = ("running_mean", "running_var")


def derive(module: nn.Module, *args: Any, **kwargs: Any) -> ArchSpec:
    """The proved spec of a module, from one batch of inputs `module(*args, **kwargs)`. The module is put in eval mode.

    Raises PlanError if the module cannot be exported (data-dependent control flow) or its spec cannot be proved.
    """
    return proved(traced(module, *args, **kwargs), module, *args, **kwargs)


def traced(module: nn.Module, *args: Any, **kwargs: Any) -> ArchSpec:
    """The spec that the graph suggests, not yet proved. Raises PlanError if the module cannot be exported."""
    module = module.eval()
    try:
        with torch.no_grad():
            program = torch.export.export(module, args, kwargs, strict=False)
    except Exception as error:
        raise PlanError(
            f"the module cannot be traced: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            where="architecture auto",
            fix="write an architecture file and name it under `architecture:`",
        ) from error
    weights = module.state_dict(keep_vars=True)
    trace = _Trace(program, weights)
    return spec_of(weights, trace.parameters, trace.run())


def proved(spec: ArchSpec, module: nn.Module, *args: Any, **kwargs: Any) -> ArchSpec:
    """The spec without what changes the outputs: groups that fail lose their nesting; if that is not it, they stay.

    Raises PlanError if groups that hold one by one do not hold together.
    """
    run, weights = runner(module, *args, **kwargs), general_position(module)
    if worst(run, weights, spec) <= TOLERANCE:
        return spec
    for nested in (True, False):
        for failure in failures(run, weights, spec):
            names = {space.name for space in failure.group.spaces}
            told = "its parts are taken apart" if nested else "it stays fixed"
            _log.warning("architecture auto: %s is no symmetry as traced; %s", failure.group.name, told)
            spaces = {
                name: replace(space, within=None, symmetry=space.symmetry if nested else "fixed")
                if name in names
                else space
                for name, space in spec.spaces.items()
            }
            spec = replace(spec, spaces=spaces)
    prove(run, weights, spec)
    return spec


class _Trace:
    """Runs a graph on axes instead of numbers."""

    def __init__(self, program: ExportedProgram, weights: Mapping[str, Tensor]) -> None:
        self.program = program
        self.weights = weights
        self.parameters: dict[int, Value] = {}  # by identity: tied names are one tensor
        self.values: dict[str, Any] = {}

    def run(self) -> list[Value]:
        """The axes of every tensor in the graph, once all operations have had their say."""
        inputs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        statistics = set(_statistics(self.program.graph))
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node.name] = self._input(node, inputs[node.name], node.name in statistics)
            elif node.op == "call_function":
                self.values[node.name] = self._call(node)
            elif node.op == "output":
                _pin_all(self._operand(node.args))
        return list(_flat(list(self.values.values())))

    def _input(self, node: fx.Node, spec: InputSpec, statistic: bool) -> Any:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return None
        known = self.weights.get(spec.target or "")
        if known is not None and (spec.kind is InputKind.PARAMETER or statistic):
            return self.parameters.setdefault(id(known), Value(fresh(size) for size in value.shape))
        constant = self._constant(spec)
        if constant is None:
            return Value(fresh(size, pinned=True) for size in value.shape)
        return Value(fresh(size, pinned=not _uniform(constant, axis)) for axis, size in enumerate(value.shape))

    def _constant(self, spec: InputSpec) -> Tensor | None:
        if spec.kind is InputKind.USER_INPUT or spec.target is None:
            return None
        constant = self.program.state_dict.get(spec.target, self.program.constants.get(spec.target))
        return constant if isinstance(constant, Tensor) else None

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            return self.values[node.args[0].name][node.args[1]]  # type: ignore[union-attr,index]
        result = node.meta.get("val")
        single = isinstance(result, Tensor)
        results = [result] if single else result if isinstance(result, list | tuple) else []
        shapes = [tuple(int(size) for size in value.shape) for value in results if isinstance(value, Tensor)]
        name, pointwise = "", False
        arguments: dict[str, Any] = {str(k): self._operand(arg) for k, arg in enumerate(node.args)}
        if isinstance(node.target, torch._ops.OpOverload):
            schema = node.target._schema
            name, pointwise = schema.name.removeprefix("aten::"), torch.Tag.pointwise in node.target.tags
            positional = {a.name: self._operand(v) for a, v in zip(schema.arguments, node.args, strict=False)}
            arguments = positional | {key: self._operand(value) for key, value in node.kwargs.items()}
        values = [Value(axes) for axes in results_of(name, Call(arguments, shapes), pointwise=pointwise)]
        return values[0] if single else values

    def _operand(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value.name]
        if isinstance(value, list | tuple):
            return [self._operand(item) for item in value]
        return value


def _flat(values: Any) -> Iterator[Value]:
    if isinstance(values, Value):
        yield values
    elif isinstance(values, list):
        for value in values:
            yield from _flat(value)


def _pin_all(values: Any) -> None:
    for axes in _flat(values):
        for axis in axes:
            pin(axis)


def _uniform(tensor: Tensor, axis: int) -> bool:
    """Whether a constant has the same value all along an axis, so that permuting it changes nothing."""
    return tensor.numel() == 0 or bool((tensor == tensor.narrow(axis, 0, 1)).all())


def _statistics(graph: fx.Graph) -> Iterator[str]:
    """The names of buffers that are statistics of channels and move with them."""
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            names = [argument.name for argument in node.target._schema.arguments]
            for name, value in [*zip(names, node.args, strict=False), *node.kwargs.items()]:
                if name in _STATISTICS and isinstance(value, fx.Node):
                    yield value.name

"""Proof by numbers that a spec tells the truth: random group elements must leave a network's outputs alone.

A spec is a claim about a function, so it is tested as one: act on the weights with a random element of every group, run
the network in float64, compare. What fails is narrowed down: to the groups that fail alone, then to their spaces and
signs, and last to an axis: the one that must be left out, or the one that is missing, for the outputs to agree again.

Reference: the C2M3 specification, acceptance tests 1 and 2.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mergetool.arch.apply import transform
from mergetool.arch.spec import ArchSpec, TensorAxes
from mergetool.errors import PlanError
from mergetool.kernels.permute import Element
from mergetool.kernels.spaces import Factor, Group, Layout, ancestors

Run = Callable[[Mapping[str, Tensor]], Tensor]
TOLERANCE = 1e-10  # relative, in float64


@dataclass(frozen=True)
class Failure:
    """A group whose elements change the outputs, by how much (relative), and the element that showed it."""

    group: Group
    error: float
    element: Element


def runner(module: nn.Module, *args: Any, **kwargs: Any) -> Run:
    """A function from weights to outputs, for `prove`: the module in evaluation mode and float64 on these inputs.

    The outputs are all floating-point tensors in what the module returns, flattened into one vector. Weights that the
    mapping lacks (the second name of a tied tensor) are taken from their other name, or the module.
    """
    module = module.eval()
    own = module.state_dict()
    doubled_args = tuple(_double(value) for value in args)
    doubled_kwargs = {key: _double(value) for key, value in kwargs.items()}

    def run(weights: Mapping[str, Tensor]) -> Tensor:
        shared = {own[name].data_ptr(): tensor for name, tensor in weights.items() if name in own}
        full = {name: weights.get(name, shared.get(tensor.data_ptr(), tensor)) for name, tensor in own.items()}
        doubled = {name: _double(tensor) for name, tensor in full.items()}
        with torch.no_grad(), _Float64():
            output = torch.func.functional_call(module, doubled, doubled_args, doubled_kwargs, tie_weights=False)
        return torch.cat([tensor.reshape(-1) for tensor in _tensors(output)])

    return run


def general_position(module: nn.Module, *, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a module: freshly initialised ones (biases 0, gains 1) would hide what a spec gets wrong.

    Parameters and running statistics are drawn on the CPU, matrices with variance 1 / fan-in, vectors from [0.5, 1.5];
    all other buffers are the module's own.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}  # by identity: tied names stay tied
    weights = module.state_dict(keep_vars=True)
    for name, tensor in sorted(weights.items()):
        statistic = name.endswith(("running_mean", "running_var"))
        if id(tensor) not in drawn and (isinstance(tensor, nn.Parameter) or statistic):
            noise = torch.randn if tensor.ndim > 1 else torch.rand
            scaled = noise(tensor.shape, generator=generator) / max(prod(tensor.shape[1:]), 1) ** 0.5
            drawn[id(tensor)] = scaled if tensor.ndim > 1 else scaled + 0.5
    return {name: drawn.get(id(tensor), tensor.detach()) for name, tensor in weights.items()}


def deviation(run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, element: Element) -> float:
    """Largest change of an output under `element`, relative to the largest output."""
    return _change(run(weights), run(transform(weights, spec, element)))


def worst(run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, *, seed: int = 0) -> float:
    """The largest deviation under two random elements of all groups together."""
    return max(deviation(run, weights, spec, element) for element in _elements(spec, set(spec.spaces), seed))


def failures(
    run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, *, seed: int = 0, tolerance: float = TOLERANCE
) -> tuple[Failure, ...]:
    """The groups of the spec that change the outputs when they act alone. Empty if the spec is proved."""
    before = run(weights)
    failed = []
    for group in spec.groups:
        for element in _elements(spec, {space.name for space in group.spaces}, seed):
            error = _change(before, run(transform(weights, spec, element)))
            if error > tolerance:
                failed.append(Failure(group, error, element))
                break
    return tuple(failed)


def prove(
    run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, *, seed: int = 0, tolerance: float = TOLERANCE
) -> float:
    """`worst`, at most `tolerance`.

    Raises PlanError naming the groups, tensors and axes at fault.
    """
    error = worst(run, weights, spec, seed=seed)
    if error <= tolerance:
        return error
    told = "; ".join(
        f"{failure.group.name} ({failure.error:.1e}): "
        + (", ".join(_blamed(run, weights, spec, failure.element, tolerance)) or "no single axis")
        for failure in failures(run, weights, spec, seed=seed, tolerance=tolerance)
    )
    raise PlanError(
        f"the outputs change by {error:.1e} (relative), more than {tolerance:.0e}",
        where=f"architecture {spec.family}: {told or 'only when all groups act together'}",
        fix="correct these axes in the architecture file, or declare the space `fixed`",
    )


def _change(before: Tensor, after: Tensor) -> float:
    change = float((after - before).abs().max() / before.abs().max().clamp_min(torch.finfo(before.dtype).tiny))
    return change if isfinite(change) else float("inf")


class _Float64(TorchFunctionMode):
    """Turns every cast to a smaller floating-point type into one to float64 (RMSNorm of transformers casts)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            func = Tensor.double
        kwargs = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*(_wide(arg) for arg in args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)


def _elements(spec: ArchSpec, names: set[str], seed: int) -> Iterator[Element]:
    """Two random elements of these spaces. Whatever may flip does in the first, not half the time as by chance."""
    generator = torch.Generator().manual_seed(seed)
    first = Element.random(spec.spaces, generator)
    flipped = {n: -sign.abs() if spec.spaces[n].symmetry == "flip" else sign for n, sign in first.sign.items()}
    yield replace(first, sign=flipped).only(names)
    yield Element.random(spec.spaces, generator).only(names)


def _blamed(
    run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, element: Element, tolerance: float
) -> Iterator[str]:
    """The axes that may be at fault, told by single spaces, permutation and sign apart, where these fail alone."""
    parts = []
    for name in element.index:
        alone = Element(element.spaces, {name: element.index[name]}, {})
        signs = Element(element.spaces, {}, {name: element.sign[name]}) if name in element.sign else alone
        parts += [alone] if signs is alone else [alone, signs]
    failing = [part for part in parts if deviation(run, weights, spec, part) > tolerance]
    for part in failing or [element]:
        yield from _suspects(run, weights, spec, part, tolerance)


def _suspects(
    run: Run, weights: Mapping[str, Tensor], spec: ArchSpec, part: Element, tolerance: float
) -> Iterator[str]:
    """Single changes of the spec under which `part` preserves the outputs."""
    names = {*part.index, *part.sign}
    for name, tensor in spec.tensors.items():
        for axis, layout in enumerate(tensor.axes):
            for change, axes in _changes(spec, tensor, axis, layout, names):
                changed = replace(spec, tensors={**spec.tensors, name: replace(tensor, axes=axes)})
                if deviation(run, weights, changed, part) <= tolerance:
                    yield f"{name}, axis {axis} ({change})"


def _changes(
    spec: ArchSpec, tensor: TensorAxes, axis: int, layout: Layout, names: set[str]
) -> Iterator[tuple[str, tuple[Layout, ...]]]:
    """Ways to alter one axis: leave a space out, drop or apply its signs, or put it on an axis that is fixed."""

    def put(new: Layout) -> tuple[Layout, ...]:
        return (*tensor.axes[:axis], new, *tensor.axes[axis + 1 :])

    def edited(edit: Callable[[Factor], Factor]) -> Layout:
        return tuple(tuple(edit(f) if f.space in names else f for f in segment) for segment in layout)

    here = sorted({f.space for segment in layout for f in segment if f.space in names})
    if here:
        yield f"must not carry {', '.join(here)}", put(edited(lambda factor: Factor(factor.size)))
        if any(spec.spaces[name].symmetry in ("signed", "flip") for name in here):
            yield "has its signs wrong", put(edited(lambda factor: replace(factor, signed=not factor.signed)))
        return
    for name in sorted(names):
        chain = (*ancestors(spec.spaces, name), name)
        factors = tuple(Factor(spec.spaces[space].size, space) for space in chain)
        if prod(factor.size for factor in factors) == tensor.shape[axis] and not _movable(spec, layout):
            yield f"must carry {name}", put((factors,))


def _movable(spec: ArchSpec, layout: Layout) -> bool:
    named = {factor.space for segment in layout for factor in segment if factor.space}
    return any(spec.spaces[name].symmetry != "fixed" for name in named)

"""Which matrices a router reads: from what was kept of every tensor."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Literal

from mergetool.arch.depth import structural_depths
from mergetool.arch.matrices import is_attention_output
from mergetool.bundle.manifest import Parameter
from mergetool.errors import PlanError


def routing_matrices(parameters: Mapping[str, Parameter], layers: tuple[str, ...] | Literal["auto"]) -> tuple[str, ...]:
    """Matrices whose inputs routing reads.

    auto: attention's output projections inside numbered layers (of the encoder, where there are two stacks). Their
    inputs are mixtures of values, and tell tasks apart better than those of the other kinds, or of all together, which
    mostly read the residual stream, whose mean all tasks share. All matrices where there are none of that kind.
    """
    depths = structural_depths(parameters)
    matrices = [name for name, each in parameters.items() if each.policy == "svd" and len(each.shape) == 2]
    everyone = [name for name in matrices if all(parameters[name].ranks)]  # else some task could not be near there
    inside = [name for name in everyone or matrices if depths[name] is not None]
    inside = inside or [name for name in matrices if is_attention_output(name)]  # one layer, used again and again
    if layers != "auto":
        chosen = [name for name in inside if any(fnmatchcase(name, glob) for glob in layers)]
        if not chosen:
            what = f"no changed matrix inside a layer matches {', '.join(layers)}"
            shown = inside[0] if inside else "none"
            raise PlanError(what, "merge.router.layers", f"write layers: auto, or globs on names such as {shown}")
        return tuple(chosen)
    encoder = [name for name in inside if "encoder" in name.split(".")]
    decoder = [name for name in inside if "decoder" in name.split(".")]
    chosen = encoder if encoder and decoder else inside
    if not chosen:
        what = (
            "no matrix inside a layer was changed and is kept at less than full rank, so there is nothing to route by"
        )
        raise PlanError(what, "merge.router", "check that the experts are fine-tunes of the base, or lower the rank")
    return tuple([name for name in chosen if is_attention_output(name)] or chosen)

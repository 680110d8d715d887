"""Act on a checkpoint with one element of its symmetry group: gathers, tensor by tensor.

`transform(weights, spec, P)` writes the same network in other coordinates. With P_i mapping the universe to model i,
`transform(weights_i, spec, P_i.inverse())` is model i in the universe, where models can be averaged.
"""

from collections.abc import Mapping

from torch import Tensor

from mergetool.arch.spec import ArchSpec, check_shapes
from mergetool.errors import PlanError
from mergetool.kernels.permute import Element


def transform(weights: Mapping[str, Tensor], spec: ArchSpec, element: Element) -> dict[str, Tensor]:
    """Every tensor of a checkpoint after the action of `element`. Dtypes and devices are kept, arguments left alone.

    Raises PlanError, naming tensor and axis, if the checkpoint is not of this architecture.
    """
    check_shapes(spec, {name: tuple(tensor.shape) for name, tensor in weights.items()}, "the checkpoint")
    return {name: transform_tensor(name, tensor, spec, element) for name, tensor in weights.items()}


def transform_tensor(name: str, tensor: Tensor, spec: ArchSpec, element: Element) -> Tensor:
    """One tensor after the action of `element` (the same object where nothing moves), for streaming.

    Raises PlanError if the tensor is unknown or has another shape.
    """
    if name not in spec.tensors:
        raise PlanError(f"tensor {name} is not part of the architecture {spec.family}")
    try:
        return element.apply(tensor, spec.tensors[name].axes)
    except ValueError as error:
        raise PlanError(str(error), where=name) from None

"""Average the models whose training data are most like the rows of a new task.

Of many fine-tunes or adapters, each for a domain, those serve a new domain best whose texts resemble it. What resembles
it the base tells, on some rows that each model was trained on, and on some of the new task, which stand under `base`:
`calibration: {base: {data: NEW}, reviews: {data: ...}, ...}`. The mean of what its last block says of a model's rows is
compared with that of the new rows, by the cosine; the `keep` models nearest to it are averaged, the others left out. No
labels are needed. How near each model is, and which are kept, stands in the lock.

Reference: Chronopoulou et al., AdapterSoup: Weight Averaging to Improve Generalization of Pretrained Language Models,
Findings of EACL 2023, https://arxiv.org/abs/2302.07027.
Differs from the paper: texts are compared by the base itself, where its first way has a sentence encoder (make that a
recipe's `base` when the models are fine-tunes of it); no mixture of Gaussians, its second way, which finds out what
domain a text is of: here the rows of each model are named.
"""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from mergetool.methods.base import Field, Params, Stats, TensorGroup, TensorMethod
from mergetool.methods.families.measured import Mean, mean

if TYPE_CHECKING:
    from torch import Tensor


class AdapterSoup(TensorMethod):
    """`mean of the x_i with the largest cos(f_i, f)`, f_i and f what the base makes of its rows and of new ones"""

    method: Literal["adapter-soup"] = "adapter-soup"
    keep: Annotated[int, Field(strict=True, ge=1)] = Field(2, description="how many models are averaged")
    needs_base: ClassVar = "required"
    granularity: ClassVar = "element"
    buffers: ClassVar = 0
    statistic: ClassVar = "features"
    statistic_of_base: ClassVar = "features"
    on_base: ClassVar = True
    exempt: ClassVar = {"non-finite": "models that are left out are not looked at"}

    def needs_weights(self) -> str | None:
        return "it runs the base on data"

    def unmeasured(self) -> TensorMethod:
        return Mean()

    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        near = _likeness(group)
        order = sorted(range(len(near)), key=lambda place: -near[place])
        chosen = sorted(order[: self.keep])
        for place, name in enumerate(group.names):
            group.measure(f"likeness of {name}", near[place])
            group.measure(f"weight of {name}", 1 / len(chosen) if place in chosen else 0.0)
        if len(chosen) == len(near):
            group.note("there are no more models than `keep`: all are averaged")
        return mean([group.models[place] for place in chosen], [1.0] * len(chosen))


def _likeness(group: TensorGroup) -> list[float]:
    """The cosine between what the base makes of each model's rows, and of those of the new task."""
    import torch

    assert group.measured is not None
    new = group.measured.of_base()
    assert new is not None
    each = [group.measured.of(place).flatten().clone() for place in range(len(group.models))]
    said = torch.stack([new.flatten(), *each]).cpu().double()  # a device is waited for once
    wanted, *models = said / said.norm(dim=1, keepdim=True).clamp(min=1e-300)
    return [float(model @ wanted) for model in models]

"""What methods share whose thresholds are those of a tensor, or of the whole model."""

from typing import ClassVar, Literal

from mergetool.methods.base import Field, TensorMethod


class ScopedMethod(TensorMethod):
    """A method that counts over each tensor alone, or over all of them together."""

    scope: Literal["tensor", "model"] = Field("tensor", description="what `density` is a share of")
    alike: ClassVar = {
        "independent": "one threshold for all tensors together depends on all of them",
        "independent scope=tensor": None,
    }
    """What a method does not obey whose thresholds are the model's unless a recipe says otherwise."""

    def pass_scope(self) -> Literal["tensor", "model"]:
        return self.scope

    def needs_weights(self) -> str | None:
        if self.scope == "tensor":
            return None
        return "`scope: model` has one threshold for whole models; write `scope: tensor`"

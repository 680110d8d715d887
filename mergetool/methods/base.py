"""What a merging method is: numbers and options, their documentation, and the arithmetic, in one frozen class.

A method declares its stages, and nobody else asks what shape it has: a `TensorMethod` counts and merges tensor by
tensor, a `FittedMethod` first looks at the whole models (fit) and may replace tensors in the end (finish), a
`BundleMethod` takes models apart (factorise), a `SearchMethod` tries many candidates of another method (search). A
class is abstract or final: concrete methods are never subclassed.

A method lives in one file of this folder and registers itself by being there. At the top it imports this module, what a
few methods share (`families`) and descriptions of options; kernels inside the functions that need them, so that recipes
are checked without torch; other methods never (import-linter holds that). Its module docstring is its documentation and
must have a `Reference:` and a `Differs from the paper:` paragraph.
"""

import sys
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeGuard, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from mergetool.alignment.models import Headers
from mergetool.arch.matrices import MatrixFilter
from mergetool.methods.group import Factored, Granularity, Note, Params, StatisticsPass, Stats, TensorGroup
from mergetool.methods.values import (
    RANK,
    Finite,
    Fraction,
    Gradient,
    PerModel,
    Positive,
    Rank,
    Recover,
    Scale,
    Schedulable,
    Scheduled,
    Unit,
    cancel,
    resolve,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "RANK",
    "AnyTensorMethod",
    "Factored",
    "Field",
    "Finite",
    "Fraction",
    "Gradient",
    "Granularity",
    "MatrixFilter",
    "Method",
    "Note",
    "Params",
    "PerModel",
    "Positive",
    "Rank",
    "Recover",
    "Scale",
    "Schedulable",
    "Scheduled",
    "StatisticsPass",
    "Stats",
    "TensorGroup",
    "TensorMethod",
    "Unit",
    "all_methods",
    "cancel",
    "expect",
    "is_method",
    "registered",
    "resolve",
]

_M = TypeVar("_M", bound="Method")

_REGISTRY: dict[str, type["Method"]] = {}


class Method(BaseModel):
    """Common to all methods: strict frozen fields, and what the recipe checker needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    needs_base: ClassVar[Literal["required", "optional", "unused"]]
    min_models: ClassVar[int] = 1
    max_models: ClassVar[int | None] = None
    uses_factors: ClassVar[bool] = False
    """Whether it computes factors of task vectors, which can be kept between runs."""
    exempt: ClassVar[Mapping[str, str | None]] = {}
    """Laws (`mergetool.testing`) that this method does not obey, each with the reason; None for an option under which
    it does obey one that it breaks otherwise."""
    neutral: ClassVar[Mapping[str, Any]] = {}
    """Settings under which merging copies of one model gives that model back."""
    result: ClassVar[Literal["checkpoint", "bundle"]] = "checkpoint"
    """The kind of output that a run leaves."""
    uses_architecture: ClassVar[bool] = False
    """Whether it asks what the axes of tensors mean, and so sees whole models under their own names."""
    merges: ClassVar[bool] = False
    """Whether it merges tensors itself, and so can be named where another method asks for one."""
    searches: ClassVar[bool] = False
    """Whether it tries candidates of another method; its settings are then that one's."""
    arranges: ClassVar[bool] = False
    """Whether a layout comes with it, so that a recipe can have no other (`mergetool.layouts`)."""
    needs_adapters: ClassVar[str] = ""
    """Why it can merge nothing but adapters by themselves, where that is so."""
    statistic: ClassVar[str] = ""
    """The statistic of every model that it needs, if any (`mergetool.statistics`)."""
    statistic_of_base: ClassVar[str] = ""
    """The statistic of the base that it or a step after it needs, if any."""
    on_base: ClassVar[bool] = False
    """Whether the base is what is measured, on data of each model and on its own, under `base`."""
    resizes: ClassVar[bool] = False
    """Whether it takes models whose tensors have other shapes than the result's."""
    varies: ClassVar[bool] = True
    """Whether its settings may differ from tensor to tensor (overrides)."""

    def stages(self) -> tuple[str, ...]:
        """What a run does, one after the other."""
        return (*(("measure",) if self.statistic else ()), "count", "merge")

    def measuring(self) -> Mapping[str, Any]:
        """Settings of the statistic that it needs."""
        return {}

    def kernel(self) -> "TensorMethod":
        """The method that merges tensors: itself, or one inside."""
        raise TypeError(f"{self.method_name()} has candidates that merge, and merges nothing itself")

    def tried(self, models: Sequence[str]) -> Sequence[dict[str, Any]]:
        """`merge` sections of other recipes that a run of this one will try: what is wrong with them is wrong here."""
        return ()

    def parts(self) -> Mapping[str, "Method"]:
        """Methods inside that see the same models: field of the recipe -> method."""
        return {}

    def fit_memory(self, headers: "Headers", threads: int) -> int:
        """Bytes that looking at whole models takes at most, roughly. Raises PlanError for models that do not fit."""
        return 0

    @classmethod
    def __pydantic_init_subclass__(cls, **_: Any) -> None:
        name = cls.method_name()
        if name is None:
            return
        if any(parent in _REGISTRY.values() for parent in cls.__mro__[1:]):
            raise TypeError(f"{cls.__name__}: a concrete method is final and cannot be subclassed")
        other = _REGISTRY.get(name)
        if other and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise TypeError(f"two methods are called {name!r}: those of {other.__module__} and {cls.__module__}")
        for key, info in cls.model_fields.items():
            if key != "method" and not info.description:
                raise TypeError(f"{cls.__name__}.{key} has no description")
        _REGISTRY[name] = cls

    @classmethod
    def method_name(cls) -> str | None:
        """The name in recipes; None for an abstract class."""
        info = cls.model_fields.get("method")
        return None if info is None else str(info.default)

    @classmethod
    def documentation(cls) -> str:
        """The module docstring (else that of the class): what it does, its reference, and where it differs."""
        return (sys.modules[cls.__module__].__doc__ or cls.__doc__ or cls.__name__).strip()

    @classmethod
    @cache
    def schedulables(cls) -> dict[str, Schedulable]:
        """The numeric fields that may vary by tensor (and by model)."""
        marked = {}
        for key, info in cls.model_fields.items():
            for mark in info.metadata:
                if isinstance(mark, Schedulable):
                    marked[key] = mark
        return marked

    def params(self, depth: float, models: Sequence[str]) -> Params:
        """Every schedulable as plain numbers for a tensor at `depth` in [0, 1] and these models."""
        return Params(
            **{
                key: resolve(getattr(self, key), depth, models, per_model=schedulable.per_model)
                for key, schedulable in self.schedulables().items()
            }
        )

    def files(self) -> Mapping[str, str]:
        """Files beside the models that decide the result: field of the recipe -> path as written."""
        return {}

    def model_names(self) -> Mapping[str, str]:
        """Models that single settings name: field of the recipe -> the name written there."""
        return {}

    def code(self) -> Mapping[str, str]:
        """Python code that a run executes because the recipe names it: field of the recipe -> what is written there."""
        return {}

    def problem(self, p: Params) -> str | None:
        """Why these numbers cannot work together (found while planning), or None."""
        return None

    def needs_weights(self) -> str | None:
        """Why it cannot merge adapters by themselves, without the weights that they change; None where it can."""
        return "it looks at whole models"


class TensorMethod(Method):
    """A method that sees each output tensor once, after optional statistics passes."""

    merges: ClassVar = True
    granularity: ClassVar[Granularity]
    """What one call must see whole: any slice of flat elements, whole rows, or the whole tensor."""
    buffers: ClassVar[int] = 3
    """Temporaries the size of a slice that `merge` or a pass uses; the memory plan counts them."""
    mixes: ClassVar[bool] = True
    """Whether values of several models meet."""

    by_tensor: ClassVar[str] = "scope: tensor"
    """What to write where a pass is not to count over all tensors of the model together."""
    folds: ClassVar[bool] = False
    """Whether `merge` goes through the models once and in order: they are then read one by one, however many."""
    recalls: ClassVar[bool] = False
    """Whether what its pass, which goes through them once, keeps of a slice can be all that `merge` needs of models."""
    pass_depends_on: ClassVar[tuple[str, ...] | None] = None
    """Numbers that decide what a statistics pass finds; None: all. A search counts anew only where one changed."""

    def statistics_pass(self, p: Params, num_elements: int, bits: int) -> StatisticsPass | None:
        """The first reading pass this tensor needs before `merge`, or None. `bits` of the compute dtype: 32 or 64.

        Asked once, while planning; `num_elements` of the tensor, or of all tensors that are counted together.
        """
        return None

    def counts(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the pass is over this tensor, too."""
        return True

    def pass_after(self, found: Stats) -> StatisticsPass | None:
        """The first pass over a tensor by itself, once this is known of the whole model."""
        return None

    def kernel(self) -> "TensorMethod":
        return self

    def granularity_in(self, name: str, shape: tuple[int, ...]) -> Granularity:
        """What one call must see whole of this tensor: less than `granularity` where some are treated more simply."""
        return self.granularity

    @property
    def called(self) -> str:
        """What messages and tables call it."""
        return self.method_name() or self.treatment("", ())

    def treatment(self, name: str, shape: tuple[int, ...]) -> str:
        """What is done to a tensor, in a word: the method's name, but where it treats some more simply."""
        return self.method_name() or ""

    def needs_weights(self) -> str | None:
        return None

    def in_factors(self, name: str, shape: tuple[int, ...]) -> Factored:
        """How it merges what adapters change of this tensor.

        Where something is turned, `merge` sees cores instead of task vectors, on a base of zeros; `group.shape` is
        that of the tensor. So only what turns along with inputs (outputs) may say so, whatever basis they are in.
        """
        return "product"

    def coefficients(self, p: Params) -> tuple[float, ...]:
        """The factor of every model's task vector, where these are only summed up."""
        raise NotImplementedError

    def half_coefficients(self, scales: Sequence[float], p: Params) -> Sequence[tuple[float, float]]:
        """The factors of every model's two thin matrices, where these are summed up by themselves.

        The first thin matrix of model i, the one that writes, has been multiplied by `scales[i]`.
        """
        raise NotImplementedError

    @property
    def needs_float64(self) -> bool:
        """Whether something is computed in float64 whatever the compute dtype: not every device can."""
        return False

    def partners(self, name: str) -> tuple[str, ...]:
        """Other tensors that `merge` reads for this one."""
        return ()

    def settings_of_passes(self) -> dict[str, Any]:
        """What else decides what a statistics pass finds, beside `pass_depends_on`."""
        return self.model_dump(exclude=set(self.schedulables()))

    def alone(self) -> "TensorMethod":
        """What merges without the steps that follow."""
        return self

    def unmeasured(self) -> "TensorMethod":
        """What merges tensors of which there is no statistic."""
        return self

    def pass_scope(self) -> Literal["tensor", "model"]:
        """Whether a pass counts over each tensor alone or over all tensors of the model together."""
        return "tensor"

    def change(self, group: TensorGroup, p: Params, stats: Stats) -> "tuple[Tensor, float] | None":
        """What `merge` adds to the base times `p.scale`, and what `scale` is divided by, where it decides nothing else:
        several scales then share all that comes before. None where that is not so. The base must stay as it is."""
        return None

    @abstractmethod
    def merge(self, group: TensorGroup, p: Params, stats: Stats) -> "Tensor":
        """The merged slice: same shape, dtype and device as `group.models[0]`. It may be one of their buffers."""


def _chosen(value: Any) -> Any:
    """The registered method that a mapping with `method` describes."""
    if getattr(value, "merges", False):
        return value
    tensor_methods = {name: kind for name, kind in all_methods().items() if kind.merges}
    if not isinstance(value, Mapping) or "method" not in value:
        raise ValueError("expected a mapping with `method`")
    if value["method"] not in tensor_methods:
        raise ValueError(f"expected one of the methods {', '.join(sorted(tensor_methods))}")
    return tensor_methods[value["method"]].model_validate(dict(value))


AnyTensorMethod = Annotated[
    TensorMethod,
    BeforeValidator(_chosen),
    WithJsonSchema({"type": "object", "properties": {"method": {"type": "string"}}, "required": ["method"]}),
]
"""A field of a method that holds another method: written as a mapping, like the `merge` section of a recipe."""


def expect(method: Method, kind: type[_M]) -> _M:
    """A method as the shape of which its stages speak. Nobody else looks at the class of a method."""
    assert isinstance(method, kind), f"{method.method_name()} is no {kind.__name__}"
    return method


def is_method(kind: type) -> "TypeGuard[type[Method]]":
    """Whether a class is one of methods, among those that describe parts of a recipe."""
    return issubclass(kind, Method)


def all_methods() -> dict[str, type[Method]]:
    """Every method by name, sorted; loads those that are not."""
    import_module("mergetool.methods").load_all()
    return dict(sorted(_REGISTRY.items()))


def registered(name: str) -> type[Method] | None:
    """A method whose file is loaded."""
    return _REGISTRY.get(name)

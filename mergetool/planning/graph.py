"""What a plan is: stages of steps, and each step fills slots of the output from operands, by an operation.

operand    (source, tensor, view): where one input of a step comes from
slot       name, dtype, shape and file of one output tensor
step       slots <- operation(operands by role, numbers of this depth)
stage      steps that are worked on together; what a stage finds out is there for later ones
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergetool.alignment.models import Headers
from mergetool.arch.code import code_of
from mergetool.checkpoints.adapters.forms import Form
from mergetool.checkpoints.adapters.written import About
from mergetool.methods.base import Granularity
from mergetool.planning.operations import Operation
from mergetool.planning.sources import Provenance
from mergetool.planning.words import Lexicon
from mergetool.recipe.schema import Recipe
from mergetool.tensors.dtypes import DType
from mergetool.tensors.header import Header, TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource

BASE = "base"
"""Key of the base among a plan's sources (no model may have this name)."""

SLICE_ELEMENTS = 1 << 18
"""Elements a worker holds of each model at once for methods that allow it: few enough for the slices of all workers to
stay in a shared cache, and many enough for the cost of calling operations not to count."""
UNIT_ELEMENTS = 1 << 22
"""Elements of one unit of work: what is journalled, given to workers and done again after a kill."""
KEPT_BYTES = 24 << 20
"""Of what passes have read of a unit, so much stays with a worker for its merge."""

_COARSENESS: tuple[Granularity, ...] = ("element", "row", "tensor")


@dataclass(frozen=True)
class View:
    """How an operand shows a tensor of its source, and what of the tensor that takes at once."""

    name: str
    granularity: Granularity


STORED = View("stored", "element")
ALIGNED = View("aligned", "tensor")
"""In the space of a fit, which moves entries along every axis."""
ROWS = View("rows", "element")
"""Rows gathered, those of tokens in the order of the result's vocabulary."""


@dataclass(frozen=True)
class Operand:
    """Where one input of a step comes from."""

    source: str
    """Key among the plan's sources."""
    tensor: str
    """Its name there."""
    view: View = STORED


@dataclass(frozen=True)
class Slot:
    """The place of one output tensor."""

    spec: TensorSpec
    """Name, dtype and shape as written."""
    shard: int = 0
    """Number of the file that holds it."""


@dataclass(frozen=True)
class Step:
    """How some output tensors are made: one, or the same values under several names, or several parts of one."""

    index: int
    slots: tuple[Slot, ...]
    operation: Operation
    models: tuple[Operand, ...] = ()
    """What is copied, or merged: one for each of the models, the base's where it stands in for a missing one."""
    base: Operand | None = None
    """Set where the method sees the base."""
    statistics: tuple[Operand, ...] = ()
    """What was measured on each of the models, where the method needs that."""
    statistic_of_base: Operand | None = None
    """What was measured on the base, where a step after merging needs that."""
    partners: Mapping[str, int] = field(default_factory=dict)
    """Other steps whose operands are looked at, too: by name of the tensor, their indices."""
    work: TensorSpec | None = None
    """What is worked on, where no slot has its shape."""
    key: str = ""
    """The name that keys random draws and factors."""
    depth: float = 0.0
    result: str = ""
    """Of a sweep whose results share no steps, the one that it is for."""

    @property
    def spec(self) -> TensorSpec:
        """Name, dtype and shape of what is worked on, and what messages speak of: mostly the first slot's."""
        return self.work or self.slots[0].spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def is_measured(self) -> bool:
        """Whether it reads what was measured on data."""
        return bool(self.statistics) or self.statistic_of_base is not None

    @property
    def operands(self) -> tuple[Operand, ...]:
        """Everything read, the base first."""
        return self.models if self.base is None else (self.base, *self.models)

    @property
    def reads(self) -> tuple[str, ...]:
        """The source of every operand."""
        return tuple(operand.source for operand in self.operands)

    @cached_property
    def granularity(self) -> Granularity:
        """What of the operands must be there at once, for the operation or for a view of them."""
        wanted = (self.operation.granularity(self.spec), *(operand.view.granularity for operand in self.operands))
        return max(wanted, key=_COARSENESS.index)

    @cached_property
    def row(self) -> int:
        """Elements that may not be torn apart: one row, one element, or the whole tensor."""
        if self.granularity == "element":
            return 1
        if self.granularity == "row" and len(self.spec.shape) > 1:
            return max(1, self.spec.num_elements // max(1, self.spec.shape[0]))
        return max(1, self.spec.num_elements)

    def pieces(self) -> list[tuple[int, int]]:
        """[start, stop) of every unit of work, cut between rows."""
        total = self.spec.num_elements
        length = max(self.row, UNIT_ELEMENTS // self.row * self.row)
        return [(start, min(start + length, total)) for start in range(0, total, length)] or [(0, 0)]

    @property
    def is_visited(self) -> bool:
        """Whether a pass over it and its merge are done in one go."""
        return self.operation.counts is not None and not self.operation.counts_model and len(self.pieces()) == 1

    def span(self, slot: Slot, start: int, stop: int) -> tuple[int, int]:
        """[begin, end) of the bytes of a slot that working on elements [start, stop) fills."""
        if self.work is not None and slot.spec.shape != self.work.shape:  # made as a whole
            return 0, slot.spec.num_bytes
        return slot.spec.dtype.num_bytes(start), slot.spec.dtype.num_bytes(stop)

    def bytes_written(self, start: int, stop: int) -> int:
        """Bytes that working on elements [start, stop) fills, in all slots."""
        return sum(end - begin for begin, end in (self.span(slot, start, stop) for slot in self.slots))


@dataclass(frozen=True)
class Stage:
    """Steps that are worked on together. Its name says what is done with them; journals know it by that."""

    name: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its first bytes, and where every tensor goes."""

    name: str
    prefix: bytes
    header: Header
    sparse: bool = False
    """Whether most of it may stay empty: nothing is reserved on the disk, and it is written anew in the end."""


@dataclass(frozen=True)
class PlannedFile:
    """A file that a run will write, with its size in bytes."""

    name: str
    size: int
    at_most: bool = False
    """Whether it may get smaller: that is only known when weights are read."""


@dataclass(frozen=True)
class Plan:
    """Everything `run` needs; made from headers alone."""

    recipe: Recipe
    sources: Mapping[str, ModelSource]
    """Opened models by name; the base under `BASE`."""
    template: str
    """The model whose config, tokenizer and names lead."""
    steps: tuple[Step, ...]
    """In the order in which the template's files hold their first slots."""
    shards: tuple[Shard, ...]
    output: Path | None
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, tuple[Provenance, ...]] = field(default_factory=dict)
    """Where every model and its adapters came from."""
    bytes_missing: int = 0
    """What must be downloaded before anything can be merged."""
    untied: tuple[str, ...] = ()
    """Heads that the template ties to its embeddings, and that are tensors of their own here."""
    layers: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Where a layout takes layers from, by what stands before their number: (model, layer there) for each in order."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Keys of config.json that a layout sets, where the result is another network than the template."""
    beside: tuple[PlannedFile, ...] = ()
    """Large files that belong to the output and hold no slots."""
    bytes_at_most: int | None = None
    """What all files take together, where files may get smaller."""
    others: Mapping[str, FileStamp] = field(default_factory=dict)
    """Files beside the models that the method reads, by the recipe's field."""
    words: Lexicon = field(default_factory=lambda: Lexicon({}))
    """The vocabulary, where the models' are not one."""
    points: "Mapping[str, Plan]" = field(default_factory=dict)
    """Of a sweep, the plans of its results by name, as if each were made alone in its folder inside the output."""
    inner: "Mapping[str, Plan]" = field(default_factory=dict)
    """The plans of models that other recipes make first, by name."""
    forms: Mapping[str, Form] = field(default_factory=dict)
    """What tensors become in an adapter, by what steps work on."""
    about: About = field(default_factory=lambda: About(None))
    """What an adapter says of itself."""
    narrow: Mapping[str, DType] = field(default_factory=dict)
    """What tensors of an intermediate result would be stored as, were it kept; where it is wider."""

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """What is done, one stage after the other, as the method says."""
        counted = tuple(step for step in self.steps if step.operation.counts_model)
        every = {"count": counted}
        stages = [Stage(name, every.get(name, self.steps)) for name in self.recipe.stages]
        return tuple(stage for stage in stages if stage.steps)

    @property
    def slots(self) -> Iterator[Slot]:
        """Every output tensor."""
        return (slot for step in self.steps for slot in step.slots)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Every output tensor by name."""
        return {slot.spec.name: slot.spec for slot in self.slots}

    @property
    def num_tensors(self) -> int:
        """Tensors that are made: those of the output, or those that are taken apart for it."""
        return sum(1 if step.work else len(step.slots) for step in self.steps)

    def spec(self, operand: Operand) -> TensorSpec:
        """What an operand is in its source."""
        return self.sources[operand.source].specs[operand.tensor]

    def bytes_read(self, step: Step, count: int) -> int:
        """Bytes of `count` elements of all operands of a step."""
        if step.operation.bytes_read is not None:
            return step.operation.bytes_read
        return sum(self.spec(operand).dtype.num_bytes(count) for operand in step.operands)

    @property
    def stamps(self) -> dict[str, tuple[FileStamp, ...]]:
        """All input files: of the models by name, and the others; of recipes inside this one as `name/inner`."""
        made = {plan.output for plan in self.inner.values()}
        models = {
            name: tuple(stamp for stamp in source.files if stamp.path.parent not in made)
            for name, source in self.sources.items()
        }
        inside = {f"{name}/{key}": stamps for name, plan in self.inner.items() for key, stamps in plan.stamps.items()}
        made_here = {*self.inner, *(name for name in models if name.startswith("("))}
        own = {name: stamps for name, stamps in models.items() if stamps or name not in made_here}
        return own | inside | {field: (stamp,) for field, stamp in self.others.items()}

    @property
    def headers(self) -> Headers:
        """The models as a fitted method sees them: every floating-point tensor that all of them hold."""
        shapes = {
            name: spec.shape
            for name, spec in self.specs.items()
            if spec.dtype.is_float and all(name in source.specs for source in self.sources.values())
        }
        architecture = self.recipe.architecture
        if (path := self.recipe.architecture_file) is not None:
            _, function = code_of(architecture or "") or ("", "")
            architecture = f"{path}:{function}" if function else str(path)
        names = (*self.recipe.models, *((BASE,) if BASE in self.sources else ()))
        return Headers(names, shapes, read_config(self.sources[self.template].folder), architecture)

    @property
    def files(self) -> tuple[PlannedFile, ...]:
        """Every large file of the output."""
        open_ended = self.bytes_at_most is not None
        return (*(PlannedFile(each.name, each.header.file_size, open_ended) for each in self.shards), *self.beside)

    @property
    def bytes_out(self) -> int:
        """Bytes that are written, at most."""
        return sum(file.size for file in self.files) if self.bytes_at_most is None else self.bytes_at_most

    @property
    def bytes_in(self) -> int:
        """Bytes that merging reads once (statistics passes read their operands again)."""
        return sum(self.bytes_read(step, step.spec.num_elements) for step in self.steps)

    @cached_property
    def compute_bits(self) -> int:
        """Width of the compute dtype."""
        stored = (self.spec(operand) for step in self.steps for operand in step.operands)
        return compute_bits(self.recipe, stored)

    @property
    def needs_float64(self) -> bool:
        """Whether something is computed in float64."""
        fitted = any(stage.name == "fit" for stage in self.stages)
        return self.compute_bits == 64 or fitted or any(step.operation.needs_float64 for step in self.steps)

    @property
    def seed(self) -> int:
        return self.recipe.compute.seed


def compute_bits(recipe: Recipe, specs: "Iterator[TensorSpec]") -> int:
    """Width of the compute dtype: 64 if the recipe says so or a tensor that is read is stored in float64, else 32."""
    return 64 if recipe.compute.dtype == "float64" or any(spec.dtype.name == "F64" for spec in specs) else 32

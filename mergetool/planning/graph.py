"""What a plan is: steps with their inputs, numbers and slots, output files with exact headers, and estimates."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mergetool.arch.code import code_of
from mergetool.methods.base import Granularity, Headers, Params, TensorMethod
from mergetool.planning.sources import Origin
from mergetool.recipe.schema import Recipe
from mergetool.tensors.header import Header, TensorSpec
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import FileStamp, ModelSource

BASE = "base"
"""Key of the base among a plan's sources (no model may have this name)."""

SLICE_ELEMENTS = 1 << 18
"""Elements a worker holds of each model at once for methods that allow it: few enough for the slices of all workers to
stay in a shared cache, and many enough for the cost of calling operations not to count."""
UNIT_ELEMENTS = 1 << 22
"""Elements of one unit of work: what is journalled, dealt out to workers and done again after a kill."""


@dataclass(frozen=True)
class Step:
    """How one output tensor is made."""

    index: int
    spec: TensorSpec
    """Name, dtype and shape as written."""
    shard: int
    template: str
    """The model whose tensor is copied, or whose dtype the merged tensor takes."""
    depth: float = 0.0
    method: TensorMethod | None = None
    """None: the template's tensor is copied."""
    params: Params = field(default_factory=Params)
    models: tuple[str, ...] = ()
    """Names of the models that are merged here."""
    sources: tuple[str, ...] = ()
    """Whose tensor stands in for each of `models` (the base's for a missing one under `missing: base`)."""
    base: bool = False
    """Whether the method sees the base."""
    twin: str | None = None
    """The tensor that this one is a second name of: the same random draws, so the same values."""
    whole: bool = False
    """Whether the tensor must be held whole whatever the method's granularity (a fitted method moves its entries)."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Every source read, the base first."""
        if self.method is None:
            return (self.template,)
        return (*((BASE,) if self.base else ()), *self.sources)

    @property
    def key(self) -> str:
        """The name that keys random draws and factors."""
        return self.twin or self.spec.name

    @property
    def surveyed_together(self) -> bool:
        """Whether this step takes part in a survey of the whole model."""
        if self.method is None or self.method.survey_scope() == "tensor":
            return False
        return self.method.survey(self.params, self.spec.num_elements, bits=32) is not None

    @property
    def granularity(self) -> Granularity:
        """What the method must see whole of this tensor."""
        return "element" if self.method is None else self.method.granularity_in(self.spec.name, self.spec.shape)

    @property
    def row(self) -> int:
        """Elements that may not be torn apart: one row, one element, or the whole tensor."""
        if self.whole:
            return max(1, self.spec.num_elements)
        if self.granularity == "element":
            return 1
        if self.granularity == "row" and len(self.spec.shape) > 1:
            return max(1, self.spec.num_elements // max(1, self.spec.shape[0]))
        return max(1, self.spec.num_elements)

    def pieces(self, size: int) -> list[tuple[int, int]]:
        """[start, stop) ranges of about `size` elements, cut between rows."""
        total = self.spec.num_elements
        length = max(self.row, size // self.row * self.row)
        return [(start, min(start + length, total)) for start in range(0, total, length)] or [(0, 0)]


@dataclass(frozen=True)
class Shard:
    """One output file: its name, its first bytes, and where every tensor goes."""

    name: str
    prefix: bytes
    header: Header


@dataclass(frozen=True)
class Plan:
    """Everything `run` needs; made from headers alone."""

    recipe: Recipe
    sources: Mapping[str, ModelSource]
    """Opened models by name; the base under `BASE`."""
    template: str
    """The model whose config, tokenizer and names lead."""
    steps: tuple[Step, ...]
    """In the order in which the template's files hold them."""
    shards: tuple[Shard, ...]
    output: Path | None
    warnings: tuple[str, ...] = ()
    origins: Mapping[str, tuple[Origin, ...]] = field(default_factory=dict)
    """Where every model and its adapters came from."""
    bytes_missing: int = 0
    """What must be downloaded before anything can be merged."""
    untied: tuple[str, ...] = ()
    """Heads that the template ties to its embeddings, and that are tensors of their own here."""
    others: Mapping[str, FileStamp] = field(default_factory=dict)
    """Files beside the models that the method reads, by the recipe's field."""

    @property
    def stamps(self) -> dict[str, tuple[FileStamp, ...]]:
        """All input files: of the models by name, and the others."""
        models = {name: source.files for name, source in self.sources.items()}
        return models | {field: (stamp,) for field, stamp in self.others.items()}

    @property
    def headers(self) -> Headers:
        """The models as a fitted method sees them: every floating-point tensor that all of them hold."""
        shapes = {
            step.spec.name: step.spec.shape
            for step in self.steps
            if step.spec.dtype.is_float and all(step.spec.name in source.specs for source in self.sources.values())
        }
        architecture = self.recipe.architecture
        if (path := self.recipe.architecture_file) is not None:
            _, function = code_of(architecture or "") or ("", "")
            architecture = f"{path}:{function}" if function else str(path)
        names = (*self.recipe.models, *((BASE,) if BASE in self.sources else ()))
        return Headers(names, shapes, read_config(self.sources[self.template].folder), architecture)

    @property
    def bytes_out(self) -> int:
        return sum(shard.header.file_size for shard in self.shards)

    @property
    def bytes_in(self) -> int:
        """Bytes that merging reads once (surveys read their inputs again)."""
        return sum(self.sources[name].specs[step.spec.name].num_bytes for step in self.steps for name in step.reads)

    @cached_property
    def compute_bits(self) -> int:
        """Width of the compute dtype: 64 if the recipe says so or a merged tensor is stored in float64, else 32."""
        stored = (self.sources[name].specs[step.spec.name].dtype.name for step in self.steps for name in step.reads)
        return 64 if self.recipe.compute.dtype == "float64" or "F64" in stored else 32

    @property
    def needs_float64(self) -> bool:
        """Whether something is computed in float64."""
        return self.compute_bits == 64 or any(step.method and step.method.needs_float64 for step in self.steps)

    @property
    def seed(self) -> int:
        return self.recipe.compute.seed

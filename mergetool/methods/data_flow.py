"""Search the path that data takes: which layers of which models come next, and with what scale where paths meet.

Layers stay as they are; what is found is their order. The layers of all models, in blocks, are lined up `repeats`
times, and a candidate is a choice of some of them, in this order. The embeddings, the first and the last blocks, the
final norm and the head are those of the first model, with which the search starts: put first the model whose words the
result shall speak. With one model alone, layers are left out or repeated. Candidates are judged as in `merge3`, by
their answers to a few items of real tasks; each is a network of its own, held in memory.

With `scale`, what enters a block that does not follow upon the one before it is multiplied by a number, one for each
place. Networks know no such number, so it is written into weights: all later layers write `1 / scale` times as much
into the stream, which norms make the same (up to their epsilon). That needs norms before the parts of layers, as in
Llama, Qwen, Mistral, Phi or GPT-2.

Beside the result lies `NAME.search/` as for `merge3`; its `recipe.yaml` holds the winner as plain `slices:`.

Reference: Akiba et al., Evolutionary optimization of model merging recipes, Nature Machine Intelligence 2025,
https://arxiv.org/abs/2403.13187 (merging in the data flow space).
Differs from the paper: blocks in place of single layers where `block` says so; one scale for each place in the row in
place of a matrix for all pairs of layers; the first and the last block are never left out; `order: depth` lines layers
up by their height, so that one round can take each layer from any model; candidates answer few items.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BeforeValidator, PrivateAttr, model_validator

from mergetool.errors import PlanError
from mergetool.methods.base import Field, Finite
from mergetool.methods.families.judged import Count, JudgedSearch, SearchOptions, as_tuple

if TYPE_CHECKING:
    from mergetool.search.space import SearchSpace, Value
    from mergetool.tensors.source import ModelSource


class PathSearch(SearchOptions):
    """How paths are found."""

    algorithm: Literal["cma-es", "ga", "nsga2", "tpe", "random", "sobol"] = Field(
        "ga", description="who proposes candidates; nsga2 treats every task as an objective of its own"
    )


class LayerBlock(NamedTuple):
    """Layers of a model that stay together: [start, end)."""

    model: str
    start: int
    end: int
    height: float = 0.0
    """Where it begins, as a share of its model's layers."""

    def follows(self, other: "LayerBlock") -> bool:
        """Whether it comes after the other one in their model."""
        return self.model == other.model and self.start == other.end


class Entered(NamedTuple):
    """A block of a path, and a number for what enters it."""

    block: LayerBlock
    scale: float


class DataFlow(JudgedSearch):
    """Search which layers of which models follow each other"""

    method: Literal["data-flow"] = "data-flow"
    block: Count = Field(1, description="layers that stay together; more make a smaller search")
    repeats: Count = Field(2, description="how often the layers of all models are lined up")
    order: Literal["models", "depth"] = Field(
        "models", description="lined up one model after the other, or those of one height beside each other"
    )
    ends: Count = Field(1, description="blocks at each end that are the first model's and always there")
    max_layers: Count | None = Field(
        None, description="layers of a candidate at most: what is chosen beyond is passed over, from the top"
    )
    scale: Annotated[tuple[Finite, Finite], BeforeValidator(as_tuple)] | None = Field(
        None, description="[low, high] of a factor on what enters a block that does not follow the one before it"
    )
    search: PathSearch = Field(PathSearch(), description="how candidates are found")
    needs_base: ClassVar = "unused"
    reshapes: ClassVar = True
    _layers: dict[str, int] = PrivateAttr(default_factory=dict)
    _writers: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _scales_have_one_between(self) -> "DataFlow":
        if self.scale is not None and not (0 < self.scale[0] <= 1 <= self.scale[1] and self.scale[0] < self.scale[1]):
            raise ValueError(f"`scale` goes from above 0 up to 1 and on, as in [0.7, 1.4], not {list(self.scale)}")
        return self

    def tried(self, models: Sequence[str]) -> Sequence[dict[str, Any]]:
        return ()  # which there will be is known only when the models' layers are counted

    def settled(self, sources: "Mapping[str, ModelSource]") -> Self:
        made = self.model_copy()
        made._layers = _layers_of(sources)
        made._writers = _writers_of(sources) if self.scale else ()
        first, count = next(iter(made._layers.items()))
        if len(made._blocks(first)) < 2 * self.ends:
            what = f"{2 * self.ends} blocks of {self.block} layers at its ends are more than its {count} layers"
            raise PlanError(what, f"model {first!r}", "write smaller `block` or `ends`")
        if self.max_layers is not None and self.max_layers < self._least(made._layers):
            what = f"max_layers: {self.max_layers} has no room for the blocks that always stay"
            raise PlanError(what, "merge.max_layers", f"write {self._least(made._layers)} or more")
        return made

    def space(self, models: Sequence[str]) -> "SearchSpace":
        from mergetool.search.space import Gene, SearchSpace

        first, pool = models[0], self._pool()
        genes = []
        for place, block in enumerate(pool):
            start = block.model == first and place < len(pool) // self.repeats
            name = f"{block.model}[{block.start}:{block.end}]" + (
                f" #{self._round(place) + 1}" if self.repeats > 1 else ""
            )
            genes.append(Gene(name, choices=(False, True), init=int(start)))
        if self.scale is not None:
            labels = [*(gene.name for gene in genes), "the end"]
            genes += [Gene(f"scale of {label}", *self.scale, init=1.0) for label in labels]
        return SearchSpace(tuple(genes), self._same)

    def candidate(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        return {"method": "passthrough"}

    def arranged(self, values: "Sequence[Value]", models: Sequence[str]) -> dict[str, Any]:
        slices = [_slice(*each, self._writers) for each in _joined(self._path(values))]
        return {"slices": slices, "outside": {"first": models[0], "last": models[0]}}

    def _round(self, place: int) -> int:
        return place * self.repeats // len(self._pool())

    def _blocks(self, model: str) -> list[LayerBlock]:
        """All layers of a model, in blocks; the last one may be shorter."""
        count = self._layers[model]
        starts = range(0, count, self.block)
        return [LayerBlock(model, start, min(start + self.block, count), start / count) for start in starts]

    def _ends(self) -> tuple[list[LayerBlock], list[LayerBlock]]:
        """The blocks that are always there."""
        own = self._blocks(next(iter(self._layers)))
        return own[: self.ends], own[-self.ends :]

    def _pool(self) -> list[LayerBlock]:
        """All blocks that may come between the ends, in order."""
        first, last = self._ends()
        every = [block for model in self._layers for block in self._blocks(model)]
        once = [block for block in every if block not in first and block not in last]
        if self.order == "depth":
            once.sort(key=lambda block: block.height)
        return once * self.repeats

    def _least(self, layers: Mapping[str, int]) -> int:
        count = next(iter(layers.values()))
        return 2 * self.ends * self.block - (-count % self.block)

    def _same(self, values: "tuple[Value, ...]") -> "tuple[Value, ...]":
        """The first of all values that stand for the same path: each block as early as can be, no scale in vain."""
        pool, entered = self._pool(), self._entered(values)
        wanted, scales, place = [False] * len(pool), [1.0] * len(pool), 0
        for block, scale in entered[self.ends : -self.ends]:
            place = pool.index(block, place)
            wanted[place], scales[place] = True, scale
            place += 1
        return (*wanted, *([] if self.scale is None else [*scales, entered[-self.ends].scale]))

    def _entered(self, values: "Sequence[Value]") -> list[Entered]:
        """The blocks of a candidate, from the bottom to the top, with factors on what enters them."""
        pool = self._pool()
        scales = [float(each) for each in values[len(pool) :]] or [1.0] * (len(pool) + 1)
        first, last = self._ends()
        room = (self.max_layers or 10**9) - sum(block.end - block.start for block in (*first, *last))
        path = [Entered(block, 1.0) for block in first]
        for block, wanted, scale in zip(pool, values, scales, strict=False):
            if wanted and block.end - block.start <= room:
                path.append(Entered(block, 1.0 if block.follows(path[-1].block) else scale))
                room -= block.end - block.start
        for block in last:
            path.append(Entered(block, 1.0 if block.follows(path[-1].block) else scales[-1]))
        return path

    def _path(self, values: "Sequence[Value]") -> Iterator[Entered]:
        """The blocks of a candidate, and how large the stream is in each beside what it began as."""
        stream = 1.0
        for block, scale in self._entered(values):
            stream *= scale
            yield Entered(block, stream)


def _joined(path: Iterator[Entered]) -> list[Entered]:
    """A path in as few pieces as it can be told in."""
    joined: list[Entered] = []
    for block, scale in path:
        if joined and block.follows(joined[-1].block) and scale == joined[-1].scale:
            joined[-1] = Entered(joined[-1].block._replace(end=block.end), scale)
        else:
            joined.append(Entered(block, scale))
    return joined


def _slice(block: LayerBlock, scale: float, writers: Sequence[str]) -> dict[str, Any]:
    """The slice of a recipe for these layers where the stream has this scale."""
    layers = {block.model: [block.start, block.end]}
    if scale == 1.0:
        return layers
    return {"layers": layers, "overrides": [{"match": match, "scale": 1.0 / scale} for match in writers]}


def _layers_of(sources: "Mapping[str, ModelSource]") -> dict[str, int]:
    """How many layers each model has. Raises PlanError where they cannot stand on each other."""
    from mergetool.checkpoints.rows import chosen_row, layers_of, rows_of
    from mergetool.checkpoints.truth import layers_behind
    from mergetool.tensors.side_files import read_config

    counts: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for model, source in sources.items():
        config = read_config(source.folder)
        if config.get("is_encoder_decoder"):
            what = "has a row of layers to read and one to write, and a path goes through one row"
            raise PlanError(what, f"model {model!r}", "search with models that only write")
        rows = layers_of(source.specs, chosen_row(rows_of(source.specs)))
        counts[model] = len(rows) - layers_behind(config, len(rows))
        for suffix, name in rows[counts[model] - 1].items():
            shape = source.specs[name].shape
            if shapes.setdefault(suffix, shape) != shape:
                what = f"{name} has shape {list(shape)}, and layers of {next(iter(counts))!r} {list(shapes[suffix])}"
                raise PlanError(what, f"model {model!r}", "put together models of one size")
    return counts


def _writers_of(sources: "Mapping[str, ModelSource]") -> tuple[str, ...]:
    """Globs of what a factor on the stream goes into. Raises PlanError where that is not known."""
    from mergetool.checkpoints.stream import KNOWN, writers_of
    from mergetool.tensors.side_files import read_config

    found: tuple[str, ...] = ()
    for model, source in sources.items():
        config = read_config(source.folder)
        writers = writers_of(config)
        if writers is None:
            what = f"where a scale could be written into networks of type {config.get('model_type')!r} is not known"
            raise PlanError(what, f"model {model!r}", f"remove `scale`; it is known of {', '.join(KNOWN)}")
        found = tuple(dict.fromkeys((*found, *writers)))
    return found

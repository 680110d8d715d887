"""Statistics of models as sources: planned before they are measured, opened when they lie on the disk."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from math import sqrt
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

from mergetool.arch.code import code_of
from mergetool.errors import PlanError, at
from mergetool.layouts.same import Same
from mergetool.methods.base import Method
from mergetool.planning.graph import BASE
from mergetool.planning.sources import Lookup
from mergetool.recipe.data import Data, data_of
from mergetool.recipe.schema import Compute, Recipe
from mergetool.statistics.base import Extent, JointStatistic, Statistic
from mergetool.statistics.measure import STATISTICS, Measuring
from mergetool.statistics.store import SHARED, TURNED
from mergetool.tensors.dtypes import BY_TORCH_NAME
from mergetool.tensors.folder import open_model
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.source import FileStamp, ModelSource, SafetensorsSource

NOTHING: Mapping[str, "StatisticSource"] = MappingProxyType({})
_READ = 1 << 20


class StatisticSource(ModelSource):
    """A statistic of one model: names and shapes, and values once there are some."""

    folder = None

    def __init__(self, form: Extent, dtype: str, asked: Measuring | None = None) -> None:
        self.form, self.asked = form, asked
        self.specs = {n: TensorSpec(n, BY_TORCH_NAME[dtype], shape) for n, shape in form.shapes.items()}
        self._found: ModelSource | None = None
        self._stored: Mapping[str, str] = {}
        self._lock = Lock()

    @classmethod
    def given(cls, found: ModelSource) -> "StatisticSource":
        """One that was measured before."""
        told = found.headers[0].metadata if isinstance(found, SafetensorsSource) else {}
        shared = json.loads(told.get(SHARED, "{}"))
        stored = {**{name: name for name in found.specs}, **shared}
        shapes = {name: found.specs[own].shape for name, own in stored.items()}
        made = cls(Extent(shapes, frozenset(json.loads(told.get(TURNED, "[]")))), "float32")
        made.specs = {name: replace(found.specs[own], name=name) for name, own in stored.items()}
        made._found, made._stored = found, stored
        return made

    @property
    def files(self) -> tuple[FileStamp, ...]:
        """None but those that were given: what is measured belongs to no input."""
        return self._found.files if self._found is not None and self.asked is None else ()

    def filled(self, path: Path) -> "StatisticSource":
        """The same, to be read from a file."""
        made = StatisticSource.given(SafetensorsSource([path], None))
        made.asked = self.asked
        return made

    def stored_name(self, name: str) -> str:
        """What a weight's statistic is called in the file: another weight's name where the two share it."""
        return self._stored[name]

    @property
    def is_there(self) -> bool:
        """Whether it can be read."""
        return self._found is not None

    @property
    def size(self) -> float:
        """The root mean square of all its values."""
        with self._lock:
            return self._size

    @cached_property
    def _size(self) -> float:
        import torch

        total, count = 0.0, 0
        for name in sorted(self.specs):
            dtype = self.specs[name].dtype
            for begin in range(0, self.specs[name].num_bytes, _READ):
                held = bytearray(min(_READ, self.specs[name].num_bytes - begin))
                self.read_bytes(name, begin, memoryview(held))
                values = torch.frombuffer(held, dtype=getattr(torch, _torch_name(dtype.name))).double()
                total += float(values.square().sum())
                count += len(values)
        return sqrt(total / count) if count else 0.0

    def position(self, name: str) -> tuple[int, int]:
        return 0, list(self.specs).index(name)

    def read_bytes(self, name: str, begin: int, buffer: memoryview) -> None:
        assert self._found is not None, f"{name}: read before it was measured"
        self._found.read_bytes(self._stored[name], begin, buffer)

    def close(self) -> None:
        if self._found is not None:
            self._found.close()


def _torch_name(name: str) -> str:
    return next(key for key, dtype in BY_TORCH_NAME.items() if dtype.name == name)


def key_of_statistic(model: str) -> str:
    """What the statistic of a model is called among the sources of a plan."""
    return f"(statistic) {model}"


def statistics_of(
    recipe: Recipe, sources: Mapping[str, ModelSource], given: Mapping[str, ModelSource], lookup: Lookup
) -> dict[str, StatisticSource]:
    """The statistics that a method needs of every model, and steps after it of the base, by their keys among sources.

    Raises SourceError or PlanError for data that cannot be used, or models that cannot be run on it.
    """
    if recipe.adapters_alone:
        return {}
    wanted: dict[str, Statistic] = {}
    method = recipe.method.kernel()
    if method.statistic:
        wanted = dict.fromkeys(recipe.models, STATISTICS[method.statistic](**method.measuring()))
        _check_layout(recipe, next(iter(wanted.values())))
    if method.on_base:
        wanted[BASE] = STATISTICS[method.statistic_of_base]()
    if step := recipe.measuring_step:
        wanted[BASE] = STATISTICS[step.statistic]()
    return {
        key_of_statistic(model): StatisticSource.given(given[model])
        if model in given
        else _planned(recipe, model, statistic, sources, lookup)
        for model, statistic in wanted.items()
    }


def _check_layout(recipe: Recipe, statistic: Statistic) -> None:
    """Raise PlanError where layers of another network are made of what is measured on the models as they are."""
    if isinstance(statistic, JointStatistic) and not isinstance(recipe.layout, Same):
        what = f"{recipe.method.method_name()} runs the merged network, and `slices` make another one than the models"
        raise PlanError(what, "slices", "write method: regmean, or remove `slices`")


def check_measured_once(first: Method, other: Method) -> None:
    """Raise PlanError where two results of a sweep would need another statistic each, and there is one for all."""
    if not other.statistic:
        return
    joint = issubclass(STATISTICS[other.statistic], JointStatistic)
    if joint or first.measuring() != other.measuring():
        what = f"what {other.method_name()} measures depends on its numbers, and a sweep measures once for all results"
        raise PlanError(what, "sweep", "make one result a run: mergetool run RECIPE --set merge.FIELD=VALUE -o PATH")


def _planned(
    recipe: Recipe, model: str, statistic: Statistic, sources: Mapping[str, ModelSource], lookup: Lookup
) -> StatisticSource:
    on_base = recipe.method.kernel().on_base
    where = "base" if model == BASE else f"base on rows of {model!r}" if on_base else f"model {model!r}"
    if recipe.calibration is None:
        what = f"{recipe.method.method_name()} needs a statistic of every model"
        raise PlanError(what, where, "give statistics={MODEL: {NAME: TENSOR}}, or run models in folders")
    data = data_of(recipe.calibration, model)
    if data.measured is not None:
        with at(f"calibration.{model}.measured"):
            return StatisticSource.given(open_model(recipe.path_of(data.measured)))
    assert data.data is not None
    data = data.model_copy(update={"data": str(recipe.path_of(data.data))})
    with at(where):
        tokenizer = _tokenizer(data, sources, lookup)
        source, code = sources[BASE if on_base else model], code_of(recipe.architecture or "")
        if code is not None and statistic.plain:
            asked = _measuring_plain(statistic, source, data, recipe, where)
        else:
            asked = measuring(statistic, source, data, recipe.compute, where, tokenizer)
    return StatisticSource(asked.form, asked.dtype, asked)


def measuring(
    statistic: Statistic, source: ModelSource, data: Data, compute: Compute, where: str, tokenizer: Path | None = None
) -> Measuring:
    """What there is to measure on a model. Raises SourceError or PlanError for data or a model that will not do."""
    from mergetool.networks.running import whole_config
    from mergetool.statistics.examples import examples_of, guessed_examples
    from mergetool.statistics.images import check_length, image_examples, reads_images
    from mergetool.statistics.rows import Fields, read_rows

    assert data.data is not None
    config = whole_config(source, "")
    _check_reads(config)
    form = statistic.form(source.specs, config, "")
    fields = Fields(data.field, data.pair, data.label)
    rows = read_rows(Path(data.data), fields, data.samples, labelled=statistic.labelled(config))
    assert source.folder is not None
    tokenizer = tokenizer or source.tokenizer_folder or source.folder
    if reads_images(config):
        check_length(data.length)
        return Measuring(
            statistic, source, config, image_examples(rows, config), form, compute.dtype, compute.seed, where
        )
    guessed = _comes_later(source, tokenizer) and any(isinstance(row.text, str) for row in rows)
    if guessed:
        examples = guessed_examples(rows, data.length)
    else:
        examples = examples_of(rows, source.folder, config, data.length, tokenizer)
    return Measuring(statistic, source, config, examples, form, compute.dtype, compute.seed, where, guessed=guessed)


def _measuring_plain(statistic: Statistic, source: ModelSource, data: Data, recipe: Recipe, where: str) -> Measuring:
    """The same of a model whose network the recipe's `architecture` builds, which waits for the run."""
    from mergetool.alignment.network import read_tensors
    from mergetool.networks.plain import NetworkCode
    from mergetool.statistics.examples import Example

    assert data.data is not None
    if unused := sorted(data.model_fields_set - {"data", "samples"}):
        what = f"{unused[0]} is for rows of text, and a module that code builds is given tensors"
        raise PlanError(what, f"calibration.{unused[0]}", "remove it")
    assert recipe.architecture is not None
    assert recipe.architecture_file is not None
    code = NetworkCode(recipe.architecture_file, recipe.architecture.rpartition(":")[2])
    rows = {name: x[: data.samples].tolist() for name, x in read_tensors(Path(data.data)).items()}
    each = [dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]
    examples = tuple(Example(f"{data.data}:{n}", row, patches=1) for n, row in enumerate(each, 1))
    form = statistic.form(source.specs, code.config, "")
    compute = recipe.compute
    return Measuring(statistic, source, code.config, examples, form, compute.dtype, compute.seed, where, code)


def _comes_later(source: ModelSource, tokenizer: Path) -> bool:
    """Whether a tokenizer will come with weights that are still to be fetched; then the run is planned again."""
    from mergetool.networks.tokenizer import has_tokenizer

    return not has_tokenizer(tokenizer) and not all(stamp.path.is_file() for stamp in source.files)


def _check_reads(config: Mapping[str, Any]) -> None:
    """Raise PlanError for a network that rows of tokens or of images alone cannot go through."""
    from mergetool.statistics.images import reads_images

    fix = "choose a method that needs no data: mergetool methods"
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise PlanError(f"is an encoder with a decoder ({kind}), and rows hold one text", "", fix)
    if "vocab_size" not in config and "text_config" not in config and not reads_images(config):
        raise PlanError(f"reads neither tokens nor images ({kind}), and rows hold nothing else", "", fix)


def _tokenizer(data: Data, sources: Mapping[str, ModelSource], lookup: Lookup) -> Path | None:
    """The folder of another tokenizer than the model's own."""
    if data.tokenizer is None:
        return None
    if data.tokenizer in sources:
        return sources[data.tokenizer].tokenizer_folder
    return lookup.folder(data.tokenizer)


def to_measure(plan_sources: Mapping[str, ModelSource]) -> list[Measuring]:
    """What a run has to measure, unless it is kept from before."""
    found = (source.asked for source in plan_sources.values() if isinstance(source, StatisticSource))
    return [asked for asked in found if asked is not None]


def data_files(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The files of data that a recipe names, by its field."""
    if recipe.calibration is None:
        return
    each = {"": recipe.calibration} if isinstance(recipe.calibration, Data) else dict(recipe.calibration)
    for model, data in each.items():
        if data.data is not None:
            yield ".".join(filter(None, ("calibration", model, "data"))), recipe.path_of(data.data)

"""Make a bundle: factors of every expert's changes, heads, what the router needs, and the manifest.

factor     tensor by tensor, shared out: task vectors, their leading singular triplets (through the store)
write      the same: into a file for each task, laid out first; what is told of all tasks is measured on the way
first pass the merged weights that routing features come from, if they are not to come from the base
finish     heads, base, config, hashes, manifest

Only one tensor of every model is in memory at a time, a thread.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mergetool._version import __version__
from mergetool.arch.depth import structural_depths
from mergetool.bundle.alike import pairs_of
from mergetool.bundle.compared import write_compared
from mergetool.bundle.files import (
    COMPARED,
    CONFIG_NAME,
    FIRST_PASS,
    MODELING,
    SHARED,
    SPECTRA,
    TensorWriter,
    bundle_config,
    copy_files,
    model_files,
    single_name,
    spectrum_key,
)
from mergetool.bundle.heads import hidden_size, write_class_head, write_head
from mergetool.bundle.manifest import (
    MANIFEST_NAME,
    Base,
    ClassHead,
    Head,
    Manifest,
    Parameter,
    Router,
    Task,
)
from mergetool.bundle.options import Experts, HeadSource, Options
from mergetool.bundle.ranks import (
    columns,
    counted_width,
    is_worthwhile,
    most_bytes,
    most_directions,
)
from mergetool.bundle.routed import routing_matrices
from mergetool.bundle.store import FactorStore
from mergetool.bundle.task_vector import TaskVector, check_finite, directions_of
from mergetool.bundle.written import FactorFiles, Overlap
from mergetool.errors import PlanError
from mergetool.kernels.routing import as_cosines, cosines, without_duplicates
from mergetool.kernels.spectral import Factors, concatenated, orthogonalised, rank_limit, ranks_within
from mergetool.tensors.dtypes import BY_TORCH_NAME, torch_dtype
from mergetool.tensors.header import TensorSpec
from mergetool.tensors.io import sha256_file
from mergetool.tensors.side_files import read_config
from mergetool.tensors.writer import write_file, write_tensors

_WRITING = "writing factors"


def build(
    experts: Experts,
    folder: Path,
    store: FactorStore,
    options: Options,
    num_threads: int = 1,
    kind: "type[Work] | None" = None,
) -> Manifest | None:
    """Write a bundle into `folder` (which exists) and return its manifest; None in a process that does not lead.

    `kind`: what does it, where something is done in another way.
    Raises PlanError for heads that are missing or do not fit and for layers that match nothing, MergeError for weights
    that are not finite.
    """
    work = (kind or Work)(experts, folder, store, options)
    heads = work.write_heads() if experts.leads else {}
    largest = sorted(experts.shapes, key=work.cost, reverse=True)
    factored = dict(zip(largest, experts.share(work.factor, largest, num_threads), strict=True))
    spectra = {name: values for name, (_, values) in factored.items()}
    parameters = work.within_size({name: factored[name][0] for name in experts.shapes}, spectra)
    router = work.router(parameters)
    if router is not None and router.features == "merged":
        chosen = experts.share(lambda name: work.without_redundancy(name, parameters), [*parameters], num_threads)
        parameters = dict(zip(parameters, chosen, strict=True))
        if experts.leads:
            work.write_first_pass(parameters, router)
    if router is not None and router.rank is not None:
        write_compared(experts, folder, store, options, router.matrices, num_threads)
    with FactorFiles(folder, experts.names, parameters, options) as files:
        paths = dict(zip(experts.names, experts.share(files.create, experts.names, num_threads, _WRITING), strict=True))
        files.open()
        measured = experts.share(lambda name: work.write(name, parameters[name], files), largest, num_threads, _WRITING)
    if not experts.leads:
        return None
    parameters = work.with_measures(parameters, dict(zip(largest, measured, strict=True)))
    return work.finish(work.write_base(), work.tasks(paths, heads), parameters, router)


class Work:
    """One build: where things come from and go."""

    def __init__(self, experts: Experts, folder: Path, store: FactorStore, options: Options) -> None:
        self.experts = experts
        self.folder = folder
        self.store = store
        self.options = options
        self._layouts: list[Mapping[str, str]] = []

    # ---------------------------------------------------------------- factors

    def cost(self, name: str) -> int:
        """About what the factors of a tensor cost."""
        shape = self.experts.shapes[name]
        return math.prod(shape) * (1 + most_directions(name, shape, self.options, len(self.experts.names)))

    def factor(self, name: str) -> tuple[Parameter, list[Tensor]]:
        """Decide how a tensor is kept, and put its factors into the store. Also all tasks' singular values."""
        shape = self.experts.shapes[name]
        changes = self._changes(name)
        if all(change.is_nothing for change in changes):
            return Parameter(policy="skip", shape=shape), []
        known = directions_of(change.num_directions for change in changes)
        most = most_directions(name, shape, self.options, len(changes), known)
        whole = all(change.is_stored for change in changes) and known is None  # no more than that is asked for
        if most == 0 or whole:
            return Parameter(policy="full", shape=shape), []
        room = rank_limit(self.options.rank, min(shape[0], columns(shape)), len(changes))
        chosen = [change.chosen(self.store, most, self.options.rank, room) for change in changes]
        ranks = tuple(rank for rank, _ in chosen)
        if not is_worthwhile(shape, max(ranks), self.options):
            return Parameter(policy="full", shape=shape), []
        return Parameter(policy="svd", shape=shape, ranks=ranks), [values.cpu() for _, values in chosen]

    def within_size(
        self, parameters: dict[str, Parameter], spectra_of: Mapping[str, list[Tensor]]
    ) -> dict[str, Parameter]:
        """The parameters with fewer directions where all of them would take more space than a bundle may."""
        spectra = [(name, s) for name in parameters for s in spectra_of[name]]
        bound = most_bytes(self.options, self.experts.sources["base"].specs.values())
        if bound is None:
            return parameters
        if self.experts.leads:
            self._write_spectra(spectra_of)
        if not spectra:
            return parameters
        width = counted_width(self.options)
        full = [torch.Size(parameter.shape).numel() for parameter in parameters.values() if parameter.policy == "full"]
        budget = bound - width * sum(full) * len(self.experts.names)
        costs = [width * (parameters[name].shape[0] + columns(parameters[name].shape)) + 4 for name, _ in spectra]
        ranks: dict[str, list[int]] = {}
        for (name, _), rank in zip(spectra, ranks_within([s for _, s in spectra], costs, budget), strict=True):
            ranks.setdefault(name, []).append(rank)
        return parameters | {name: _at_most(parameters[name], several) for name, several in ranks.items()}

    def _write_spectra(self, spectra_of: Mapping[str, list[Tensor]]) -> None:
        values = {spectrum_key(task, name): s for name, each in spectra_of.items() for task, s in enumerate(each)}
        write_tensors(self.folder / SPECTRA, values, {"format": "pt"})

    def _changes(self, name: str) -> list[TaskVector]:
        changes = [self.experts.change(task, name) for task in self.experts.names]
        for task, change in zip(self.experts.names, changes, strict=True):
            if not change.is_stored:  # what is stored is looked at when it is written
                check_finite(task, name, change.is_finite)
        return changes

    def _stored(self, name: str, parameters: Mapping[str, Parameter]) -> list[Factors]:
        """Every task's factors of a tensor, from the store, rounded as they are written."""
        most = max(*parameters[name].ranks, 1)
        dtype = torch_dtype(BY_TORCH_NAME[self.options.dtype])
        rounded = []
        for task, change, rank in zip(self.experts.names, self._changes(name), parameters[name].ranks, strict=True):
            check_finite(task, name, change.is_finite)
            factors = change.factors(self.store, most).leading(rank)
            rounded.append(Factors(factors.u.to(dtype).double(), factors.s.double(), factors.v.to(dtype).double()))
        return rounded

    def write(self, name: str, parameter: Parameter, files: FactorFiles) -> Overlap | None:
        """Write what is kept of a tensor, and tell what is measured of it."""
        if parameter.policy == "skip":
            return None
        if parameter.policy == "full":
            return files.put_whole(name, [self.experts.change(task, name).whole() for task in self.experts.names])
        own = zip(self.experts.names, parameter.ranks, strict=True)
        return files.put(name, [self._leading(task, name, rank) for task, rank in own])

    def _leading(self, task: str, name: str, rank: int) -> Factors:
        if (known := self.store.known((task, name), rank)) is not None:
            return known
        return self.experts.change(task, name).leading(self.store, max(1, rank)).leading(rank)

    def with_measures(
        self, parameters: Mapping[str, Parameter], measured: Mapping[str, Overlap | None]
    ) -> dict[str, Parameter]:
        """The parameters with how much tasks are in each other's way; experts that are alike are told of."""
        found = {name: one for name in parameters if (one := measured[name]) is not None}
        if self.options.router is not None and found:
            inner = sum((one.inner for one in found.values()), torch.zeros(()))
            self.experts.met(pairs_of(self.experts.names, as_cosines(inner)))
        return {
            name: parameter.model_copy(update={"interference": found[name].interference})
            if parameter.policy == "svd"
            else parameter
            for name, parameter in parameters.items()
        }

    # ---------------------------------------------------------------- routing

    def router(self, parameters: Mapping[str, Parameter]) -> Router | None:
        """The router, with the matrices it reads."""
        options = self.options.router
        if options is None:
            return None
        one = len(self.experts.names) == 1  # nothing to choose
        matrices = () if one else routing_matrices(parameters, options.layers)
        merged = options.features == "merged"
        return Router(
            matrices=matrices,
            features=options.features,
            pool=options.pool,
            norm=options.norm,
            mode=options.mode,
            threshold=options.threshold,
            top_k=options.top_k,
            temperature=options.temperature,
            redundancy=options.redundancy if merged else None,
            per=options.per,
            early=options.early,
            gate=options.gate,
            rank=options.rank if matrices else None,
        )

    def without_redundancy(self, name: str, parameters: Mapping[str, Parameter]) -> Parameter:
        """The parameter with the tasks that go into the first-pass merge."""
        parameter = parameters[name]
        if parameter.policy != "svd" or self.options.router is None:
            return parameter
        every = concatenated(self._stored(name, parameters))
        similar = cosines(every.u.mT @ every.u, every.v.mT @ every.v, every.s, parameter.ranks)
        chosen = without_duplicates(similar, self.options.router.redundancy)
        return parameter.model_copy(update={"kept": tuple(chosen)})

    def write_first_pass(self, parameters: Mapping[str, Parameter], router: Router) -> None:
        """Base plus TSV-Merge of the tasks that were kept, as far as the last layer that routing reads."""
        depths = structural_depths(parameters)
        last = max((depth[0] for name in router.matrices if (depth := depths[name]) is not None), default=0)
        wanted = [
            name
            for name, parameter in parameters.items()
            if parameter.policy != "skip" and ((depth := depths[name]) is None or depth[0] <= last)
        ]
        base = self.experts.sources["base"].specs
        specs = [TensorSpec(name, base[name].dtype, base[name].shape) for name in wanted]
        with TensorWriter(self.folder, FIRST_PASS, specs) as writer:
            for name in wanted:
                writer.put(name, self._merged(name, parameters))

    def _merged(self, name: str, parameters: Mapping[str, Parameter]) -> Tensor:
        base = self.experts.read("base", name)
        chosen = parameters[name].kept
        if chosen is None:
            return base + torch.stack([change.dense() for change in self._changes(name)]).mean(0)
        factors = self._stored(name, parameters)
        merged = orthogonalised(concatenated([factors[task] for task in chosen])).dense()
        return base + merged.to(base.dtype).view_as(base)

    # ---------------------------------------------------------------- everything else

    def write_heads(self) -> dict[str, Head | ClassHead]:
        """Copy the heads; either every task has one or none has."""
        router = self.options.router
        if self.experts.heads and router is not None and router.unknown == "base":
            what = "`unknown: base` lets the base answer, which has none of the experts' heads"
            raise PlanError(what, "merge.router.unknown", "write unknown: refuse, or unknown: nearest")
        missing = [name for name in self.experts.names if name not in self.experts.heads]
        if missing and self.experts.heads:
            what = f"task {missing[0]!r} has no head, but {next(iter(self.experts.heads))!r} has"
            fix = f"add head: {{weights: PATH}} to model {missing[0]!r}, or take all heads away"
            raise PlanError(what, f"model {missing[0]!r}", fix)
        return {name: self._write_head(name) for name in self.experts.heads}

    def _write_head(self, task: str) -> Head | ClassHead:
        source = self.experts.heads[task]
        if isinstance(source, HeadSource):
            width = hidden_size(read_config(self.experts.sources["base"].folder))
            return write_head(task, source.path, self.folder, width, source.pool, source.normalize, source.labels)
        if source.layout not in self._layouts:
            self._layouts.append(source.layout)
        return write_class_head(task, source, self.folder, self._layouts.index(source.layout))

    def write_base(self) -> Base:
        """Copy the base, byte for byte, or say where it is."""
        source = self.experts.sources["base"]
        digests = self.experts.digests("base")
        if self.options.base == "reference":
            files = source.files
            place = source.folder or files[0].path
            return Base(kind="reference", path=str(place.absolute()), files=digests)
        copy_files(model_files(source), self.folder / "base", self.experts.leaving)
        if source.folder is None:
            digests = {single_name(source.files[0].path): digest for digest in digests.values()}
        return Base(kind="copy", path="base", files=digests)

    def tasks(
        self, files: Mapping[str, str], heads: Mapping[str, Head | ClassHead], scales: Mapping[str, float] | None = None
    ) -> tuple[Task, ...]:
        """The manifest's entries."""
        return tuple(
            Task(
                name=name,
                source=source,
                files=digests,
                factors=files[name],
                scale=(scales or {}).get(name),
                head=heads.get(name),
            )
            for name in self.experts.names
            for source, digests in [self.experts.provenance(name)]
        )

    def finish(
        self, base: Base, tasks: tuple[Task, ...], parameters: Mapping[str, Parameter], router: Router | None
    ) -> Manifest:
        """Config, hashes, manifest."""
        config = read_config(self.experts.sources["base"].folder)
        write_file(self.folder / CONFIG_NAME, json.dumps(bundle_config(config), indent=2) + "\n")
        write_file(self.folder / "modeling_mass.py", MODELING)
        globs = ("base/*", "factors/*", "heads/**/*", FIRST_PASS, SPECTRA, COMPARED, SHARED, CONFIG_NAME, "*.py")
        found = [path for glob in globs for path in sorted(self.folder.glob(glob)) if path.is_file()]
        written = [path.relative_to(self.folder).as_posix() for path in found]
        known = {f"{base.path}/{name}": digest for name, digest in base.files.items()}
        manifest = Manifest(
            format_version=3 if (self.folder / SHARED).is_file() else 2 if self._layouts else 1,
            mergetool=__version__,
            kind=self.options.kind,
            base=base,
            tasks=tasks,
            dtype=self.options.dtype,
            parameters=parameters,
            router=router,
            heads=self.options.heads,
            layouts=tuple(self._layouts),
            files={name: known.get(name) or sha256_file(self.folder / name) for name in written},
        )
        self._write(manifest)
        if self.options.router is None or self.options.router.unknown is None or router is None or not router.matrices:
            return manifest  # (one expert is kept whole, so that nothing tells its inputs)
        from mergetool.bundle.reference import with_reference

        told = with_reference(self.folder, manifest, self.options.router, self._whole_change, self.experts.device)
        self._write(told)
        return told

    def _whole_change(self, task: str, name: str) -> Tensor | None:
        return self.experts.change(task, name).dense() if name in self.experts.shapes else None

    def _write(self, manifest: Manifest) -> None:
        unused = None if manifest.layouts else {"layouts"}
        text = json.dumps(manifest.model_dump(mode="json", exclude_none=True, exclude=unused), indent=1)
        write_file(self.folder / MANIFEST_NAME, text + "\n")


def _at_most(parameter: Parameter, ranks: Sequence[int]) -> Parameter:
    """The parameter with no more directions of each task than these."""
    fewer = tuple(min(pair) for pair in zip(parameter.ranks, ranks, strict=True))
    return parameter.model_copy(update={"ranks": fewer})

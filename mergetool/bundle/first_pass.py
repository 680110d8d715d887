"""The first pass through a bundle: how near every sample is to every task.

The base (or the merged model) runs as far as the last matrix that the router reads, and no further. What goes into
those matrices, pooled over tokens, is compared with the directions that each task's own update of them acts on.
Several threads may do so at once: modules are listened to all the time, by whoever runs them in the calling thread.

Reference: Crisostomi et al., MASS, https://arxiv.org/abs/2504.05342, section 3.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergetool.bundle.batch import num_samples, some_tokens, take
from mergetool.bundle.compared import read_compared
from mergetool.bundle.factors import TaskFactors
from mergetool.bundle.files import FIRST_PASS, read_all
from mergetool.bundle.local import make_local, replaced
from mergetool.bundle.manifest import Pool, Router
from mergetool.bundle.readout import pool_tokens
from mergetool.errors import SourceError
from mergetool.kernels.arrow import mean_similarity, prototypes
from mergetool.kernels.known import Parts, parts
from mergetool.kernels.routing import mean_distance

if TYPE_CHECKING:
    from mergetool.bundle.examples import Examples
    from mergetool.networks.build import LoadedModel

_UNUSED = ("labels", "past_key_values", "use_cache")
"""Inputs that only the outputs need, which a first pass never gets to."""
_NO_DOUBT = 8.0
"""Nats by which a task must be ahead after some tokens."""


Watch = Callable[[Tensor], None]


class _Stop(Exception):  # noqa: N818  (no error: it ends the pass)
    pass


class FirstReading:
    """What one pass has read so far."""

    def __init__(
        self,
        bases: Sequence[Sequence[Tensor]],
        inputs: Mapping[str, Tensor],
        pool: Pool,
        closely: bool,
        watch: Watch | None,
    ) -> None:
        """`closely`: look at beginnings and ends of inputs, too, and let `watch` see (tokens, features)."""
        self._watch = watch
        self._bases = bases
        self._closely = closely
        self._mask = inputs.get("attention_mask")
        self._num_samples = num_samples(inputs)
        self._pool = pool
        self._pooled: dict[int, tuple[Tensor, Tensor]] = {}  # query, key and value read the same tensor: pool it once
        self.features: dict[int, Tensor] = {}
        self.parts: dict[int, Parts] = {}
        self.mask: Tensor | None = None

    @property
    def pooled(self) -> list[Tensor]:
        """What was read at every matrix, in their order."""
        return [self.features[place] for place in range(len(self._bases))]

    def read(self, place: int, x: Tensor) -> None:
        """Pool what goes into one of the matrices. Raises _Stop after the last of them."""
        if place not in self.features:
            if id(x) not in self._pooled:
                self._pooled[id(x)] = x, pool_tokens(self._by_sample(x).float(), self._mask, self._pool)
            self.features[place] = self._pooled[id(x)][1]
            if self._closely:
                self._look_closely(place, self._by_sample(x).float())
        if len(self.features) == len(self._bases):
            raise _Stop

    def _look_closely(self, place: int, x: Tensor) -> None:
        x = x.reshape(len(x), -1, x.shape[-1])
        usable = self._mask is not None and self._mask.shape == x.shape[:2]
        self.mask = self._mask if usable else x.new_ones(x.shape[:2])
        assert self.mask is not None
        if self._watch is not None:
            self._watch(x[self.mask != 0])
        self.parts[place] = parts(x, self.mask, self._bases[place])

    def _by_sample(self, x: Tensor) -> Tensor:
        """(samples, ..., features): windows of one image lie one after the other in some networks."""
        windows, rest = divmod(len(x), self._num_samples)
        return x.reshape(self._num_samples, -1, x.shape[-1]) if windows > 1 and rest == 0 else x


class FirstPass:
    """What a router reads in a model, and what it compares that with."""

    def __init__(self, base: "LoadedModel", factors: TaskFactors, router: Router, folder: Path) -> None:
        self._model = base.model
        self.names = base.places.names
        self._router = router
        self.modules = _modules(base, router, folder)
        turned = [type(module).__name__ == "Conv1D" for module in self.modules]  # GPT-2's linear layers
        if router.rank is None:
            self.bases = factors.bases(router.matrices, turned)
        else:
            self.bases = read_compared(folder, router.matrices, turned, len(factors.manifest.tasks))
        merged = folder / FIRST_PASS
        self._merged: list[tuple[nn.Module, dict[str, Tensor]]] = []
        if merged.is_file():
            self._merged = _replacements(base, read_all(merged))
        self._local = threading.local()
        for place, module in enumerate(self.modules):
            module.register_forward_pre_hook(lambda _, arguments, place=place: self._read(place, arguments[0]))

    @property
    def shape(self) -> tuple[int, int]:
        """How many features it reads of a sample, of all matrices together, and of how many tasks it tells."""
        return sum(own[0].shape[1] for own in self.bases), max(map(len, self.bases), default=0)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Keep everything on `device`, where the model is, and other weights of it in its `dtype`."""
        self.bases = [[basis.to(device) for basis in bases] for bases in self.bases]
        self._merged = [
            (module, {k: v.to(device, dtype) for k, v in values.items()}) for module, values in self._merged
        ]

    def judge(self, inputs: Mapping[str, Tensor], examples: "Examples | None" = None) -> tuple[Tensor, Tensor]:
        """Distances (samples, tasks) from tasks' directions, or minus similarities to first ones; doubt (samples,).

        Samples that are longer than `early` tokens are read whole only if those leave it open which task it is, or
        whether it is any. There is no doubt without examples.
        """
        few = self._router.early
        early = None if few is None else some_tokens(inputs, few, last=0 if examples is None else few // 2)
        if early is None:
            return self._judge(inputs, examples)
        distances, doubt = self._judge(early[0], examples)
        nearest, second = distances.topk(2, largest=False).values.unbind(-1)
        undecided = second - nearest < _NO_DOUBT
        if examples is not None:
            undecided |= doubt > examples.most
        if rows := (undecided & early[1]).nonzero().flatten().tolist():
            distances[rows], doubt[rows] = self._judge(take(inputs, rows), examples)
        return distances, doubt

    def _judge(self, inputs: Mapping[str, Tensor], examples: "Examples | None") -> tuple[Tensor, Tensor]:
        features = self.features(inputs)
        distances = self.compare(features)
        return distances, distances.new_zeros(len(distances)) if examples is None else examples.doubt(features)

    def compare(self, features: Sequence[Tensor]) -> Tensor:
        """Distances (samples, tasks) of what was read of whole samples."""
        if self._router.norm == "arrow":
            return -mean_similarity(features, [prototypes(bases) for bases in self.bases])
        return mean_distance(features, self.bases, self._router.norm)

    def features(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Pooled inputs (samples, features), float32, of every routing matrix."""
        return self.read(inputs).pooled

    def read(self, inputs: Mapping[str, Tensor], *, closely: bool = False, watch: Watch | None = None) -> FirstReading:
        """Everything that is read of inputs. Stops the pass at the last routing matrix."""
        reading = FirstReading(self.bases, inputs, self._router.pool, closely, watch)
        self._local.reading = reading
        try:
            with self._merged_weights():
                self._model(**{key: value for key, value in inputs.items() if key not in _UNUSED})
        except _Stop:
            pass
        finally:
            self._local.reading = None
        return reading

    def _read(self, place: int, x: Tensor) -> None:
        reading = getattr(self._local, "reading", None)
        if reading is not None:
            reading.read(place, x)

    @contextmanager
    def _merged_weights(self) -> Iterator[None]:
        """While inside, the model has the merged weights in this thread, if routing features come from those."""
        with ExitStack() as stack:
            for module, values in self._merged:
                stack.enter_context(replaced(module, values))
            yield


def _replacements(base: "LoadedModel", merged: Mapping[str, Tensor]) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Merged weights by module and name in it."""
    modules = []
    for path, module in base.model.named_modules():
        own = {
            key: merged[name].to(value.dtype)
            for key, value in module._parameters.items()
            if value is not None and (name := base.places.names.get(f"{path}.{key}".lstrip("."), "")) in merged
        }
        if own:
            make_local(module)
            modules.append((module, own))
    return modules


def _modules(base: "LoadedModel", router: Router, folder: Path) -> list[nn.Module]:
    """The modules whose weights are the routing matrices, in their order."""
    known, modules = set(router.matrices), dict[str, nn.Module]()
    for path, module in base.model.named_modules():
        if (name := base.places.names.get(f"{path}.weight")) in known and name is not None:
            modules[name] = module
    if missing := known - modules.keys():
        what = f"the model has no module with weight {min(missing)!r}, which routing reads"
        raise SourceError(what, str(folder), "use the transformers version that the base was saved with")
    return [modules[name] for name in router.matrices]

"""Rows of gates from prompts: what a base computes for texts that belong to an expert, less that for texts that do not.

The network is never in memory as a whole: its layers are made empty, and each one's weights are there while it runs.
Prompts are padded on the right, where causal attention cannot see them.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergetool.errors import MergeError, PlanError
from mergetool.kernels.rng import normal, stream_key, uniform
from mergetool.networks.library import first_line, library, quiet
from mergetool.networks.tokenizer import load_tokenizer
from mergetool.tensors.dtypes import torch_dtype
from mergetool.tensors.io import bytes_of
from mergetool.tensors.side_files import read_config
from mergetool.tensors.source import ModelSource

_EMBEDDINGS = "model.embed_tokens.weight"
_PIECE = 1 << 20
"""Elements that are read and widened at once."""
_TOKENS = 4096
"""Of all prompts that go through the network together, padding included."""
_SHARE = 128
"""Of those that one thread takes."""
CPU = torch.device("cpu")
Prompts = list[list[int]]
"""Ids of the tokens of each text."""


@dataclass(frozen=True)
class Asked:
    """An expert, and the texts that say what it is for."""

    name: str
    prompts: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()


def drawn_gates(kind: str, asked: Sequence[Asked], layers: int, width: int, seed: int) -> Tensor:
    """Rows for training to begin with, (layers, experts, width): `random`, `uniform-random`, or `uniform` (zeros)."""
    gates = torch.zeros(layers, len(asked), width)
    if kind != "uniform":
        for layer in range(layers):
            for row, each in zip(gates[layer], asked, strict=True):
                key = stream_key(seed, f"gate {layer}", each.name)
                row.copy_(normal(key, 0, row) if kind == "random" else uniform(key, 0, row) * width**-0.5)
    return gates


def gates_from_prompts(
    kind: str, base: ModelSource, asked: Sequence[Asked], say: Callable[[str], None], device: torch.device = CPU
) -> Tensor:
    """Rows of length 1, (layers, experts, width): `embedding`, `hidden` or `hidden-avg`; zeros without prompts.

    `device`: where the network runs. Raises SourceError, PlanError or MergeError.
    """
    texts = list(dict.fromkeys(text for each in asked for text in (*each.prompts, *each.avoid)))
    ids = _ids(base, texts)
    if kind == "embedding":
        states = _summed_embeddings(base, ids)
    else:
        say(f"running {len(texts)} prompts through the base, layer by layer")
        states = _hidden_states(base, ids, device, mean=kind == "hidden-avg")
    by_text = dict(zip(texts, states, strict=True))
    gates = torch.stack([_row(each, by_text, sums=kind == "embedding") for each in asked], 1)
    if not bool(torch.isfinite(gates).all()):
        raise MergeError("hidden states of the prompts are not finite", "merge.gate", "repair the base's weights")
    layers = int(read_config(base.folder)["num_hidden_layers"])
    return gates.expand(layers, -1, -1).float()


def _row(asked: Asked, states: Mapping[str, Tensor], *, sums: bool) -> Tensor:
    """The direction that calls an expert, in each layer."""
    if not asked.prompts:
        return torch.zeros_like(next(iter(states.values())))
    centre = _centre([states[text] for text in asked.prompts], sums=sums)
    if asked.avoid:
        least = 1e-6 * centre.norm(dim=-1, keepdim=True)
        centre = centre - _centre([states[text] for text in asked.avoid], sums=sums)
        centre = centre * (centre.norm(dim=-1, keepdim=True) > least)  # the first layer sees the last token only
        if not bool(centre.any()):
            what = f"the prompts of expert {asked.name!r} and what it avoids are the same to the base"
            raise PlanError(what, f"merge.experts.{asked.name}", "write prompts that differ from those under `avoid`")
    return _unit(centre)


def _centre(states: Sequence[Tensor], *, sums: bool) -> Tensor:
    """The mean of states, or the direction of the sum of embeddings."""
    total = torch.stack(list(states)).sum(0)
    return _unit(total) if sums else total / len(states)


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-8)


def _ids(base: ModelSource, texts: Sequence[str]) -> Prompts:
    """Ids of the tokens of each text, begun as the tokenizer begins one."""
    assert base.folder is not None
    tokenizer = load_tokenizer(base.folder, fix="copy its tokenizer.json there, or write gate: random")
    begin = tokenizer.bos_token or ""
    rows = base.specs[_EMBEDDINGS].shape[0]
    tokens = [list(tokenizer(begin + text, add_special_tokens=False)["input_ids"]) for text in texts]
    for text, ids in zip(texts, tokens, strict=True):
        if not ids or max(ids) >= rows:
            what = f"its tokenizer makes no token of {text!r}" if not ids else f"it has no embedding {max(ids)}"
            raise PlanError(what, f"the base: {base.folder}", "write another prompt, or give it its own tokenizer")
    return tokens


def _read(base: ModelSource, name: str, start: int, out: Tensor) -> Tensor:
    """Fill `out` (float32) with elements of a tensor from `start` on."""
    flat, dtype = out.view(-1), base.specs[name].dtype
    stored = torch.empty(min(_PIECE, len(flat)), dtype=torch_dtype(dtype))
    for begin in range(0, len(flat), _PIECE):
        piece = stored[: len(flat) - begin]
        base.read_bytes(name, (start + begin) * dtype.bits // 8, bytes_of(piece))
        flat[begin : begin + len(piece)].copy_(piece)
    return out


def _embeddings(base: ModelSource, ids: Sequence[int]) -> dict[int, Tensor]:
    width = base.specs[_EMBEDDINGS].shape[1]
    return {token: _read(base, _EMBEDDINGS, token * width, torch.empty(width)) for token in sorted(set(ids))}


class _Shelf:
    """Memory for the weights of one layer, which all layers use one after the other."""

    def __init__(self, base: ModelSource, device: torch.device) -> None:
        self._base, self._device = base, device
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def weights(self, layer: int, names: Iterable[str]) -> dict[str, Tensor]:
        """The weights of a layer, in float32. Those of the layer before are gone."""
        return {name: self._weight(f"model.layers.{layer}.{name}", name) for name in names}

    def _weight(self, stored: str, name: str) -> Tensor:
        shape = self._base.specs[stored].shape
        if (name, shape) not in self._tensors:
            self._tensors[name, shape] = torch.empty(shape)
        return _read(self._base, stored, 0, self._tensors[name, shape]).to(self._device)


def _summed_embeddings(base: ModelSource, ids: Prompts) -> list[Tensor]:
    """One row for each text, that of every layer, (1, width) in float64."""
    rows = _embeddings(base, [token for text in ids for token in text])
    return [torch.stack([rows[token].double() for token in text]).sum(0, keepdim=True) for text in ids]


def _hidden_states(base: ModelSource, ids: Prompts, device: torch.device, *, mean: bool) -> list[Tensor]:
    """For each text what goes into every layer, at its last token or on average, (layers, width) in float64."""
    network, shelf = _empty_network(base), _Shelf(base, device)
    for module in network.modules():
        module._buffers.update({name: each.to(device) for name, each in module._buffers.items() if each is not None})
    by_place: dict[int, Tensor] = {}
    for batch in _batches(ids, range(len(ids)), _TOKENS):
        parts = list(_batches(ids, batch, _SHARE))
        together = _Together(network, shelf, len(parts), mean=mean)
        inputs = (_inputs(base, [ids[place] for place in part]) for part in parts)
        done = together.run([(rows.to(device), mask.to(device)) for rows, mask in inputs])
        for part, states in zip(parts, done, strict=True):
            by_place |= dict(zip(part, states.unbind(1), strict=True))
    return [by_place[place] for place in range(len(ids))]


def _batches(ids: Prompts, places: Iterable[int], most: int) -> Iterator[list[int]]:
    """Places of texts of about one length, together at most so many tokens."""
    batch: list[int] = []
    for place in sorted(places, key=lambda place: len(ids[place])):
        if batch and len(ids[place]) * (len(batch) + 1) > most:
            yield batch
            batch = []
        batch.append(place)
    yield batch


def _inputs(base: ModelSource, ids: Prompts) -> tuple[Tensor, Tensor]:
    """Embeddings and mask of some texts."""
    longest = max(map(len, ids))
    rows = _embeddings(base, [token for text in ids for token in text])
    nothing = torch.zeros_like(next(iter(rows.values())))
    inputs = torch.stack([torch.stack([rows[t] for t in text] + [nothing] * (longest - len(text))) for text in ids])
    return inputs, torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in ids])


def _empty_network(base: ModelSource) -> Any:
    """The base without its head and without weights. Raises PlanError where transformers cannot build it."""
    transformers = library("measuring hidden states", "merge.gate", PlanError)
    from accelerate import init_empty_weights

    config = read_config(base.folder)
    try:
        settings = transformers.AutoConfig.for_model(**config)
        with quiet(), init_empty_weights(include_buffers=False):
            return transformers.AutoModel.from_config(settings, dtype=torch.float32).eval()
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        what = f"transformers cannot build it: {first_line(error)}"
        raise PlanError(what, f"the base: {base.folder}", "write gate: embedding, which needs no network") from error


class _SeenAll(Exception):  # noqa: N818  (no error: the last layer need not run)
    """Every layer has been entered."""


class _Together:
    """Some texts on their way through the network, in parts: each in a thread of its own, layer by layer together.

    Which texts make a part does not depend on the number of cores, and a thread computes alone: so the numbers don't.
    """

    def __init__(self, network: Any, shelf: _Shelf, parts: int, *, mean: bool) -> None:
        self._network, self._shelf, self._mean = network, shelf, mean
        self._own = threading.local()
        self._entered = 0
        self._together = threading.Barrier(parts, action=self._load)

    def run(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """For each part (embeddings and mask) what goes into every layer, (layers, texts, width) in float64."""
        hooks = [layer.register_forward_pre_hook(self._enter) for layer in self._network.layers]
        with ThreadPoolExecutor(len(parts)) as pool:
            done = [pool.submit(self._run, *part) for part in parts]
        for hook in hooks:
            hook.remove()
        errors = [error for each in done if (error := each.exception()) is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error  # not that the others waited in vain
        return [each.result() for each in done]

    def _run(self, inputs: Tensor, mask: Tensor) -> Tensor:
        self._own.states, self._own.mask = [], mask
        try:
            with torch.no_grad():
                self._network(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
        except _SeenAll:
            return torch.stack(self._own.states).cpu()
        except BaseException:
            self._together.abort()
            raise
        raise AssertionError("a network has no layers")

    def _enter(self, _: Any, given: tuple[Tensor, ...]) -> None:
        """Keep what comes into a layer, and wait until its weights are there."""
        hidden, mask, states = given[0], self._own.mask, self._own.states
        counts = mask.sum(1)
        if self._mean:
            states.append((hidden.double() * mask[..., None]).sum(1) / counts[:, None])
        else:
            states.append(hidden.double()[torch.arange(len(hidden), device=hidden.device), counts - 1])
        if len(states) == len(self._network.layers):
            raise _SeenAll
        self._together.wait()

    def _load(self) -> None:
        """The weights of the next layer, when all parts are through the one before."""
        layer = self._network.layers[self._entered]
        layer.load_state_dict(self._shelf.weights(self._entered, layer.state_dict()), assign=True)
        self._entered += 1

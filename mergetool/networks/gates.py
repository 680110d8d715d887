"""Rows of gates from prompts: what a base computes for texts that belong to an expert, less that for texts that do not.

The network is never in memory as a whole: its layers are made empty, and each one's weights are there while it runs.
Prompts are padded on the right, where causal attention cannot see them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
_TOKENS = 4096
"""Of all prompts that go through the network together, padding included."""
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


def gates_from_prompts(kind: str, base: ModelSource, asked: Sequence[Asked], say: Callable[[str], None]) -> Tensor:
    """Rows of length 1, (layers, experts, width): `embedding`, `hidden` or `hidden-avg`; zeros without prompts.

    Raises SourceError, PlanError or MergeError.
    """
    texts = list(dict.fromkeys(text for each in asked for text in (*each.prompts, *each.avoid)))
    ids = _ids(base, texts)
    if kind == "embedding":
        states = _summed_embeddings(base, ids)
    else:
        say(f"running {len(texts)} prompts through the base, layer by layer")
        states = _hidden_states(base, ids, mean=kind == "hidden-avg")
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


def _read(base: ModelSource, name: str, start: int = 0, count: int | None = None) -> Tensor:
    """Rows of a tensor in float32; all of them without a count."""
    spec = base.specs[name]
    shape = spec.shape if count is None else (count, *spec.shape[1:])
    stored = torch.empty(shape, dtype=torch_dtype(spec.dtype))
    base.read_bytes(name, start * (spec.num_bytes // max(1, spec.shape[0])), bytes_of(stored.reshape(-1)))
    return stored.float()


def _embeddings(base: ModelSource, ids: Sequence[int]) -> dict[int, Tensor]:
    return {token: _read(base, _EMBEDDINGS, token, 1)[0] for token in sorted(set(ids))}


def _summed_embeddings(base: ModelSource, ids: Prompts) -> list[Tensor]:
    """One row for each text, that of every layer, (1, width) in float64."""
    rows = _embeddings(base, [token for text in ids for token in text])
    return [torch.stack([rows[token].double() for token in text]).sum(0, keepdim=True) for text in ids]


def _hidden_states(base: ModelSource, ids: Prompts, *, mean: bool) -> list[Tensor]:
    """For each text what goes into every layer, at its last token or on average, (layers, width) in float64."""
    network = _empty_network(base)
    by_place: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch in _batches(ids):
            states = _run(base, network, [ids[place] for place in batch], mean=mean)
            by_place |= dict(zip(batch, states.unbind(1), strict=True))
    return [by_place[place] for place in range(len(ids))]


def _batches(ids: Prompts) -> Iterator[list[int]]:
    """Places of texts of about one length, of which so many go through the network together."""
    batch: list[int] = []
    for place in sorted(range(len(ids)), key=lambda place: len(ids[place])):
        if batch and len(ids[place]) * (len(batch) + 1) > _TOKENS:
            yield batch
            batch = []
        batch.append(place)
    yield batch


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


class _Seen(Exception):  # noqa: N818  (no error: the last layer need not run)
    """Every layer has been entered."""


def _run(base: ModelSource, network: Any, ids: Prompts, *, mean: bool) -> Tensor:
    """What goes into every layer, (layers, texts, width) in float64."""
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in ids])
    rows = _embeddings(base, [token for text in ids for token in text])
    nothing = torch.zeros_like(next(iter(rows.values())))
    inputs = torch.stack([torch.stack([rows[t] for t in text] + [nothing] * (longest - len(text))) for text in ids])
    counts = mask.sum(1)
    states: list[Tensor] = []

    def enter(place: int, layer: Any, given: Any) -> None:
        hidden = given[0].double()
        if mean:
            states.append((hidden * mask[..., None]).sum(1) / counts[:, None])
        else:
            states.append(hidden[torch.arange(len(ids)), counts - 1])
        if place == len(network.layers) - 1:
            raise _Seen
        names = layer.state_dict().keys()
        layer.load_state_dict({name: _read(base, f"model.layers.{place}.{name}") for name in names}, assign=True)

    hooks = [
        each.register_forward_pre_hook(lambda layer, given, place=place: enter(place, layer, given))
        for place, each in enumerate(network.layers)
    ]
    hooks += [
        each.register_forward_hook(lambda layer, given, out: layer.to("meta") and None) for each in network.layers
    ]
    try:
        network(inputs_embeds=inputs, attention_mask=mask, use_cache=False)
    except _Seen:
        return torch.stack(states)
    finally:
        for hook in hooks:
            hook.remove()
    raise AssertionError("a network has no layers")

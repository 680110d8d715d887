"""Inputs that are made up, for a bundle to know beforehand what strange ones look like, and usual ones of its tasks.

random      tokens drawn from the whole vocabulary; images of noise
repeated    one to three tokens, again and again; images of one colour
usual       tokens that one task's training has seen, the more it has moved them the oftener
glued       beginnings of two tasks' usual inputs

All are drawn from one seed, so that a bundle is the same whenever it is made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergetool.bundle.mass_model import MassModel
from mergetool.errors import PlanError, SourceError

_COUNT = 128
"""Inputs of every kind."""
_BATCH = 32
_LENGTHS = (4, 31)
"""Tokens of an input: at least, and below."""
_SEED = 0


@dataclass(frozen=True)
class Markup:
    """What a tokenizer puts around a text."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    every: tuple[int, ...] = ()
    """All tokens that say nothing."""
    pad: int = 0


def markup(model: MassModel) -> Markup | None:
    """That of a bundle's tokenizer; None where it has none."""
    try:
        tokenizer = model.tokenizer()
    except SourceError:
        return None
    ids, special = list(tokenizer("a")["input_ids"]), set(tokenizer.all_special_ids)
    words = [place for place, token in enumerate(ids) if token not in special] or [len(ids)]
    pad = tokenizer.pad_token_id
    return Markup(
        tuple(ids[: words[0]]), tuple(ids[words[-1] + 1 :]), tuple(sorted(special)), pad if pad is not None else 0
    )


def texts(model: MassModel, around: Markup, moved: Tensor | None) -> dict[str, list[dict[str, Tensor]]]:
    """Batches of tokens of every kind. moved (tasks, vocabulary): how far each task's training has moved each token."""
    draw = torch.Generator().manual_seed(_SEED)
    base: Any = model.base
    size = base.get_input_embeddings().num_embeddings
    words = torch.tensor([token for token in range(size) if token not in set(around.every)])
    longest = _longest(model, around)
    lengths = torch.randint(min(_LENGTHS[0], longest - 1), longest, (_COUNT,), generator=draw).tolist()

    def some(count: int) -> Tensor:
        return words[torch.randint(len(words), (count,), generator=draw)]

    rows = {"random": [some(length) for length in lengths], "repeated": []}
    for place, length in enumerate(lengths):
        unit = some(1 + place % 3)  # what people see as one character may be several tokens
        rows["repeated"].append(unit.repeat(length)[:length])
    if moved is not None:
        weights = moved.clone()
        weights[:, list(around.every)] = 0
        usual = [torch.multinomial(own, n, True, generator=draw) for n in lengths[: _COUNT // 2] for own in weights]
        rows["usual"] = usual
        pairs = torch.randint(len(usual), (_COUNT, 2), generator=draw).tolist()
        halves = [(usual[one], usual[other]) for one, other in pairs if (one - other) % len(weights)]
        rows["glued"] = [_glue(one, other, longest) for one, other in halves]
    return {kind: list(_batches(several, around)) for kind, several in rows.items() if several}


def glued(
    model: MassModel, rows: Sequence[Tensor], tasks: Sequence[int], around: Markup
) -> tuple[list[dict[str, Tensor]], list[tuple[int, int]]]:
    """Batches of beginnings of two tasks' rows, for most rows one, and which two rows each is made of."""
    draw, longest = torch.Generator().manual_seed(_SEED), _longest(model, around)
    others = torch.randint(len(rows), (len(rows),), generator=draw).tolist()
    pairs = [pair for pair in enumerate(others) if tasks[pair[0]] != tasks[pair[1]] and len(rows[pair[0]])]
    return list(_batches([_glue(rows[one], rows[other], longest) for one, other in pairs], around)), pairs


def _longest(model: MassModel, around: Markup) -> int:
    """Tokens of an input, without what is put around it: below."""
    base: Any = model.base
    room = getattr(base.config, "max_position_embeddings", None) or _LENGTHS[1]
    return max(2, min(_LENGTHS[1], room - len(around.before) - len(around.after)))


def _glue(one: Tensor, other: Tensor, longest: int) -> Tensor:
    most = max(1, longest // 2)
    return torch.cat([one[:most], other[:most]])


def _batches(rows: Sequence[Tensor], around: Markup) -> list[dict[str, Tensor]]:
    wrapped = [torch.tensor([*around.before, *row.tolist(), *around.after]) for row in rows]
    return [_batch(wrapped[start : start + _BATCH], around.pad) for start in range(0, len(wrapped), _BATCH)]


def _batch(rows: Sequence[Tensor], pad: int) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}


def images(model: MassModel) -> dict[str, list[dict[str, Tensor]]]:
    """Batches of noise, and of single colours."""
    draw = torch.Generator().manual_seed(_SEED)
    config: Any = model.base.config
    side = config.image_size
    height, width = (side, side) if isinstance(side, int) else side
    channels = getattr(config, "num_channels", 3)
    noise = torch.randn(_COUNT, channels, height, width, generator=draw)
    colours = torch.randn(_COUNT, channels, 1, 1, generator=draw).expand(-1, -1, height, width)
    return {
        kind: [{"pixel_values": part} for part in torch.split(pixels, _BATCH)]
        for kind, pixels in (("random", noise), ("repeated", colours))
    }


def made_up(model: MassModel, around: Markup | None, moved: Tensor | None) -> Mapping[str, list[dict[str, Tensor]]]:
    """Batches of made-up inputs by their kind. Raises PlanError for models of other inputs than tokens and pixels."""
    base: Any = model.base
    kind = getattr(base, "main_input_name", "input_ids")
    if kind == "input_ids":
        return texts(model, around or Markup(), moved)
    if kind == "pixel_values" and hasattr(base.config, "image_size"):
        return images(model)
    what = f"the base reads {kind}, of which no inputs can be made up to measure what is strange to it"
    raise PlanError(what, "merge.router.unknown", "leave `unknown` out")

"""Which sets of weights a folder holds, told from the names of its files alone: here, or in a listing of the Hub.

A set is one file, or the index of several. A folder may hold some: what is read is the one that the library it belongs
to opens. For transformers (`_get_resolved_checkpoint_files` in modeling_utils.py, 5.24) that is `model.safetensors`
before an index beside it, safetensors before pickles, and a variant (`model.fp16.safetensors`) only where it is asked
for, so here only where there is nothing else. Every family has a `stem`, by which its library finds what is written.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from mergetool.errors import SourceError

_VARIANT = r"(?!index\.|[\w-]*-of-)[\w-]+"
_SHARD = re.compile(r".+-\d+-of-\d+\.(safetensors|bin)")
_FAMILIES = (
    ("model", "model", "pytorch_model"),
    ("diffusion_pytorch_model", "diffusion_pytorch_model", "diffusion_pytorch_model"),
    ("open_clip_model", "open_clip_model", "open_clip_pytorch_model"),
    ("consolidated", "consolidated", "consolidated"),
)
"""Stem, and the names of files of safetensors and of pickles: transformers, diffusers, open_clip, Llama and Mistral."""
UNSPLIT = frozenset({"open_clip_model"})
"""Stems of libraries that open one file only."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_TRAINING = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_state.*|random_states.*|training_args\.bin|trainer_state.*|adapter_model\..*"
    r"|(mp|zero_pp|bf16_zero_pp)_rank_.*|model_optim_rng\.pt|model_rng\.pt|distrib_optim\.pt|profiler.*"
)
"""Pickles and safetensors that are no model: a training's state, an adapter."""


@dataclass(frozen=True)
class WeightSet:
    """One way to read a folder: `file` is its only file, or the index of its files."""

    file: str
    stem: str = "model"
    variant: str = ""

    @property
    def sharded(self) -> bool:
        return self.file.endswith(".json")

    @property
    def pickled(self) -> bool:
        return ".safetensors" not in self.file


def weight_sets(names: Collection[str]) -> list[WeightSet]:
    """All sets that files of these names make, the one that is to be read first: families, no variant, safetensors."""
    keyed = (pair for name in sorted(names) for pair in _members(name, names))
    return [weights for _, weights in sorted(keyed, key=lambda pair: pair[0])]


def _members(name: str, names: Collection[str]) -> Iterator[tuple[tuple[int, str, int], WeightSet]]:
    for place, (stem, safe, pickled) in enumerate(_FAMILIES):
        variants = stem != "consolidated"
        for order, pattern in enumerate(_patterns(safe, pickled)):
            match = re.fullmatch(pattern, name)
            if match is not None and (variants or not any(match.groups())):
                variant = next(filter(None, match.groups()), "")
                yield (place, variant, order), WeightSet(name, stem, variant)
        if stem == "consolidated" and name == "consolidated.00.pth" and "consolidated.01.pth" not in names:
            yield (place, "", 9), WeightSet(name, stem)


def _patterns(safe: str, pickled: str) -> tuple[str, ...]:
    """Of a single file and of an index, in safetensors and in pickles."""
    return tuple(
        pattern
        for name, ending in ((safe, "safetensors"), (pickled, "bin"))
        for pattern in (
            rf"{name}(?:\.({_VARIANT}))?\.{ending}",
            rf"{name}(?:\.({_VARIANT}))?\.{ending}\.index(?:\.({_VARIANT}))?\.json",
        )
    )


def is_index(name: str) -> bool:
    """Whether a file of this name is the index of a set."""
    return any(weights.sharded for weights in weight_sets([name]))


def chosen_set(names: Collection[str], where: str) -> tuple[WeightSet, str] | None:
    """The set that is to be read, and a remark if that may surprise; None where there is none.

    Raises SourceError where only people can tell which is meant.
    """
    sets = weight_sets(names)
    plain = [weights for weights in sets if not weights.variant]
    if plain:
        beside = [weights.file for weights in plain if weights.stem == plain[0].stem]
        return plain[0], _told_apart(beside) if len(beside) > 1 else ""
    if sets:
        return _only_variant(sets, where)
    return _only_other(names, where)


def _told_apart(files: list[str]) -> str:
    others = " and ".join(files[1:])
    return (
        f"{files[0]} is read, as its library does; {others} beside it may hold other weights (name a file to read it)"
    )


def _only_variant(sets: list[WeightSet], where: str) -> tuple[WeightSet, str]:
    variants = sorted({weights.variant for weights in sets})
    if len(variants) > 1:
        what = f"there are weights in {len(variants)} variants, and none without: {', '.join(e.file for e in sets)}"
        raise SourceError(what, where, f"name the one that is meant: {where}/{sets[0].file}")
    return sets[0], f"the only weights are those of variant {sets[0].variant!r}: {sets[0].file} is read"


def _only_other(names: Collection[str], where: str) -> tuple[WeightSet, str] | None:
    """The only file of weights, whatever it is called."""
    possible = sorted(name for name in names if not _TRAINING.fullmatch(name))
    safe = [name for name in possible if name.endswith(".safetensors")]
    weights = safe or [name for name in possible if name.endswith(PICKLES)]
    parts = [name for name in weights if _SHARD.fullmatch(name) and not re.search(r"-0*1-of-0*1\.", name)]
    if parts:
        what = f"{len(parts)} files of a set ({parts[0]} ...), but not the index that belongs to them"
        raise SourceError(f"the folder holds {what}", where, "get the .index.json file that was saved with them")
    shards = [name for name in weights if re.fullmatch(r"consolidated\.\d+\.pth", name)]
    if len(shards) > 1:
        what = (
            f"{len(shards)} files ({', '.join(shards[:4])} ...) that each hold a part of every matrix (model parallel)"
        )
        fix = "get the model in transformers' format, or convert it with transformers' convert_llama_weights_to_hf.py"
        raise SourceError(f"the folder holds {what}", where, fix)
    if len(weights) > 1:
        what = "no model in this folder that is called like one"
        what += f", but {len(weights)} files of weights: {', '.join(weights)}"
        raise SourceError(what, where, f"name the one that is meant: {where}/{weights[0]}")
    return (WeightSet(weights[0]), f"the only weights are in {weights[0]}: that is read") if weights else None

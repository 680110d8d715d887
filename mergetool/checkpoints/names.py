"""Names of one network in two checkpoints: which tensor of the one is which of the other.

People's files of one network differ in the names' first parts (`bert.encoder...` with a head, `encoder...` without;
`module.`, `base_model.`), in wrappers that training leaves (`_orig_mod.`), in spellings that have changed
(`LayerNorm.gamma`), and in how a multimodal model is put together (`language_model.model.layers`,
`model.language_model.layers`, and `model.layers` of its text part alone).

The changed spellings are a short table, as transformers has them. First parts need none: they are learnt. Names that
agree from some component on vote for "this first part here is that first part there", and the rule with the most votes
wins. A rule must add, take away or reorder components, so `encoder.` never becomes `decoder.`, nor `pooler.` a
`classifier.`; what two rules explain equally well is left alone.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape | None]
"""Shapes by name; None where it is not known, which fits all."""

_WRAPPERS = re.compile(r"(^|(?<=\.))(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
_SPELLINGS = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\.gamma$", ".weight"),
        (r"\.beta$", ".bias"),
        (r"\.weight_g$", ".parametrizations.weight.original0"),
        (r"\.weight_v$", ".parametrizations.weight.original1"),
        (r"\.block_sparse_moe\.", ".mlp."),
        # vision transformers as transformers 5 calls their parts, from how they have been stored until then
        (r"(^|\.)encoder\.layer\.(?=\d)", r"\1layers."),
        (r"\.attention\.attention\.query\.", ".attention.q_proj."),
        (r"\.attention\.attention\.key\.", ".attention.k_proj."),
        (r"\.attention\.attention\.value\.", ".attention.v_proj."),
        (r"\.attention\.output\.dense\.", ".attention.o_proj."),
        (r"(?<=\d)\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(?<=\d)\.output\.dense\.", ".mlp.fc2."),
    )
)
_NEUTRAL = frozenset({"model", "language_model", "base_model", "module", "transformer", ""})
"""Components that tell where in memory a part is hung, not what it is."""
_Rule = tuple[str, str, frozenset[str]]
"""First part here, first part there (each empty or with its last dot), and the components that follow it."""


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Every name as the network itself calls the tensor: without wrappers, and without a `module.` that all have."""
    bare = {name: _WRAPPERS.sub("", name) for name in names}
    if bare and all(name.startswith("module.") for name in bare.values()):
        bare = {name: short.removeprefix("module.") for name, short in bare.items()}
    return bare if len(set(bare.values())) == len(bare) else {name: name for name in bare}


def match(names: Shapes, others: Shapes) -> dict[str, str]:
    """For every one of `names` what `others` would call it: one of theirs where there is a counterpart.

    No two names get the same. A name without counterpart is moved by the rules that its neighbours follow
    (`bert.pooler.dense.weight` among names that lose their `bert.` becomes `pooler.dense.weight`), or stays as it is.
    """
    counterparts = {name: name for name in names if name in others}
    left = [name for name in names if name not in counterparts]
    if not left:
        return counterparts
    bare = unwrapped(names)
    ours = _spelt({name: bare[name] for name in left})
    lost = {key: name for name, key in _spelt({name: name for name in others if name not in counterparts}).items()}
    counterparts |= {name: lost[key] for name, key in ours.items() if key in lost}
    taken = set(counterparts.values())
    ours = {name: key for name, key in ours.items() if name not in counterparts}
    lost = {key: name for key, name in lost.items() if name not in taken}
    rules = _rules({key: names[name] for name, key in ours.items()}, {key: others[name] for key, name in lost.items()})
    moves = {name: _moved(key, bare[name], rules, lost) for name, key in ours.items()}
    times = Counter(moves.values())
    return counterparts | {
        name: moved if times[moved] == 1 and moved not in taken else bare[name] if bare[name] not in taken else name
        for name, moved in moves.items()
    }


def repeated(names: Iterable[str], others: Collection[str], words: Iterable[str] = ()) -> dict[str, str]:
    """Those of `names` that can only be second names of `others`: spelt otherwise, or hung elsewhere.

    `words` are further components that say nothing (the network's own name).
    """
    neutral = _NEUTRAL | frozenset(words)
    plain = {_plain(key, neutral): name for name, key in _spelt({name: name for name in others}).items()}
    second_names = {}
    for name in names:
        key = name
        for pattern, replacement in _SPELLINGS:
            key = pattern.sub(replacement, key)
        if other := plain.get(_plain(_WRAPPERS.sub("", key), neutral)):
            second_names[name] = other
    return second_names


def _plain(name: str, neutral: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in neutral)


def _spelt(names: Mapping[str, str]) -> dict[str, str]:
    """Names in the newest spelling of each of their parts, but as they are where two would become one."""
    spelt = {}
    for name, bare in names.items():
        key = bare
        for pattern, replacement in _SPELLINGS:
            key = pattern.sub(replacement, key)
        spelt[name] = key
    times = Counter(spelt.values())
    return {name: key if times[key] == 1 else names[name] for name, key in spelt.items()}


def _moved(key: str, bare: str, rules: list[_Rule], lost: Mapping[str, str]) -> str:
    """The lost name that a rule leads to; else the name with its first part replaced as its neighbours'."""
    for here, there, _ in rules:
        if key.startswith(here) and (moved := there + key.removeprefix(here)) in lost:
            return lost[moved]
    for here, there, beside in rules:
        rest = bare.removeprefix(here)
        if bare.startswith(here) and (here or rest.partition(".")[0] in beside):
            return there + rest
    return bare


def _rules(ours: Shapes, lost: Shapes) -> list[_Rule]:
    """Rules that bring names of ours to lost ones, those about longer first parts first: they say more."""
    ends = defaultdict(list)
    for name in lost if ours else ():
        for end in _ends(name):
            ends[end].append(name)
    voters: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, shape in ours.items():
        for here, there in _votes(name, shape, ends, lost):
            voters[here][there].append(name.removeprefix(here).partition(".")[0])
    rules = []
    for here, candidates in voters.items():
        first, *others = sorted(candidates, key=lambda there: -len(candidates[there]))
        if not others or len(candidates[first]) > len(candidates[others[0]]):
            rules.append((here, first, frozenset(candidates[first])))
    return sorted(rules, key=lambda rule: -len(rule[0]))


def _votes(name: str, shape: Shape | None, ends: Mapping[str, list[str]], lost: Shapes) -> list[tuple[str, str]]:
    """The rules that would bring a name to lost ones with which it shares the longest end."""
    for end in _ends(name):
        here = name.removesuffix(end)
        theres = [other.removesuffix(end) for other in ends.get(end, ()) if _alike(shape, lost[other])]
        rules = [(here, there) for there in theres if _is_plausible(here, there, end)]
        if rules:
            return rules
    return []


def _ends(name: str) -> list[str]:
    """All of a name from each component on, the longest first."""
    parts = name.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]


def _alike(shape: Shape | None, other: Shape | None) -> bool:
    return shape is None or other is None or shape == other


def _is_plausible(here: str, there: str, end: str) -> bool:
    """Whether one first part can stand for the other: the same components, or some of them, or none that tell.

    Numbers are never a part of it.
    """
    some, others = set(here.split(".")), set(there.split("."))
    if here and there and "." not in end:
        return False
    if some | others <= _NEUTRAL:
        return True
    return (some <= others or others <= some) and not any(part.isdigit() for part in some | others)

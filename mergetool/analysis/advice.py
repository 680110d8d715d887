"""What follows from the figures, each with its evidence, its formula, and what can be typed.

First what is wrong (models that do not belong here), then what is better known before, then numbers to begin with.
Models that do not belong are left out of what comes after them.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

import numpy as np

from mergetool.analysis.figures import Figures, Group
from mergetool.kernels.differences import ratio
from mergetool.kernels.task_vectors import Array, density_of_energy

Weight = Literal["problem", "warning", "hint"]

UNRELATED = 0.5
"""Cosine with the base, over the layers, below which a model is none of its fine-tunes. Real ones have 0.95 and more,
independently trained networks less than 0.1 once their norms are left out."""
_SWAPPED = 0.5
_RENAMED = 0.01
"""Share of tokens; fewer may be reserved ones that were given a name."""
_SAME = 2e-3
_DEAD = 1e-6
_WEAK = 0.05
_NOISE = 1.15
"""s_1 over the edge of noise; sketched values of noise come out at 0.85 to 1, small matrices at up to 1.1."""
_STRUCTURED = 2.0
_DOMINATES = 0.8
_ENERGY = 0.9
_LOST = 0.5


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do."""

    kind: str
    weight: Weight
    models: tuple[str, ...]
    title: str
    why: str
    evidence: Mapping[str, Any]
    formula: str
    fix: str

    def row(self) -> dict[str, Any]:
        return {**vars(self), "models": list(self.models), "evidence": dict(self.evidence)}


@dataclass
class Adviser:
    """Looks at figures."""

    figures: Figures
    out: set[str] = field(default_factory=set)
    """Models that do not belong here."""

    def advice(self) -> list[Advice]:
        """Problems first."""
        if self.figures.whole is None or self.figures.inside is None:
            return []
        found = [each for rule in _RULES for each in rule(self)]
        order = ("problem", "warning", "hint")
        return sorted(found, key=lambda each: order.index(each.weight))

    @property
    def whole(self) -> Group:
        assert self.figures.whole is not None
        return self.figures.whole

    @property
    def inside(self) -> Group:
        assert self.figures.inside is not None
        return self.figures.inside

    @property
    def models(self) -> tuple[str, ...]:
        return self.figures.models.models

    @property
    def based(self) -> bool:
        return self.figures.models.reference == "base"

    @property
    def has_changes(self) -> bool:
        """Whether task vectors are what models changed, not distances from their mean."""
        return self.figures.models.reference != "mean"

    @property
    def left(self) -> list[int]:
        """Models that belong here, by number."""
        return [i for i, model in enumerate(self.models) if model not in self.out]


def _not_finite(adviser: Adviser) -> Iterator[Advice]:
    broken = adviser.whole.tally.broken[-len(adviser.models) :]
    for model, count in zip(adviser.models, broken, strict=True):
        if count:
            yield Advice(
                "not_finite",
                "problem",
                (model,),
                f"{model} has {int(count)} entries that are not finite",
                "a merge spreads them; they are left out of all figures here",
                {"entries": int(count)},
                "count of NaN and infinite entries",
                f"repair or replace {model}, or remove it from models",
            )


def _unrelated(adviser: Adviser) -> Iterator[Advice]:
    """Models that are no fine-tunes of the base, or of what the others are."""
    if adviser.figures.models.reference == "zero":
        return
    inside, count = adviser.inside, len(adviser.models)
    if adviser.based:
        kin = {i: inside.kinship(-1, i) for i in range(count)}
    elif count > 2:
        kin = {i: median(inside.kinship(i, j) for j in range(count) if j != i) for i in range(count)}
    else:
        kin = {1: inside.kinship(0, 1)} if count == 2 else {}
    strange = [i for i, value in kin.items() if value < UNRELATED]
    if adviser.based and count > 1 and len(strange) == count and _relatives(inside):
        yield _wrong_base(adviser, kin)
        adviser.out |= set(adviser.models)
        return
    for i in strange:
        adviser.out.add(adviser.models[i])
        yield _stranger(adviser, i, kin[i])


def _relatives(group: Group) -> bool:
    pairs = [group.kinship(i, j) for i in range(group.count) for j in range(i)]
    return min(pairs) >= UNRELATED


def _stranger(adviser: Adviser, i: int, kinship: float) -> Advice:
    model, to = adviser.models[i], "the base" if adviser.based else "the others"
    evidence = {"kinship": kinship}
    if adviser.based:
        evidence["relative"] = adviser.inside.relative(i)
    return Advice(
        "unrelated",
        "problem",
        (model,),
        f"{model} is no relative of {to}",
        f"the cosine between its weights and those of {to} is {kinship:.2f}, where fine-tunes have 0.95 and more: "
        "a mean of the two is no network",
        evidence,
        f"cos(w_i, w_{'base' if adviser.based else 'j'}) < {UNRELATED}, over the tensors inside the layers",
        f"remove {model} from models; if it is the same network trained from another seed, merge: {{method: c2m3}} "
        "finds the permutation",
    )


def _wrong_base(adviser: Adviser, kin: Mapping[int, float]) -> Advice:
    return Advice(
        "base",
        "problem",
        (),
        "the base is not the ancestor of the models",
        "the models are relatives of each other, and none is one of the base",
        {"kinship_with_base": max(kin.values()), "kinship_of_models": adviser.inside.kinship(0, 1)},
        f"cos(w_i, w_base) < {UNRELATED} for all models, cos(w_i, w_j) >= {UNRELATED} for all pairs",
        "base: the model that they were trained from",
    )


def _tokenizer(adviser: Adviser) -> Iterator[Advice]:
    """Tokenizers that are not those that a model's rows were trained with."""
    for model, apart in adviser.figures.measured.rows.items():
        share = adviser.figures.models.renumbered[model].share
        if model in adviser.out or share < _RENAMED or apart > _SWAPPED:
            continue
        adviser.out.add(model)
        yield Advice(
            "tokenizer",
            "problem",
            (model,),
            f"the tokenizer of {model} is not the one that it was trained with",
            "it says that rows are of other tokens than in the first model, and these rows are nearly the same: the "
            "files of another tokenizer lie beside its weights",
            {"share_of_tokens": share, "relative": apart},
            f"||e_i - e|| / ||e|| <= {_SWAPPED} over the rows whose tokens differ, which are >= {_RENAMED:.0%} of all",
            f"put the first model's tokenizer files into the folder of {model}",
        )


def _rows(adviser: Adviser) -> Iterator[Advice]:
    """Embeddings that are another network's, in a body that is not."""
    tokens = adviser.figures.tokens
    if tokens is None or not adviser.based:
        return
    for i in list(adviser.left):
        model = adviser.models[i]
        if tokens.kinship(-1, i) < UNRELATED:
            adviser.out.add(model)
            yield Advice(
                "tokenizer",
                "problem",
                (model,),
                f"the embeddings of {model} are not in the order of the base's",
                "its layers are relatives of the base's, and its rows of tokens are not: they were moved or replaced, "
                "and no tokenizer beside it says how",
                {"kinship_tokens": tokens.kinship(-1, i), "kinship_layers": adviser.inside.kinship(-1, i)},
                f"cos(e_i, e_base) < {UNRELATED} over embeddings and heads, >= {UNRELATED} inside the layers",
                f"save {model} again with the tokenizer that it was trained with, or remove it from models",
            )


def _dead(adviser: Adviser) -> Iterator[Advice]:
    """Models that change nothing."""
    if not adviser.has_changes:
        return
    for i in adviser.left:
        norm, relative = adviser.whole.norm(i), adviser.whole.relative(i)
        if norm and not relative < _DEAD:
            continue
        model = adviser.models[i]
        adviser.out.add(model)
        yield Advice(
            "dead",
            "problem",
            (model,),
            f"{model} is the base" if not norm else f"{model} is the base but for rounding",
            "its task vector is zero: in a mean it only makes the others smaller",
            {"norm": norm, "relative": relative, "share_changed": adviser.whole.tally.changed[i] / _entries(adviser)},
            f"||t_i|| / ||w_base|| < {_DEAD:g}",
            f"remove {model} from models",
        )


def _entries(adviser: Adviser) -> int:
    return max(1, adviser.whole.tally.entries)


def _duplicates(adviser: Adviser) -> Iterator[Advice]:
    left = list(adviser.left)
    for place, i in enumerate(left):
        for j in left[place + 1 :]:
            apart = _apart(adviser.whole, i, j)
            if apart > _SAME or adviser.models[j] in adviser.out:
                continue
            a, b = adviser.models[i], adviser.models[j]
            adviser.out.add(b)
            yield Advice(
                "duplicate",
                "problem",
                (a, b),
                f"{b} is {a} once more",
                "it counts twice, and for every method that votes it outvotes the others",
                {"apart": apart, "cosine": adviser.whole.cosine(i, j)},
                f"||t_i - t_j|| / max(||t_i||, ||t_j||) <= {_SAME:g}",
                f"remove {b} from models, and give {a} twice the weight if that is meant",
            )


def _apart(group: Group, i: int, j: int) -> float:
    """The distance of two models, over the larger of the distances that they have from what they are measured from."""
    gram = group.gram if group.gram[i, i] + group.gram[j, j] else group.weights[1:, 1:]
    apart = max(0.0, gram[i, i] + gram[j, j] - 2 * gram[i, j])
    return ratio(apart, max(gram[i, i], gram[j, j]))


def _noise(adviser: Adviser) -> Iterator[Advice]:
    """Task vectors without any direction."""
    if not adviser.has_changes:
        return
    for i in list(adviser.left):
        edges = [each.spectra[i].edge for each in adviser.figures.measured.matrices.values()]
        known = [edge for edge in edges if not math.isnan(edge)]
        if not known or float(np.quantile(known, 0.9)) > _NOISE:
            continue
        model = adviser.models[i]
        adviser.out.add(model)
        yield Advice(
            "noise",
            "problem",
            (model,),
            f"the change of {model} looks like noise",
            "no direction of it stands out in any weight matrix, as in random numbers of the same size; what training "
            "changes has directions",
            {"edge_median": median(known), "edge_most": float(np.quantile(known, 0.9)), "matrices": len(known)},
            f"s_1 / (rms (sqrt m + sqrt n)) <= {_NOISE} in 9 of 10 matrices; 1: noise (Marchenko and Pastur)",
            f"check how {model} was made; remove it from models if it was not trained",
        )


def _dominates(adviser: Adviser) -> Iterator[Advice]:
    left = adviser.left
    norms2 = {i: adviser.whole.gram[i, i] for i in left}
    whole = sum(norms2.values())
    if not adviser.has_changes or len(left) < 2 or not whole:
        return
    for i in left:
        if norms2[i] / whole < _DOMINATES:
            continue
        others = [math.sqrt(norms2[j]) for j in left if j != i]
        model, even = adviser.models[i], median(others) / math.sqrt(norms2[i])
        shares = {name: round(even, 2) if name == model else 1.0 for name in adviser.models if name not in adviser.out}
        yield Advice(
            "dominates",
            "warning",
            (model,),
            f"{model} dominates",
            f"its task vector is {1 / even:.3g} times as long as the median of the others: the merge is little else",
            {"share_of_norms": norms2[i] / whole, "norm": math.sqrt(norms2[i]), "others": others},
            f"||t_i||^2 / sum_j ||t_j||^2 >= {_DOMINATES}; even weight: median_j ||t_j|| / ||t_i||",
            f"merge: {{method: task-arithmetic, weight: {_mapping(shares)}}}",
        )


def _mapping(values: Mapping[str, float]) -> str:
    return "{" + ", ".join(f"{name}: {value:g}" for name, value in values.items()) + "}"


def _scale(adviser: Adviser) -> Iterator[Advice]:
    """A window for the factor on the sum of task vectors."""
    gram, left = _gram(adviser), adviser.left
    if not adviser.has_changes or len(left) < 2 or (whole := float(gram.sum())) <= 0:
        return
    own, with_sum = np.diag(gram), gram.sum(1)
    kept = [float(a / b) for a, b in zip(own, with_sum, strict=True) if b > 0]
    if not kept:
        return
    low, high = float(np.sqrt(own).mean() / math.sqrt(whole)), median(kept)
    low, high = sorted((min(low, 1.5), min(high, 1.5)))
    yield Advice(
        "scale",
        "hint",
        (),
        f"scale between {low:.2g} and {high:.2g}",
        "at the one end the merged change is as long as the models' are on average; at the other the median model "
        "finds its own change in full in it",
        {"from": low, "to": high, "start": round((low + high) / 2, 2)},
        "mean_i ||t_i|| / ||sum_j t_j||; median_i ||t_i||^2 / <t_i, sum_j t_j>",
        f"merge: {{method: task-arithmetic, scale: {(low + high) / 2:.2g}}}",
    )


def _gram(adviser: Adviser) -> Array:
    gram: Array = adviser.whole.gram[np.ix_(adviser.left, adviser.left)]
    return gram


def _density(adviser: Adviser) -> Iterator[Advice]:
    """How few entries hold most of a change."""
    if not adviser.has_changes or not adviser.left:
        return
    tally = adviser.whole.tally
    needed = {
        adviser.models[i]: density_of_energy(tally.drawn.magnitudes[i], tally.entries, _ENERGY) for i in adviser.left
    }
    known = {model: value for model, value in needed.items() if not math.isnan(value)}
    if not known:
        return
    density = min(1.0, math.ceil(max(known.values()) * 20) / 20)
    yield Advice(
        "density",
        "hint",
        (),
        f"density {density:g}",
        f"so many of the entries hold {_ENERGY:.0%} of every task vector's squared norm; fewer cut into them",
        {"by_model": known},
        f"smallest d whose largest d entries hold {_ENERGY} of ||t_i||^2, the most of all models, rounded up to 0.05",
        f"merge: {{method: ties, density: {density:g}}}",
    )


def _dtype(adviser: Adviser) -> Iterator[Advice]:
    """Changes that bfloat16 cannot hold."""
    drawn = adviser.whole.tally.drawn
    if not adviser.based or not drawn.touched:
        return
    survives, error = drawn.survived / drawn.touched, ratio(drawn.lost2, drawn.mean2)
    if error <= _LOST:
        return
    yield Advice(
        "dtype",
        "warning",
        (),
        "the mean of the models hardly survives bfloat16",
        f"{survives:.0%} of the entries that it changes are still changed once stored in bfloat16, and rounding adds "
        f"an error of {error:.2f} times the change",
        {"survives_bfloat16": survives, "error_bfloat16": error},
        f"||bf16(w) - w|| / ||w - w_base|| > {_LOST}, w the mean of the models",
        "output: {dtype: float32}",
    )


def _methods(adviser: Adviser) -> Iterator[Advice]:
    """What to try first."""
    from mergetool.analysis.methods import methods_to_try

    yield from methods_to_try(adviser)


_RULES = (
    _not_finite,
    _unrelated,
    _tokenizer,
    _rows,
    _dead,
    _duplicates,
    _noise,
    _dominates,
    _dtype,
    _scale,
    _density,
    _methods,
)

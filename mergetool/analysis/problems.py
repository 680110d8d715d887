"""Models that do not belong in a merge: strangers, copies, noise, rows in another order."""

import math
from collections.abc import Iterator, Mapping
from statistics import median

import numpy as np

from mergetool.analysis.advice import Advice, Adviser
from mergetool.analysis.figures import Grouped
from mergetool.kernels.differences import ratio

UNRELATED = 0.5
"""Cosine with the base, over the matrices inside the layers, below which a model is none of its fine-tunes. Those have
0.95 and more, networks that were trained independently almost 0."""
_SWAPPED = 0.5
_RENAMED = 0.01
"""Share of tokens; fewer may be reserved ones that were given a name."""
_SAME = 2e-3
_DEAD = 1e-6
_NOISE = 1.15
"""s_1 over the edge of noise; sketched values of noise come out at 0.85 to 1, small matrices at up to 1.1."""
_WIDE, _SEVERAL = 16, 3
"""Smaller dimension of matrices in which directions can stand out, and how many of them it takes to tell."""


def problems(adviser: Adviser) -> Iterator[Advice]:
    """One kind after the other; who does not belong is passed over by those that follow."""
    if adviser.figures.whole is None or adviser.figures.inside is None:
        return
    yield from _not_finite(adviser)
    if adviser.whole.tally.broken.max() == adviser.whole.tally.entries:
        return
    for rule in (_unrelated, _tokenizer, _rows, _dead, _duplicates, _noise):
        yield from rule(adviser)


def _not_finite(adviser: Adviser) -> Iterator[Advice]:
    of_base, *broken = map(int, adviser.whole.tally.broken)
    if of_base and adviser.based:
        yield _broken((), "the base", of_base, "repair or replace the base")
    for model, count in zip(adviser.models, broken, strict=True):
        if count:
            yield _broken((model,), model, count, f"repair or replace {model}, or remove it from models")


def _broken(models: tuple[str, ...], name: str, count: int, fix: str) -> Advice:
    return Advice(
        "not_finite",
        "problem",
        models,
        f"{name} has {count} entries that are not finite",
        "a merge spreads them; they are left out of all figures here",
        {"entries": count},
        "count of NaN and infinite entries",
        fix,
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


def _relatives(group: Grouped) -> bool:
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
        f"cos(w_i, w_{'base' if adviser.based else 'j'}) < {UNRELATED}, over the matrices inside the layers",
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


def _apart(group: Grouped, i: int, j: int) -> float:
    """The distance of two models, over the larger of the distances that they have from what they are measured from."""
    gram = group.gram if group.gram[i, i] + group.gram[j, j] else group.weights[1:, 1:]
    apart = max(0.0, gram[i, i] + gram[j, j] - 2 * gram[i, j])
    return ratio(apart, max(gram[i, i], gram[j, j]))


def _noise(adviser: Adviser) -> Iterator[Advice]:
    """Task vectors without any direction."""
    if not adviser.has_changes:
        return
    for i in list(adviser.left):
        spectra = [each.spectra[i] for each in adviser.figures.measured.matrices.values()]
        known = [each.edge for each in spectra if min(each.shape) >= _WIDE and not math.isnan(each.edge)]
        if len(known) < _SEVERAL or float(np.quantile(known, 0.9)) > _NOISE:
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
            f"s_1 / (rms (sqrt m + sqrt n)) <= {_NOISE} in 9 of 10 matrices of {_WIDE} rows and columns or more; "
            "1: noise (Marchenko and Pastur)",
            f"check how {model} was made; remove it from models if it was not trained",
        )

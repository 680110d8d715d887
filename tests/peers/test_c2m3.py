"""The search for permutations ends no lower than the Frank-Wolfe of its authors does, from any of their starts."""

from pathlib import Path

from safetensors.torch import load_file

from mergetool.arch.match import resolve
from mergetool.kernels.frank_wolfe import AlignmentSettings, align
from mergetool.kernels.matching import MatchingProblem

MODELS = 5


def test_five_trained_networks_agree_no_less_than_with_the_authors_code():
    kept = load_file(Path(__file__).parent / "c2m3.safetensors")
    theirs = kept.pop("theirs")
    states = [
        {name[2:]: x.float() for name, x in kept.items() if name.startswith(f"{place}/")} for place in range(MODELS)
    ]
    spec = resolve("mlp", {name: tuple(x.shape) for name, x in states[0].items()})
    problem = MatchingProblem.of(spec.spaces, spec.layouts(), models=states)
    assert align(problem, AlignmentSettings(releases=4)).objective > float(theirs.max())

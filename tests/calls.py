"""How often methods by singular vectors call a device, wait for it, and what they hold: counted on the stand-in.

    python -m tests.calls                            some methods, square, wide and tall matrices
    python -m tests.calls tsv-merge --size 384 --models 20

Real directions in noise. Matrices of 96 rows are searched as those of 512 are on a GPU. Views count as no operation.
`bytes` are those for each entry of the matrix, at most, beside 4 bytes of every model.
"""

import argparse
from math import prod

import torch

from mergetool.kernels import spectral
from mergetool.methods import registry
from mergetool.methods.base import TensorGroup
from tests.elsewhere import DEVICE, Elsewhere
from tests.streams import streaming

METHODS = ("tsv-merge", "dc-merge", "lors", "iso-c", "iso-cts", "knots", "opcm", "star", "wudi", "swudi")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("methods", nargs="*", default=METHODS)
    arguments.add_argument("--size", type=int, default=192)
    arguments.add_argument("--models", type=int, default=8)
    chosen = arguments.parse_args()
    spectral._SMALLEST = 96
    size = chosen.size
    print(f"{'method':12} {'shape':>12} {'operations':>11} {'waits':>6} {'bytes':>6}")
    for method in chosen.methods:
        for shape in ((size, size), (size, 7 * size // 2), (7 * size // 2, size)):
            counts = counted(method, shape, chosen.models)
            words = f"{shape[0]} x {shape[1]}"
            held = counts["most"] / prod(shape)
            print(f"{method:12} {words:>12} {counts['operations']:11} {counts['waits']:6} {held:6.0f}")


def counted(kind: str, shape: tuple[int, int], num_models: int):
    """What the stand-in counts of one merge."""
    names = tuple(f"m{number}" for number in range(num_models))
    method = registry()[kind]()
    with Elsewhere(), streaming() as streams:
        models = [each.to(DEVICE) for each in changes(shape, num_models)]
        group = TensorGroup("mlp.weight", shape, names, torch.zeros(shape).to(DEVICE), models)
        before = streams.counts.copy()
        method.merge(group, method.params(0.0, names), {})
        return streams.counts - before


def changes(shape: tuple[int, int], count: int):
    generator, longer = torch.Generator().manual_seed(sum(shape)), max(shape)
    for _ in range(count):
        left, right, noise = (
            torch.randn(*each, generator=generator)
            for each in ((shape[0], min(shape) // 16), (min(shape) // 16, shape[1]), shape)
        )
        yield 1e-3 * (30 * left @ right / longer + noise / longer**0.5)


if __name__ == "__main__":
    main()

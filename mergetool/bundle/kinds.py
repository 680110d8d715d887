"""Every kind of bundle, and what makes it."""

from pathlib import Path

from mergetool.bundle.around import build_around
from mergetool.bundle.build import build as build_factors
from mergetool.bundle.manifest import AROUND, MASKED, Manifest
from mergetool.bundle.masked import build_masked
from mergetool.bundle.options import Experts, Options
from mergetool.bundle.store import FactorStore


def build(
    experts: Experts, folder: Path, store: FactorStore, options: Options, num_threads: int = 1
) -> Manifest | None:
    """Write a bundle of the kind that `options` name into `folder`, as `mergetool.bundle.build.build`."""
    if options.kind in MASKED:
        return build_masked(experts, folder, store, options, num_threads)
    if options.kind in AROUND:
        return build_around(experts, folder, store, options, num_threads)
    return build_factors(experts, folder, store, options, num_threads)

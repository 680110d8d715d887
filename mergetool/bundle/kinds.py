"""Every kind of bundle, and what makes it."""

from pathlib import Path

from mergetool.bundle import build as factors
from mergetool.bundle.manifest import MASKED, Manifest
from mergetool.bundle.masked import build_masked
from mergetool.bundle.options import Experts, Options
from mergetool.bundle.store import FactorStore


def build(
    experts: Experts, folder: Path, store: FactorStore, options: Options, num_threads: int = 1
) -> Manifest | None:
    """Write a bundle of the kind that `options` name into `folder`, as `mergetool.bundle.build.build`."""
    make = build_masked if options.kind in MASKED else factors.build
    return make(experts, folder, store, options, num_threads)

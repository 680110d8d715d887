#!/usr/bin/env python3
"""Time methods against the one that they should not be much slower than: processor seconds, in turns.

    python scripts/bench_methods.py FOLDER                    element-wise methods against `ties`
    python scripts/bench_methods.py FOLDER --spectral         methods on whole matrices against `tsv-merge`
    python scripts/bench_methods.py FOLDER --only pcb sce     these
    python scripts/bench_methods.py FOLDER --sweep            eight scales against one run, and against writing and
                                                              hashing eight files and nothing else

Every method merges, with its defaults, four fine-tunes (or as many as it takes) of a bfloat16 Llama of 34M parameters,
or six of eight matrices whose changes have power-law spectra. Counted is a whole run but starting Python: reading,
arithmetic, writing, SHA-256 of what is written; in one thread, so that it can be told on a busy machine.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import time
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import mergetool  # noqa: E402  (found through the line above)
from mergetool.errors import MergetoolError  # noqa: E402
from mergetool.methods import registry  # noqa: E402

SHAPES = [(256, 1024), (1024, 256), (256, 256), (256, 256)] * 2
EXPERTS = ("a", "b", "c", "d", "e", "f")
DENSE, SPECTRAL = "ties", "tsv-merge"
NEEDED = {"passthrough": {"scale": 0.9}}
SCALES = [eighths / 8 for eighths in range(1, 9)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spectral", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(registry()))
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = str(options.folder.absolute() / "remembered")
    torch.set_num_threads(1)
    models = matrices(options.folder) if options.spectral else networks(options.folder)
    reference = SPECTRAL if options.spectral else DENSE
    grains = ("tensor",) if options.spectral else ("element", "row")
    merge(models, reference)  # inputs are hashed, libraries loaded
    if options.sweep:
        sweeps(models, options.only or ["task-arithmetic", DENSE], options.rounds)
        return
    print(f"| method | models | s | times `{reference}` |\n|---|---|---|---|")
    for name in options.only or [name for name, kind in registry().items() if fits(kind, grains)]:
        try:
            turns = [(merge(models, reference), merge(models, name)) for _ in range(options.rounds)]
        except MergetoolError as error:
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
            continue
        seconds, ratio = (statistics.median(each) for each in zip(*((own, own / of) for of, own in turns), strict=True))
        print(f"| `{name}` | {len(taken(models, name))} | {seconds:.2f} | {ratio:.2f} |", flush=True)


def fits(kind: type, grains: tuple[str, ...]) -> bool:
    """Whether a method merges any weights by themselves, and sees so much of a tensor at once."""
    plain = kind.merges and kind.result == "checkpoint" and not (kind.statistic or kind.needs_adapters)
    return plain and kind.granularity in grains


def taken(models: Path, name: str) -> list[str]:
    every = [each for each in EXPERTS if (models / each).exists()]
    return every[: registry()[name].max_models or len(every)]


def sweeps(models: Path, names: list[str], rounds: int) -> None:
    """Runs that hash their inputs, as each first one does."""
    print("| method | one run, s | eight scales | eight files alone | times one run | one run and seven files |")
    print("|---|---|---|---|---|---|")
    for name in names:
        turns = [(first(models, name), first(models, name, sweep=SCALES), alone(models)) for _ in range(rounds)]
        one, eight, files = (statistics.median(each) for each in zip(*turns, strict=True))
        least = (one + files * 7 / 8) / one
        print(f"| `{name}` | {one:.2f} | {eight:.2f} | {files:.2f} | {eight / one:.2f} | {least:.2f} |", flush=True)


def first(models: Path, name: str, sweep: list[float] | None = None) -> float:
    """Processor seconds of a run that nothing is remembered for."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)
    return merge(models, name, **({"sweep": {"scale": sweep}} if sweep else {}))


def alone(models: Path) -> float:
    """Processor seconds of writing eight files as large as a result, and of the SHA-256 of what they hold."""
    parts, out = [path.read_bytes() for path in (models / "a").glob("*.safetensors")], models.parent / "alone"
    out.mkdir()
    started = time.process_time()
    for place in range(len(SCALES)):
        for index, part in enumerate(parts):
            (out / f"{place}-{index}").write_bytes(part)
            hashlib.sha256(part).digest()
    seconds = time.process_time() - started
    shutil.rmtree(out)
    return seconds


def merge(models: Path, name: str, **sections: object) -> float:
    """Processor seconds of one run."""
    kind, out = registry()[name], models.parent / "out"
    recipe = {
        "models": {each: str(models / each) for each in taken(models, name)},
        "merge": {"method": name, **NEEDED.get(name, {})},
        **({} if kind.needs_base == "unused" else {"base": str(models / "base")}),
        **sections,
    }
    shutil.rmtree(out, ignore_errors=True)
    started = time.process_time()
    mergetool.run(recipe, output=out, workers=1)
    seconds = time.process_time() - started
    shutil.rmtree(out)
    return seconds


def networks(folder: Path) -> Path:
    models = folder / "models-middle"
    if not models.exists():
        bench = SourceFileLoader("bench", str(ROOT / "scripts" / "bench")).load_module()
        folder.mkdir(parents=True, exist_ok=True)
        bench.make_models(models, SimpleNamespace(python=sys.executable, size="middle"))
    return models


def matrices(folder: Path) -> Path:
    """A base and six fine-tunes, in float32."""
    models = folder / "matrices"
    generator = torch.Generator().manual_seed(0)
    for model in ("base", *EXPERTS) if not models.exists() else ():
        state = {f"layers.{index}.weight": change(shape, generator) for index, shape in enumerate(SHAPES)}
        (models / model).mkdir(parents=True)
        save_file(state, models / model / "model.safetensors", {"format": "pt"})
    return models


def change(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Random directions, the j-th of length 1 / j."""
    few = min(shape)
    u, v = (torch.linalg.qr(torch.randn(length, few, generator=generator))[0] for length in shape)
    return ((u / torch.arange(1, few + 1)) @ v.T).contiguous()


if __name__ == "__main__":
    main()

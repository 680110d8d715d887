"""Tiny merges whose results are committed, so that a change meant to be invisible can prove that it is.

    python tests/golden/make.py             merge again, rewrite golden.json; commit that if the change is meant
    python tests/golden/make.py METHOD      only what is kept of this method

Methods that work element by element must give the same file to the bit: its SHA-256 is kept. Linear algebra on whole
tensors or models differs in the last bits between builds of BLAS: for such methods the numbers are kept, and compared
closely.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # so that this file runs as a script, too

import mergetool  # noqa: E402
from mergetool.methods.base import TensorMethod  # noqa: E402
from mergetool.methods.families.bundle import BundleMethod  # noqa: E402
from mergetool.tensors.io import sha256_file  # noqa: E402
from mergetool.testing.cases import MethodCase, all_cases, bundle_cases  # noqa: E402
from mergetool.testing.toys import SHAPES, read, toy_models, write, write_statistics  # noqa: E402

GOLDEN = Path(__file__).parent / "golden.json"
STORED = {"lm_head.weight": torch.bfloat16, "model.embed_tokens.weight": torch.float16}
"""Tensors that are not stored in float32."""
SMALL = {name: SHAPES[name] for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.bias")}
"""The tensors whose numbers are kept."""


def is_exact(case: MethodCase) -> bool:
    """Whether the result must be the same to the bit everywhere."""
    return issubclass(case.kind, TensorMethod) and case.kind.granularity != "tensor"


def outcome(case: MethodCase, folder: Path):
    """What is kept of a merge: the digest of its file, or its numbers."""
    base, models = case.toys(exact=False)
    if not case.architecture:
        base, models = toy_models(case.names, exact=False, shapes=SHAPES if is_exact(case) else SMALL)
    states = {name: _stored(state) for name, state in {"base": base, **models}.items()}
    paths = {name: str(path) for name, path in write(folder / "in", states).items()}
    recipe = {
        **({"base": paths["base"]} if case.has_base else {}),
        "models": {name: paths[name] for name in case.names},
        **case.architecture,
        **write_statistics(folder / "statistics", case.statistics({name: states[name] for name in case.names})),
        "merge": case.uneven().section(),
        "compute": {"seed": 20},
    }
    result = mergetool.run(recipe, output=folder / "out")
    if is_exact(case):
        return sha256_file(result.path / "model.safetensors")
    if issubclass(case.kind, BundleMethod):  # its last expert
        one = {
            "models": {"x": {"source": str(result.path), "select": case.names[-1]}},
            "merge": {"method": "passthrough"},
        }
        result = mergetool.run(one, output=folder / "one")
    return {name: [float(f"{x:.7g}") for x in value.reshape(-1).tolist()] for name, value in read(result.path).items()}


def _stored(state):
    return {name: value.to(STORED.get(name, torch.float32)) for name, value in state.items()}


def every_case() -> list[MethodCase]:
    """All that a golden merge is kept of."""
    return [*all_cases(), *bundle_cases()]


def name_of(case: MethodCase) -> str:
    return f"{case.method} {case.option}".strip()


def main() -> None:
    """Merge everything again, or what methods are named, say what changed, and write the file."""
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    asked = set(sys.argv[1:])
    after = {name: kept for name, kept in before.items() if asked and name.partition(" ")[0] not in asked}
    for case in (case for case in every_case() if not asked or case.method in asked):
        with TemporaryDirectory() as folder:
            after[name_of(case)] = outcome(case, Path(folder))
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            print(f"{'new' if name not in before else 'gone' if name not in after else 'changed'}: {name}")
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(after.items()))
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()

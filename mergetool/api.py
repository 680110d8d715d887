"""The Python face: the same recipes and the same engine, for scripts and research code."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergetool.engine import Flags, Progress, Result
from mergetool.planning import Plan, make_plan
from mergetool.recipe import Recipe
from mergetool.recipe import load_recipe as load_recipe
from mergetool.recipe.schema import parse_size
from mergetool.tuning.run import run_recipe

if TYPE_CHECKING:
    from torch import Tensor

    from mergetool.analysis.compared import ComparedRuns
    from mergetool.analysis.result import Analysis
    from mergetool.outputs.difference import Comparison

RecipeLike = str | Path | Mapping[str, Any] | Recipe


def run(
    recipe: RecipeLike,
    *,
    settings: Sequence[str] = (),
    progress: Progress | None = None,
    output: str | Path | None = None,
    device: str = "auto",
    workers: int | None = None,
    memory: int | str | None = None,
    overwrite: bool = False,
    resume: bool = True,
    cache: str | Path | None = None,
    fork: bool = False,
    trust_code: bool = False,
    push: bool | None = None,
    locked: bool = False,
    device_map: str | Mapping[str, str | int] | None = None,
) -> Result:
    """Run a recipe (a path, a mapping, or a loaded recipe) and return where the result is and what it cost.

    `settings` are `key.path=value` overrides; everything else is a flag of the command (`mergetool run --help`).
    `memory` is in bytes or like 8GiB. `device_map` deals the networks that are run over devices, memory and the disk: a
    strategy of accelerate's ("auto"), or devices by module. `fork` lets workers live in processes of their own where
    that is faster, for programs without threads. Raises a MergetoolError.
    """
    flags = Flags(
        output=None if output is None else Path(output),
        device=device,
        workers=workers,
        memory=None if memory is None else parse_size(memory),
        overwrite=overwrite,
        resume=resume,
        cache=None if cache is None else Path(cache),
        fork=fork,
        trust_code=trust_code,
        push=push,
        locked=locked,
        device_map=device_map,
    )
    return run_recipe(_loaded(recipe, settings), flags, progress)


def plan(recipe: RecipeLike, *, settings: Sequence[str] = ()) -> Plan:
    """Plan a recipe from headers alone. Raises RecipeError, SourceError or PlanError."""
    return make_plan(_loaded(recipe, settings))


def diff(
    a: str | Path,
    b: str | Path,
    base: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "Comparison":
    """Compare two models (folders, files, names on the Hub), two adapters, or two locks, tensor by tensor.

    With a `base`, their task vectors are compared, too. The result has `rows`, a table of all tensors with the most
    changed first, `layers`, `roles`, `files`, `identical`, and `to_json()`. Raises SourceError or HubError.
    """
    from mergetool.engine.devices import one_thread
    from mergetool.outputs.differing import difference

    with one_thread():
        return difference(str(a), str(b), None if base is None else str(base), workers=workers, listener=progress)


def analyze(
    recipe: RecipeLike,
    *,
    settings: Sequence[str] = (),
    workers: int | None = None,
    progress: Progress | None = None,
    output: str | Path | None = None,
    data: Mapping[str, str | Path] | None = None,
    checkpoints: Mapping[str, str | Path] | None = None,
    cache: str | Path | None = None,
) -> "Analysis":
    """What the models of a recipe are to each other, before they are merged: one pass over their weights.

    `data`, files of rows by model, and `checkpoints`, folders of their runs, add what task vectors are beside gradients
    at the base, and losses along the merge; what is measured on data is kept in the `cache`.

    The result has `advice`, `summary`, tables (`rows("models")`, `rows("pairs")`, `rows("layers")` ... ready for
    `pandas.DataFrame`; `sections` names them) and `to_json()`; into the folder `output`, it is written, with a page.
    Raises RecipeError, SourceError, PlanError, HubError or OutputError.
    """
    from mergetool.analysis.follow import Following
    from mergetool.analysis.run import analyze_recipe

    following = Following(_paths(data), _paths(checkpoints), None if cache is None else Path(cache))
    _ready(output)
    analysis = analyze_recipe(_loaded(recipe, settings), progress, workers, following)
    if output is not None:
        analysis.write(Path(output))
    return analysis


def measure(
    model: str | Path,
    statistic: str,
    data: str | Path,
    *,
    field: str = "text",
    samples: int | None = 256,
    length: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    device: str = "cpu",
    cache: str | Path | None = None,
    memory: int | str | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    **settings: Any,
) -> "dict[str, Tensor]":
    """Measure a statistic of one model (`gram`, `fisher`, ...) on a file of JSON lines, by the names of its weights.

    The options are those of the section `calibration`; `settings` are the statistic's own, such as `labels` of
    `fisher`. It is kept in the cache and found there again. A network that takes more than `memory` (in bytes or like
    8GiB) runs layer by layer, or as `device_map` says (of `run`). Raises a MergetoolError.
    """
    from mergetool.engine.measure import measure_one
    from mergetool.recipe.data import Data
    from mergetool.recipe.schema import Compute

    asked = Data(data=str(Path(data).absolute()), field=field, samples=samples, length=length)
    compute = Compute.model_validate({"dtype": dtype, "seed": seed})
    place, most = None if cache is None else Path(cache), None if memory is None else parse_size(memory)
    return measure_one(str(model), statistic, asked, settings, compute, device, place, most, device_map)


def compare(
    *runs: str | Path,
    base: str | Path | None = None,
    output: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> "ComparedRuns":
    """Lay finished results (folders that runs have left) side by side.

    Everything found is rows: `settings`, `scores`, `retention`, `pairs`, `distances`, `costs`; `rows` has one for each
    result, and there is `to_json()`. With a `base`, what they changed of it is compared, too; into the folder `output`,
    a page and its data are written. Raises RecipeError, SourceError, HubError or OutputError.
    """
    from mergetool.analysis.compare import compare_runs
    from mergetool.engine.devices import one_thread

    _ready(output)
    with one_thread():
        paths = [Path(run) for run in runs]
        found = compare_runs(paths, None if base is None else str(base), workers=workers, listener=progress)
    if output is not None:
        from mergetool.analysis.compare_page import write_compared

        write_compared(found, Path(output))
    return found


def _ready(output: str | Path | None) -> None:
    """Find out that a folder cannot be made before what will be written there is computed."""
    from mergetool.tensors.writer import make_folder

    if output is not None:
        make_folder(Path(output))


def change_bundle(
    path: str | Path,
    add: Mapping[str, Any] | None = None,
    remove: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Add experts to a bundle and remove some, in its own place or into `output`; returns where it is.

    `add`: models by name, as in a recipe (`"models/reviews"`, `{"adapter": "loras/poet"}`). What the bundle keeps of
    the others is cut to make room, never computed anew. Raises a MergetoolError; the bundle is then as it was.
    """
    from mergetool.engine.growing import change_bundle as changed

    flags = Flags(None if output is None else Path(output), workers=workers)
    changed(Path(path), add or {}, remove, flags, progress)
    return Path(path if output is None else output)


def merge_state_dicts(
    method: str | Mapping[str, Any],
    models: "Mapping[str, Mapping[str, Tensor]] | Sequence[Mapping[str, Tensor]]",
    base: "Mapping[str, Tensor] | None" = None,
    *,
    seed: int = 0,
    dtype: str = "float32",
    architecture: str | None = None,
    statistics: "Mapping[str, Mapping[str, Tensor]] | None" = None,
    trust_code: bool = False,
    then: Sequence[Mapping[str, Any]] = (),
    **parameters: Any,
) -> "dict[str, Tensor]":
    """Merge state dicts in memory, by the same rules and to the same bits as a recipe run.

    `method` is a name (its parameters as keywords) or the `merge` section of a recipe. `models` maps names to state
    dicts (or is a list: names are then m0, m1, ...). `dtype` is the compute dtype, float32 or float64. `architecture`
    is for methods that ask for it, where the tensors' names do not tell. `statistics` maps names of models to what was
    measured on them, by the names of weights, for methods that need that. `trust_code` allows Python files that the
    parameters name to be run. `then` are steps after merging, as in a recipe. Inputs are not changed; the result holds
    new tensors with the dtypes of `base` (or of the first model), on the CPU.
    Raises RecipeError or PlanError for inputs that do not fit, MergeError for results that are not finite.
    """
    from mergetool.engine.memory import merge_in_memory

    if not isinstance(models, Mapping):
        models = {f"m{index}": model for index, model in enumerate(models)}
    section = {"method": method, **parameters} if isinstance(method, str) else {**method, **parameters}
    document = {
        **({"base": "in memory"} if base is not None else {}),
        **({"architecture": architecture} if architecture is not None else {}),
        "models": dict.fromkeys(models, "in memory"),
        "merge": section,
        **({"then": then} if then else {}),
        "compute": {"seed": seed, "dtype": dtype},
        **({"calibration": {name: {"measured": "in memory"} for name in statistics}} if statistics else {}),
    }
    states = {**({"base": base} if base is not None else {}), **models}
    return merge_in_memory(load_recipe(document), states, statistics or {}, trust_code=trust_code)


def _paths(given: Mapping[str, str | Path] | None) -> dict[str, Path]:
    return {name: Path(path) for name, path in (given or {}).items()}


def _loaded(recipe: RecipeLike, settings: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe if not settings else load_recipe(recipe.document, settings, recipe.folder)
    return load_recipe(recipe, settings)

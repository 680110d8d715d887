"""The seam to lm-eval: loading tasks, and wrapping a model. Nothing else imports it.

Tasks of one's own are YAML files in the folder `include`; the data files they name are looked for beside the YAML file
before the current folder.
"""

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from mergetool.errors import EvaluationError
from mergetool.evaluate.options import TaskOptions
from mergetool.networks.library import INSTALL

_FEWSHOT_SEED = 1234
_CODE = re.compile(r"!function|^\s*[\"']?class[\"']?\s*:", re.MULTILINE)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no messages below an error, from the libraries inside."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def wrapped(model: Any, tokenizer: Any, batch_size: int, device: Any, known: dict[Any, list[int]] | None = None) -> Any:
    """lm-eval's view of a model that lives in this process, and wants its inputs on a device.

    `known` holds the tokens of texts that another model with this tokenizer was asked.
    """
    tokens = {} if known is None else known
    try:
        with quiet():
            from lm_eval.models.huggingface import HFLM

            class Remembering(HFLM):  # type: ignore[misc]
                """The candidates of a search are asked the same: texts become tokens once."""

                @property
                def device(self) -> Any:
                    return device  # and not where the model's first tensor is: it may not be there yet

                def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
                    key = (string, args, tuple(sorted(options.items())))
                    if key not in tokens:
                        tokens[key] = super().tok_encode(string, *args, **options)
                    return list(tokens[key])

            return Remembering(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    except ImportError as error:
        raise EvaluationError(f"lm-eval is not installed ({error})", "evaluate", INSTALL) from None


def load_task(options: TaskOptions, folder: Path, *, trust_code: bool = False) -> Any:
    """One lm-eval task with its documents. `include` is relative to `folder`.

    A YAML file may name Python code to run (`!function`): refused unless `trust_code`. Raises EvaluationError.
    """
    try:
        with quiet():
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise EvaluationError(f"lm-eval is not installed ({error})", "evaluate", INSTALL) from None
    where = f"task {options.name!r}"
    include = None if options.include is None else (folder / options.include).absolute()
    if include is not None and not include.exists():
        raise EvaluationError("no such file or folder", str(include), "check `include`")
    try:
        with quiet(), _uncounted():
            manager = _own_tasks() if include is None else TaskManager(include_path=include, include_defaults=False)
            if options.name not in manager.all_tasks:
                raise _unknown(options, manager.all_tasks, folder)
            if include is not None and not trust_code:
                _check_no_code(include)
            loaded = _load(manager, options.name)
    except EvaluationError:
        raise
    except Exception as error:  # a task file is code: anything may come out of it
        raise EvaluationError(
            f"cannot be loaded: {_first_line(error)}", where, "repair the task's YAML file"
        ) from error
    if len(loaded) != 1:
        what = f"stands for {len(loaded)} tasks ({', '.join(sorted(task.config.task for task in loaded)[:5])})"
        raise EvaluationError(what, where, "name these tasks one by one")
    (task,) = loaded
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)
    return task


@cache
def _own_tasks() -> Any:
    """lm-eval's own tasks: looking through its folder lasts seconds, and it does not change meanwhile."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextmanager
def _uncounted() -> Iterator[None]:
    """Loading a local file is nobody's business: datasets would tell its makers, over the network."""
    import datasets

    before, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = before


def _unknown(options: TaskOptions, known: list[str], folder: Path) -> EvaluationError:
    from difflib import get_close_matches

    near = get_close_matches(options.name, known, n=1)
    where = "lm-eval" if options.include is None else options.include
    fix = f"did you mean {near[0]!r}?" if near else f"known there: {', '.join(known[:8]) or 'none'}"
    if options.include is None:
        described = next((path.parent for path in _described(folder, options.name)), None)
        place = "FOLDER" if described is None else f"./{described.relative_to(folder).as_posix()}"
        own = f"a task of your own needs its folder: include: {place} (on the command line --include {place})"
        fix = f"{fix if near and described is None else ''}; {own}".removeprefix("; ")
    return EvaluationError(f"there is no task {options.name!r}", where, fix)


def _described(folder: Path, name: str) -> Iterator[Path]:
    """YAML files of this name in a folder or in those directly inside it."""
    for pattern in (f"{name}.yaml", f"*/{name}.yaml"):
        yield from sorted(folder.glob(pattern)) if re.fullmatch(r"[\w.-]+", name) else ()


def _check_no_code(include: Path) -> None:
    """Raise EvaluationError if a task file there would have Python code run."""
    for path in sorted(include.rglob("*.yaml")) if include.is_dir() else [include]:
        if _CODE.search(path.read_text("utf-8", errors="replace")):
            what = "names Python code that would be run on this machine (`!function` or `class`)"
            raise EvaluationError(what, str(path), "read that code; if you trust it, add --trust-code")


def _load(manager: Any, name: str) -> list[Any]:
    """The tasks that a name stands for."""
    entry = manager.task_index[name]
    if overrides := _beside(entry):  # there is no public way to override settings of a task from a file
        return [manager._factory.build(entry, overrides=overrides, registry=manager.task_index)]
    return list(manager.load([name])["tasks"].values())


def _beside(entry: Any) -> dict[str, Any]:
    """Overrides that make data files named in a task's YAML file absolute, where they lie beside it."""
    kwargs = (entry.cfg or {}).get("dataset_kwargs")
    if entry.yaml_path is None or not isinstance(kwargs, Mapping) or "data_files" not in kwargs:
        return {}
    folder = Path(entry.yaml_path).absolute().parent

    def absolute(files: Any) -> Any:
        if isinstance(files, Mapping):
            return {split: absolute(part) for split, part in files.items()}
        if isinstance(files, list | tuple):
            return [absolute(part) for part in files]
        return str(folder / files) if (folder / str(files)).is_file() else files

    return {"dataset_kwargs": {**kwargs, "data_files": absolute(kwargs["data_files"])}}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

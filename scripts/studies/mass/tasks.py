"""Two sets of five tasks, each from inputs of its own kind, so that what holds for one set can be tried on the other.

`first` is that of the demonstration (scripts/demo): digits as rows of letters, messages in languages of Latin type,
lines of Python by project, comparisons, names of Unicode characters. `second`:

| task        | input                                               | classes       | split by |
|-------------|-----------------------------------------------------|---------------|----------|
| script      | Django's messages in languages of other types       | 10 languages  | message  |
| identifier  | a name that a language has built in (from Pygments) | 10 languages  | name     |
| docstring   | how the docstring of a Python function begins       | 8 projects    | file     |
| keyword     | a line of JavaScript with its first word hidden     | 8 keywords    | line     |
| measurement | scikit-learn's breast cancer data, as numbers       | 2 diagnoses   | sample   |
"""

import ast
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scripts.demo.sources import SourceFile, fetch, python_files, translations
from scripts.demo.tasks import MASK, NAMES, Item, Task, load, make_task, save, write

SETS = {"first": NAMES, "second": ("script", "identifier", "docstring", "keyword", "measurement")}
LETTERS = "abcdefghijklmnopqrstuvwxy"
LANGUAGES = ("ar", "be", "bg", "el", "ky", "mn", "ru", "sr", "tg", "uk")
BUILTINS = ("asy", "cocoa", "lasso", "openedge", "php", "scheme", "scilab", "sourcemod", "stata", "vim")
KEYWORDS = ("case", "const", "for", "function", "if", "return", "var", "while")


def prepare(name: str, wheels: Path, folder: Path) -> list[Task]:
    """The tasks of a set, written to `folder` unless they are there."""
    names = SETS[name]
    if not all((folder / f"{task}.json").exists() for task in names):
        folder.mkdir(parents=True, exist_ok=True)
        if name == "first":
            write(wheels, folder)
            save(_readable(load(folder / "digits.json")), folder)
        else:
            for task in second(fetch(wheels)):
                save(task, folder)
    return [load(folder / f"{task}.json") for task in names]


def chosen(folder: Path, names: Sequence[str]) -> list[Task]:
    """Tasks by name, in this order, of whichever set; written to `folder` unless they are there."""
    wanted = [name for name in SETS if set(names) & set(SETS[name])]
    every = {task.name: task for one in wanted for task in prepare(one, folder / "wheels", folder / "tasks")}
    return [every[name] for name in names]


def second(wheels: dict[str, Path]) -> Iterator[Task]:
    """The tasks of the second set, one by one."""
    yield make_task("script", messages(wheels["django"]), per_class=300)
    yield make_task("identifier", identifiers(wheels["pygments"]), per_class=500)
    yield make_task("docstring", docstrings(python_files(wheels)), per_class=500)
    yield make_task("keyword", keywords(wheels["django"]), per_class=500)
    yield make_task("measurement", measurements(), per_class=300)


def messages(django: Path) -> Iterator[Item]:
    """Messages of a web framework, as its translators wrote them."""
    for code, message, translated in translations(django, LANGUAGES):
        if len(translated) >= 12:
            yield Item(" ".join(translated.split()), code, message)


def identifiers(pygments: Path) -> Iterator[Item]:
    """Names that one of ten languages has built in, and no other of them."""
    owners: dict[str, set[str]] = {}
    with zipfile.ZipFile(pygments) as archive:
        for language in BUILTINS:
            tree = ast.parse(archive.read(f"pygments/lexers/_{language}_builtins.py"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and re.fullmatch(r"[\w.:?!*-]{4,40}", str(node.value)):
                    owners.setdefault(str(node.value), set()).add(language)
    for name, languages in owners.items():
        if len(languages) == 1:
            yield Item(name, *languages, name)


def docstrings(files: Iterable[SourceFile]) -> Iterator[Item]:
    """The first paragraph of a docstring, unless it names one of the projects."""
    files = list(files)
    telling = {file.project for file in files}
    for file in files:
        try:
            with warnings.catch_warnings(action="ignore"):  # about escapes in other people's strings
                tree = ast.parse(file.text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                paragraph = " ".join(text.split("\n\n")[0].split())
                if len(paragraph) >= 40 and not any(word in paragraph.lower() for word in telling):
                    yield Item(paragraph, file.project, f"{file.project}/{file.path}")


def keywords(django: Path) -> Iterator[Item]:
    """A line of JavaScript that begins with a keyword, which is hidden."""
    first = re.compile(rf"\s*({'|'.join(KEYWORDS)})\b(.{{8,}})")
    with zipfile.ZipFile(django) as archive:
        for path in sorted(archive.namelist()):
            if not path.endswith(".js") or path.endswith(".min.js"):
                continue
            for line in archive.read(path).decode("utf-8", "replace").splitlines():
                if (found := first.match(line)) and len(line) < 200:
                    yield Item(f"{MASK}{found[2]}", found[1], line.strip())


def measurements() -> Iterator[Item]:
    """Ten means measured on the cell nuclei of a tumour."""
    from sklearn.datasets import load_breast_cancer

    values, targets = load_breast_cancer(return_X_y=True)
    for index, (row, target) in enumerate(zip(values[:, :10], targets, strict=True)):
        yield Item(" ".join(f"{value:.3g}" for value in row), ("malignant", "benign")[target], f"sample {index}")


def _readable(task: Task) -> Task:
    """Pairs of pixels as single letters, which the encoder's tokenizer knows."""
    pairs = {f"[PIXELS {i}{j}]": LETTERS[5 * i + j] for i in range(5) for j in range(5)}

    def letters(text: str) -> str:
        return " ".join(pairs[f"[PIXELS {word}"] for word in text.split("[PIXELS ")[1:])

    splits = {side: [(letters(text), label) for text, label in rows] for side, rows in task.splits.items()}
    return replace(task, splits=splits)

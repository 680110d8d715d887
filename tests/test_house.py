"""Rules of the house that no linter knows."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import grimp
import pytest

import mergetool
from mergetool.methods import registry
from mergetool.methods.base import Params

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "mergetool").rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 50


@cache
def trees():
    return {path.relative_to(ROOT): ast.parse(path.read_text("utf-8")) for path in FILES}


def test_every_module_says_what_it_is_for():
    assert [str(path) for path, tree in trees().items() if not ast.get_docstring(tree)] == []


def test_files_stay_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def test_functions_stay_short():
    long = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    }
    assert long == {}


def test_no_two_files_of_methods_share_six_lines():
    """Beside what they import: what two say alike belongs to a family."""
    found = {}
    for path, tree in trees().items():
        if path.parts[1] != "methods":
            continue
        lines = (ROOT / path).read_text("utf-8").splitlines()
        code = [lines[number - 1].strip() for number in sorted(told(tree)) if lines[number - 1].strip()]
        for start in range(len(code) - 5):
            found.setdefault(tuple(code[start : start + 6]), set()).add(str(path))
    assert {each: paths for each, paths in found.items() if len(paths) > 1} == {}


def told(tree):
    """Numbers of the lines of a module that are neither documentation nor about names of other modules."""
    shown = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom | ast.If | ast.Assign)]
    every = {number for node in shown for number in range(node.lineno, node.end_lineno + 1)}
    documented = (node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef))
    texts = [node.body[0] for node in documented if ast.get_docstring(node)]
    return every - {number for text in texts for number in range(text.lineno, text.end_lineno + 1)}


def test_a_number_that_has_a_type_is_of_that_type_in_every_method():
    """One for all models, or one for each: what `Params` promises to methods and to mypy."""
    per_model = {name: kind == tuple[float, ...] for name, kind in Params.__annotations__.items()}
    marks = {(name, key): mark for name, kind in registry().items() for key, mark in kind.schedulables().items()}
    assert [place for place, mark in marks.items() if per_model.get(place[1], mark.per_model) != mark.per_model] == []
    assert per_model.keys() <= {key for _, key in marks}


def test_the_numbers_of_a_tensor_cannot_be_changed_by_a_method():
    numbers = registry()["ties"].model_validate({"density": 0.5}).params(0.0, ("a", "b"))
    assert (numbers.density, numbers.scale) == ((0.5, 0.5), 1.0)
    with pytest.raises(AttributeError, match="stay as they are"):
        numbers.scale = 2.0


def test_no_two_classes_have_one_name():
    places = {}
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(f"{path}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_only_the_command_line_prints():
    printing = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        if path.parts[1] != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert printing == []


@pytest.mark.parametrize("name", registry())
def test_every_method_has_a_recipe(name):
    assert (ROOT / "recipes" / f"{name}.yaml").is_file()


def test_the_public_names_are_listed_and_exist():
    assert sorted(mergetool.__all__) == mergetool.__all__
    assert all(getattr(mergetool, name) is not None for name in mergetool.__all__)
    assert dir(mergetool) == mergetool.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mergetool.nothing  # noqa: B018


def test_importing_the_package_imports_no_torch():
    code = "import mergetool, mergetool.api, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_optional_packages_are_imported_late():
    optional = {
        "transformers",
        "huggingface_hub",
        "accelerate",
        "matplotlib",
        "lm_eval",
        "peft",
        "sklearn",
        "cmaes",
        "pymoo",
    }
    early = [
        f"{path}:{node.lineno}"
        for path, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom) and roots(node) & optional
    ]
    assert early == []


def test_transformers_has_one_seam():
    importing = [
        str(path)
        for path, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and "transformers" in roots(node)
    ]
    assert importing == ["mergetool/networks/library.py"]


def roots(node):
    """The top-level packages that an import statement names."""
    if isinstance(node, ast.ImportFrom):
        return {str(node.module).partition(".")[0]}
    return {alias.name.partition(".")[0] for alias in node.names}


def test_no_module_takes_anything_from_the_package_root():
    """Else all that the root imports is tied into a ring with it."""
    imports = {
        path: [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)] for path, tree in trees().items()
    }
    assert [str(path) for path, nodes in imports.items() if any(node.module == "mergetool" for node in nodes)] == []


def test_scripts_need_nothing_of_the_tests():
    """Tests try scripts out; if scripts used tests, neither could be moved alone."""
    paths = [path for path in (ROOT / "scripts").rglob("*") if path.is_file() and path.suffix in ("", ".py")]
    importing = [str(path) for path in paths if re.search(r"^\s*(from|import) tests\b", path.read_text("utf-8"), re.M)]
    assert importing == []


def test_no_modules_import_each_other_in_a_circle():
    """Not even for types: a circle is one module in several files."""
    graph = grimp.build_graph("mergetool", cache_dir=None)
    above = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    while free := {name for name, needed in above.items() if not needed & above.keys()}:
        above = {name: needed for name, needed in above.items() if name not in free}
    assert above == {}

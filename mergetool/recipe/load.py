"""From YAML to a checked `Recipe`: every problem found at once, each with its place and a fix.

Sections are validated one by one, so that a mistake in one does not hide the mistakes in another; then come the
checks that need several sections (names of models, bases that would not be used).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from mergetool.errors import RecipeError
from mergetool.evaluate.options import TaskOptions
from mergetool.layouts import layout_with
from mergetool.layouts import registry as layouts
from mergetool.layouts.base import Layout
from mergetool.layouts.same import Same
from mergetool.methods.base import Method
from mergetool.recipe.adapters import is_alone, names_base, on_their_base
from mergetool.recipe.candidate import other_documents
from mergetool.recipe.checkpoints import with_checkpoints
from mergetool.recipe.checks import check_override, cross_checks
from mergetool.recipe.data import Calibration, Data
from mergetool.recipe.document import Document, Place, parse_value, read_documents
from mergetool.recipe.documents import joined, ours
from mergetool.recipe.inner import Around, Inside, inlined
from mergetool.recipe.mergekit import as_text
from mergetool.recipe.render import render, unknown_key
from mergetool.recipe.schema import Check, Compute, Output, Override, Recipe, Reference
from mergetool.recipe.section import merge_section, override_class, then_section
from mergetool.recipe.sweep import sweep_documents
from mergetool.recipe.words import Template, Tokenizer

_Models = Annotated[dict[str, Reference], Field(min_length=1)]
_FIXED: dict[str, Any] = {
    "version": Literal[1],
    "name": Annotated[str, Field(min_length=1, strict=True, description="what other documents of this file call it")],
    "base": Reference,
    "models": _Models,
    "architecture": Annotated[str, Field(min_length=1, strict=True)],
    "calibration": Calibration,
    "compute": Compute,
    "check": Check,
    "tokenizer": Tokenizer,
    "chat_template": Template,
    "output": Output,
    "evaluate": Annotated[tuple[TaskOptions, ...], Field(min_length=1)],
}


@cache
def sections() -> dict[str, Any]:
    """Every section of a recipe but `merge`, with its type: those that any recipe has, and those of layouts."""
    types = dict(_FIXED)
    for layout in layouts().values():
        types |= {
            key: Annotated[info.rebuild_annotation(), Field(description=info.description)]
            for key, info in layout.model_fields.items()
        }
    return types


def load_recipe(
    source: "str | Path | Mapping[str, Any]", settings: Sequence[str] = (), folder: Path | None = None
) -> Recipe:
    """Read and check a recipe: a file's path, or the same data as a mapping, whose relative paths are relative to
    `folder` (the current one).

    A mergekit recipe is converted first.
    `settings` are `key.path=value` overrides, applied before checking. Raises RecipeError holding every problem.
    """
    around = Around()
    if isinstance(source, Mapping):
        document = joined(ours([Document("recipe", _plain(source), folder=folder or Path.cwd())]))
    else:
        document, around = _read(Path(source)), around.inside(Path(source))
    problems = [problem for setting in settings for problem in _apply(document, setting)]
    if problems:
        raise RecipeError.of(problems)
    return check_document(document, tuple(settings), around)


def _read(path: Path) -> Document:
    """Our recipe for what a file holds."""
    return joined(ours(read_documents(path)))


def imported_text(path: Path, folder: Path) -> tuple[str, Sequence[str]]:
    """Our YAML for a mergekit file, right from `folder`, and what its author should know. Raises RecipeError."""
    named = ours(read_documents(path))
    for each in named:
        if not each.foreign:
            what = "this is not a mergekit recipe (it has no merge_method)"
            raise each.document.error((), what, "mergetool run takes ours")
    document = joined(named)
    check_document(document)
    names = [each.name for each in named if each.name is not None] if len(named) > 1 else []
    texts = [as_text(each.document.data, folder, each.name if names else None, names) for each in named]
    return "---\n".join(texts), document.warnings


def _plain(value: Any) -> Any:
    """A copy in dicts and lists, so that `--set` never changes what a caller passed."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _apply(document: Document, setting: str) -> Sequence[RecipeError]:
    """Put one `--set` value into the document. Returns what is wrong with it."""
    key, equals, text = setting.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        return [RecipeError(f"{setting!r} is not key.path=value", "--set", "write e.g. --set merge.density=0.3")]
    if not isinstance(document.data, dict):
        return []  # no recipe at all, which will be said
    try:
        _put(document, key, parts, parse_value(text))
    except RecipeError as error:
        return error.problems
    return []


def _put(document: Document, key: str, parts: Sequence[str], value: Any) -> None:
    node: Any = document.data
    place: Place = ()
    new: Place = ()
    for part in parts:
        parent, at = node, _key_in(node, part, place, key)
        place = (*place, at)
        if isinstance(node, dict) and part not in node:
            node[part] = {}
            new = new or place
        node = node[at]
    parent[at] = value
    document.settings.add(new or place)


def _key_in(node: Any, part: str, place: Place, key: str) -> Any:
    """One step of a `--set` path: a key of a mapping, or an index into a list."""
    if isinstance(node, dict):
        return part
    path = ".".join(map(str, place))
    if not isinstance(node, list):
        raise RecipeError(f"{path} is not a mapping", f"--set {key}", f"set the whole of it: --set {path}=...")
    if not part.isdecimal() or int(part) >= len(node):
        raise RecipeError(f"{part!r} is not an index into a list of {len(node)}", f"--set {key}", "count from 0")
    return int(part)


def check_document(document: Document, settings: tuple[str, ...] = (), around: Around | None = None) -> Recipe:
    """Check a parsed document, and the recipes inside it. Raises RecipeError holding every problem found."""
    data = document.data
    if not isinstance(data, dict):
        raise document.error((), "a recipe is a mapping with `models` and `merge`", "see: mergetool schema")
    document = with_checkpoints(document)
    data = document.data
    if "sweep" in data:
        return _swept(document, settings, around)
    problems: list[RecipeError] = []
    given = _sections_of(document, problems)
    kind, method, overrides = merge_section(document, problems) if "merge" in data else (None, None, ())
    then = then_section(document, problems)
    layout, own = layout_of(document, given, kind, problems)
    if method is not None and (brought := layout_with(method)) is not None:
        layout = brought
        problems += layout_problems(document, layout)
    problems += cross_checks(document, kind, method, layout)
    inner = Inside(document, around or Around(), _read, _check_inner, problems).all(given)
    if method is not None and not problems:
        problems += _check_tried(document, method)
    if problems or method is None:
        raise RecipeError.of(problems)
    recipe = replace(
        _recipe_of(document, given, method, overrides),
        settings=settings,
        document=inlined(document, inner),
        then=then,
        layout=layout,
        layout_overrides=own,
        inner=inner,
    )
    return recipe if is_alone(data) else on_their_base(recipe)


def _recipe_of(document: Document, given: Mapping[str, Any], method: Method, overrides: tuple[Override, ...]) -> Recipe:
    """The recipe that these sections, checked each by itself, are."""
    return Recipe(
        base=given.get("base"),
        models=given["models"],
        architecture=given.get("architecture"),
        method=method,
        overrides=overrides,
        compute=given.get("compute", Compute()),
        check=given.get("check", Check()),
        tokenizer=given.get("tokenizer"),
        output=given.get("output", Output()),
        folder=document.folder.absolute(),
        name=document.name,
        evaluate=given.get("evaluate", ()),
        warnings=tuple(document.warnings),
        chat_template=given.get("chat_template"),
        calibration=given.get("calibration"),
    )


def _swept(document: Document, settings: tuple[str, ...], around: Around | None) -> Recipe:
    """A recipe that makes several results, checked as those of all of them."""
    problems: list[RecipeError] = []
    documents: Mapping[str, Document] = sweep_documents(document, problems)
    if not documents:
        plain = {key: each for key, each in document.data.items() if key != "sweep"}
        documents = {"": replace(document, data=plain)}
    recipes = {}
    for name, each in documents.items():
        try:
            recipes[name] = check_document(each, settings, around)
        except RecipeError as error:
            problems += [each for each in error.problems if str(each) not in map(str, problems)]
    if problems:
        raise RecipeError.of(problems)
    first = next(iter(recipes.values()))
    return replace(first, document=inlined(document, first.inner), points=recipes)


def _check_inner(document: Document, around: Around) -> Recipe:
    return check_document(document, around=around)


def _sections_of(document: Document, problems: list[RecipeError]) -> dict[str, Any]:
    """Every section but `merge` by itself; what is wrong with them, or with the keys, goes to `problems`."""
    data = document.data
    given = {}
    for key, kind in sections().items():
        if key in data:
            try:
                given[key] = _adapter(key).validate_python(data[key])
            except ValidationError as error:
                problems += render(document, (key,), error, Data if kind is Calibration else kind)
    known = [*sections(), "merge", "then", "sweep"]
    problems += [_misplaced(document, key) or unknown_key(document, (key,), known) for key in data if key not in known]
    problems += [
        document.error((), f"required key {key!r} is missing", f"add {key}:")
        for key in ("models", "merge")
        if key not in data
    ]
    return given


@cache
def _adapter(section: str) -> TypeAdapter[Any]:
    """Made once: making one takes longer than checking a section."""
    return TypeAdapter(sections()[section])


def _misplaced(document: Document, key: Any) -> RecipeError | None:
    """The error for a key that belongs into one of the sections, such as `dtype` of `output`."""
    for name in ("output", "compute", "check"):
        section = _FIXED[name]
        if key in section.model_fields and key != "path":
            fix = f"write it inside `{name}`: {name}: {{{key}: ...}}"
            return document.error((key,), f"unknown key {key!r} at the top of a recipe", fix)
    return None


def _check_tried(document: Document, method: Method) -> list[RecipeError]:
    """Whatever is wrong with the other recipes that this one stands for."""
    problems: dict[str, RecipeError] = {}
    for other in other_documents(document, method):
        try:
            check_document(other)
        except RecipeError as error:
            problems |= {str(problem): problem for problem in error.problems}
    return list(problems.values())


def layout_of(
    document: Document, given: Mapping[str, Any], kind: type[Method] | None, problems: list[RecipeError]
) -> tuple[Layout, tuple[Override, ...]]:
    """The layout whose sections a recipe has, and the overrides in them."""
    for first, layout in layouts().items():
        written = layout.model_fields.keys() & document.data.keys()
        if not written:
            continue
        if first not in written:
            what = f"{', '.join(sorted(written))} goes with `{first}`, which is missing"
            problems.append(document.error((sorted(written)[0],), what, f"add {first}:, or remove it"))
        elif written <= given.keys() and kind is not None:
            return _checked_layout(document, layout.model_construct(**{k: given[k] for k in written}), kind, problems)
    return Same(), ()


def _checked_layout(
    document: Document, layout: Layout, kind: type[Method], problems: list[RecipeError]
) -> tuple[Layout, tuple[Override, ...]]:
    section = next(iter(type(layout).model_fields))
    if kind.uses_architecture or kind.searches or kind.arranges or kind.result != "checkpoint":
        what = f"{kind.method_name()} looks at whole models, so `{section}` cannot take them apart"
        problems.append(document.error((section,), what, "choose another method (mergetool methods)"))
        return layout, ()
    problems += layout_problems(document, layout)
    models = document.data.get("models")
    own: list[Override] = []
    for place, data in layout.overrides():
        problems += check_override(document, kind, place, data, models or {})
        try:
            own.append(override_class(kind).model_validate(data))
        except ValidationError as error:
            problems += render(document, place, error, override_class(kind))
    return layout, tuple(own)


def layout_problems(document: Document, layout: Layout) -> list[RecipeError]:
    """What is wrong with a layout, seen together with the names of the models."""
    models = document.data.get("models")
    wrong = layout.problems(tuple(models), names_base(document.data)) if isinstance(models, dict) else ()
    return [document.error(each.place, each.what, each.fix) for each in wrong]

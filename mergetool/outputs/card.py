"""The model card: what the Hub reads (front matter) and what people read (what was merged, and how to do it again)."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergetool._version import __version__
from mergetool.outputs.changed import RoleChange
from mergetool.outputs.redaction import redacted
from mergetool.planning import Plan
from mergetool.planning.inner import inside
from mergetool.planning.sources import Provenance, is_on_hub, pinned_document

_MOST_ROLES = 16


def card(plan: Plan, changes: Sequence[RoleChange] = ()) -> str:
    """Text of README.md. References to the Hub are pinned to the commits that were merged."""
    import yaml

    pins = {o.reference: f"{o.repo}@{o.commit}" for origins in plan.origins.values() for o in origins if o.repo}
    document = redacted(pinned_document(plan.recipe.document, pins), plan.recipe.folder)
    recipe = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    front = yaml.safe_dump(_front(plan), sort_keys=False, allow_unicode=True)
    methods = {name: each.recipe.method.method_name() for name, each in inside(plan).items()}
    rows = "\n".join(
        _row(name, origins, plan.recipe.folder, methods.get(name)) for name, origins in _everything(plan).items()
    )
    after = "".join(f", then `{step.step_name()}`" for step in plan.recipe.then)
    name = f"`{plan.recipe.method.method_name()}`{after}"
    return (
        f"---\n{front}---\n\n"
        f"# {plan.output.name if plan.output else 'merged model'}\n\n"
        f"A merge of {len(plan.recipe.models)} models by {name}, made with mergetool {__version__}.\n\n"
        f"| model | source | licence |\n|---|---|---|\n{rows}\n\n"
        f"{_about_results(plan)}"
        f"{_about_licences(plan)}"
        f"{_about_changes(changes)}"
        f"## Recipe\n\n```yaml\n{recipe}```\n\n"
        f"To make this model again: save the recipe as `recipe.yaml`, and run `mergetool run recipe.yaml` (version "
        f"{__version__}). `mergetool.json` holds the SHA-256 of every input and output: beside the recipe, it makes "
        "`mergetool run recipe.yaml --locked` refuse any other input; `mergetool verify` checks a result against it.\n"
    )


def _front(plan: Plan) -> Mapping[str, Any]:
    origins = [origin for several in plan.origins.values() for origin in several]
    repos = list(dict.fromkeys(origin.repo for origin in origins if origin.repo))
    licences = {origin.licence for origin in origins}
    front: dict[str, Any] = {}
    if licences and None not in licences:
        same = len(licences) == 1
        front |= {"license": licences.pop()} if same else {"license": "other", "license_name": "several"}
    if plan.forms:
        return front | _adapter(plan) | {"tags": ["merge", "mergetool", "lora"]}
    if repos:
        front |= {"base_model": repos, "base_model_relation": "merge"}
    return front | {"tags": ["merge", "mergetool"]}


def _adapter(plan: Plan) -> dict[str, Any]:
    """What the Hub needs to list an adapter under its base: not a folder of this machine."""
    base = plan.about.base
    if base is None or not is_on_hub(plan.recipe.folder, base):
        return {"library_name": "peft"}
    return {"library_name": "peft", "base_model": base, "base_model_relation": "adapter"}


def _everything(plan: Plan) -> Mapping[str, tuple[Provenance, ...]]:
    """Every model, and those that models are merges of as `model/inner`."""
    references = {**({"base": plan.recipe.base} if plan.recipe.base else {}), **plan.recipe.models}
    rows = {name: plan.origins.get(name, (Provenance(reference.source),)) for name, reference in references.items()}
    return rows | {name: origins for name, origins in plan.origins.items() if name not in rows}


def _row(name: str, origins: tuple[Provenance, ...], folder: Path, method: str | None) -> str:
    places = " + ".join([*([f"a merge by `{method}`"] if method else []), *(_place(each, folder) for each in origins)])
    licences = " + ".join(origin.licence or "unknown" for origin in origins) or "as its models'"
    return f"| {_cell(name)} | {places} | {licences} |"


def _cell(name: str) -> str:
    """A model's name in a cell of a table, as it is."""
    return re.sub(r"([\\`*\[\]<>&|])", r"\\\1", " ".join(name.split()))


def _place(origin: Provenance, folder: Path) -> str:
    if origin.repo is None or origin.commit is None:
        return f"`{redacted(origin.reference, folder)}`".replace("|", "\\|")
    return f"[{origin.repo}](https://huggingface.co/{origin.repo}/tree/{origin.commit})"


def _about_changes(changes: Sequence[RoleChange]) -> str:
    """A table for a glance."""
    if not changes:
        return ""
    names = list(dict.fromkeys(name for each in changes for name in each.apart))
    rows = [
        f"| {_role(each.role)} | {each.tensors} | {' | '.join(_figure(each.apart.get(name)) for name in names)} |\n"
        for each in changes[:_MOST_ROLES]
    ]
    more = len(changes) - len(rows)
    return (
        "## What changed\n\n"
        "Norm of the difference over the norm of the model it is a difference to; estimated from a few thousand "
        "entries of some tensors of each role. `mergetool diff` measures it.\n\n"
        f"| role | tensors | {' | '.join(f'from {_cell(name)}' for name in names)} |\n|---|---|{'---|' * len(names)}\n"
        f"{''.join(rows)}\n" + (f"And {more} more roles, which changed less.\n\n" if more else "")
    )


def _role(name: str) -> str:
    """A tensor's name in a cell of a table."""
    return f"`{name}`" if name.isprintable() and not set(name) & set("|`") else ascii(name).replace("|", "")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _about_results(plan: Plan) -> str:
    """The folders of a sweep."""
    rows = "".join(f"- [{name}]({name}/README.md)\n" for name in plan.points)
    return f"{len(plan.points)} results, each whole in its folder:\n\n{rows}\n" if rows else ""


def _about_licences(plan: Plan) -> str:
    licences = {origin.licence for origins in plan.origins.values() for origin in origins}
    if None in licences:
        return "Not every model card claims a licence: find out before you pass this model on.\n\n"
    if len(licences) > 1:
        return "The licences differ: this model may be used only as all of them allow.\n\n"
    return ""

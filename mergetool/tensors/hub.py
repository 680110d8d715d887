"""Models on the Hub: a name resolved to a commit, headers read from a distance, files fetched into the client's cache.

    find("org/name@revision")  one request: which commit, which files, how large
    Repository.headers()       the first bytes of each weight file, by range requests: enough to plan
    Repository.fetch()         the files that a merge needs, where huggingface_hub keeps them

The only seam to huggingface_hub for reading. The token comes from where the client looks for it and never leaves it;
`HF_HUB_OFFLINE`, `HF_ENDPOINT` and `HF_HOME` are the client's, too. What the cache holds of a commit is never asked for
again. A Hub that does not answer is no reason to stop when the cache holds the model.
"""

import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path

from mergetool.errors import HubError, MergetoolError, OutputError, SourceError
from mergetool.tensors.folder import NO_MODEL
from mergetool.tensors.foreign import foreign_folder
from mergetool.tensors.header import Header, header_length, parse_header
from mergetool.tensors.hub_errors import explained, patient, persistent, unreachable
from mergetool.tensors.sets import chosen_set, is_index, weight_sets
from mergetool.tensors.side_files import (
    CARD_NAME,
    CONFIG_NAME,
    MODULES_NAME,
    may_be_carried,
    module_folders,
    read_config,
)
from mergetool.tensors.source import WEIGHT_NAMES, FileStamp, OpenFile, weight_map

_NAME = re.compile(r"(?:hf://)?([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^\s@]+))?")
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_SMALL = (CONFIG_NAME, CARD_NAME, MODULES_NAME, _ADAPTER_FILES[0])
_OTHER = "name another repository or revision"
_FIRST_BYTES = 1 << 16
"""What is read of a weight file at first; few headers are longer."""


@dataclass(frozen=True)
class HubName:
    """`org/name`, and the branch, tag or commit that was asked for."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(text: str) -> HubName | None:
    """What a reference means if it is a Hub id (`org/name`, `org/name@revision`, `hf://...`); None if it cannot be."""
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or match.group(1).endswith((".safetensors", ".git")):
        return None
    return HubName(*match.groups())


def find(name: HubName, *, adapter: bool = False) -> "Repository":
    """Resolve a name. Raises HubError where there is no such model, it may not be read, or nobody answers.

    With a full commit that the cache holds, no request is made.
    """
    known = _cached(name, adapter=adapter)
    if known is not None and known.commit == name.revision:
        return known
    from huggingface_hub import HfApi
    from huggingface_hub.constants import HF_HUB_ETAG_TIMEOUT

    api = HfApi(library_name="mergetool")
    try:
        with explained(str(name)), patient():
            info = persistent(
                lambda: api.model_info(
                    name.repo, revision=name.revision, files_metadata=True, timeout=HF_HUB_ETAG_TIMEOUT
                )
            )
    except HubError as error:
        if known is None or not unreachable(error):
            raise
        return known
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Repository(name, info.id, str(info.sha), sizes, adapter=adapter)


def _cached(name: HubName, *, adapter: bool) -> "Repository | None":
    """What the cache knows of this revision, if it holds all its weights."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    place = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name.repo, repo_type="model")
    commit = name.revision or "main"
    if (place / "refs" / commit).is_file():
        commit = (place / "refs" / commit).read_text().strip()
    snapshot = place / "snapshots" / commit
    if not snapshot.is_dir():
        return None
    sizes = {file.name: file.stat().st_size for file in snapshot.iterdir() if file.is_file()}
    repository = Repository(name, name.repo, commit, sizes, adapter=adapter, place=snapshot)
    return repository if repository.complete else None


@dataclass(frozen=True)
class Repository:
    """A model at one commit."""

    asked: HubName
    name: str
    """What it is called now; another name than asked for if it was renamed."""
    commit: str
    sizes: Mapping[str, int]
    """Bytes of every file."""
    adapter: bool = False
    """Whether a LoRA adapter is meant, not a model."""
    place: Path | None = None
    """Its folder, where all is known from the cache alone."""

    def __str__(self) -> str:
        return f"{self.name}@{self.commit[:12]}"

    @property
    def complete(self) -> bool:
        """Whether the cache holds every weight file."""
        try:
            return all((self.folder / name).is_file() for name in self.weight_files())
        except MergetoolError:  # an index that is damaged, a folder that holds something else
            return False

    @cached_property
    def folder(self) -> Path:
        """The snapshot folder; configs, indexes and the card are in it."""
        if self.place is not None:
            return self.place
        indexes = [name for name in self.sizes if is_index(name)]
        indexes = [name for name in indexes if ".safetensors" in name] or indexes  # the others are not read then
        small = [name for name in self.sizes if name in _SMALL or name in indexes]
        folder = self._download(small, self.asked.revision)  # by its branch, so that the cache learns what that means
        return folder if folder.name == self.commit else self._download(small)

    def weight_files(self) -> list[str]:
        """The files that hold weights: an adapter's, or those of the index, or the one file. Raises HubError."""
        if self.adapter:
            for name in _ADAPTER_FILES[1:]:
                if {_ADAPTER_FILES[0], name} <= self.sizes.keys():
                    return [name]
            raise self._without_adapter()
        chosen = self._chosen()
        if chosen is not None:
            places = weight_map(self.folder, chosen) if is_index(chosen) else {chosen: chosen}
            return list(dict.fromkeys(places.values()))
        if _ADAPTER_FILES[0] in self.sizes:
            raise HubError("is a LoRA adapter, not a model", str(self), NO_MODEL)
        raise self._without_weights()

    def _without_adapter(self) -> HubError:
        inside = sorted(name.rpartition("/")[0] for name in self.sizes if name.endswith(f"/{_ADAPTER_FILES[0]}"))
        if not inside:
            looked = ", ".join(_ADAPTER_FILES[1:])
            return HubError(f"no LoRA adapter in this repository (looked for {looked})", str(self), _OTHER)
        what = f"no LoRA adapter in the repository itself, but in its folders {', '.join(inside)}"
        return HubError(what, str(self), self._fetch_one_of(inside))

    def _fetch_one_of(self, folders: Sequence[str]) -> str:
        place = self.name.rpartition("/")[2]
        command = f"hf download {self.name} --include '{folders[0]}/*' --local-dir {place}"
        return f"run: {command} && echo name {place}/{folders[0]}"

    def _chosen(self) -> str | None:
        """The file or index that would be read of the whole repository, were it here."""
        names = {name for name in self.sizes if "/" not in name}
        if _ADAPTER_FILES[0] in names and not weight_sets(names):
            return None
        if CONFIG_NAME in names and (explicit := read_config(self.folder).get("transformers_weights")) in names:
            return str(explicit)
        try:
            chosen = chosen_set(names, str(self))
        except SourceError as error:
            fix = f"fetch the one that is meant (hf download {self.name} FILE) and name it"
            raise HubError(error.what, error.where, fix) from None
        return None if chosen is None else chosen[0].file

    def _without_weights(self) -> HubError:
        files = {name for name in self.sizes if "/" not in name}
        inside = sorted({name.split("/")[0] for name in self.sizes if name.count("/") == 1 and _is_weights(name)})
        if inside:
            what = f"no weights in the repository itself, but in its folders {', '.join(inside)}"
            return HubError(what, str(self), self._fetch_one_of(inside))
        known = foreign_folder(Path(self.name), files, set())
        if known is not None:
            return HubError(known.what, str(self), known.fix)
        return HubError(f"no model in this repository (looked for {', '.join(WEIGHT_NAMES)})", str(self), _OTHER)

    def headers(self) -> dict[Path, OpenFile]:
        """Checked headers of the safetensors files that the cache lacks, under the paths they would have."""
        names = [name for name in self.weight_files() if name.endswith(".safetensors")]
        missing = [name for name in names if not (self.folder / name).is_file()]
        with explained(str(self)), patient(), ThreadPoolExecutor(max_workers=8) as pool:
            headers = list(pool.map(self._header, missing))
        return {
            self.folder / name: OpenFile(FileStamp(self.folder / name, header.file_size, 0), header)
            for name, header in zip(missing, headers, strict=True)
        }

    def _header(self, name: str) -> Header:
        where = f"{self}/{name}"
        if name not in self.sizes:
            raise HubError("the index names this file, but the repository lacks it", where, "tell its owners")
        size = self.sizes[name]
        first = self._range(name, 0, min(size, _FIRST_BYTES))
        length = header_length(first[:8], size, where)
        rest = self._range(name, len(first), 8 + length) if 8 + length > len(first) else b""
        return parse_header((first + rest)[8 : 8 + length], size, where)

    def _range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file."""
        data = persistent(lambda: self._read(name, begin, end))
        if len(data) != end - begin:
            what = f"asked for {end - begin} bytes, got {len(data)}"
            raise HubError(what, f"{self}/{name}", "try again; check that no proxy changes what is sent")
        return data

    def _read(self, name: str, begin: int, end: int) -> bytes:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        asked = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(library_name="mergetool") | asked
        url = hf_hub_url(self.name, name, revision=self.commit)
        with get_session().stream("GET", url, headers=headers) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            skipped = begin if response.status_code == 200 else 0  # a server that knows no ranges sends everything
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) >= skipped + end - begin:
                    break
        return data[skipped : skipped + end - begin]

    @property
    def missing(self) -> dict[str, int]:
        """Files that a merge needs and the cache lacks, with their sizes."""
        if self.place is not None:
            return {}
        modules = module_folders(self.folder)
        carried = [name for name in self.sizes if may_be_carried(name, modules)]
        wanted = {*self.weight_files(), *carried}
        return {name: self.sizes.get(name, 0) for name in sorted(wanted) if not (self.folder / name).is_file()}

    def fetch(self, *, whole: bool = False) -> Path:
        """Download what is missing (`whole`: every file there is); the folder then opens like any other."""
        missing = self.sizes if whole and self.place is None else self.missing
        self._check_space(sum(missing.values()))
        return self._download(missing) if missing else self.folder

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(next(place for place in self.folder.parents if place.is_dir())).free
        if free < needed:
            fix = "free some space, or set HF_HOME to a folder on a larger disk"
            raise OutputError(f"needs {needed:,} bytes, {free:,} are free on the cache's disk", str(self), fix)

    def _download(self, names: Iterable[str], revision: str | None = "") -> Path:
        """Have the client fetch these files, of this commit unless a branch is given."""
        from huggingface_hub import snapshot_download

        wanted = [escape(name) for name in names]
        asked = self.commit if revision == "" else revision
        with explained(str(self)), patient():
            folder = snapshot_download(self.name, revision=asked, allow_patterns=wanted, library_name="mergetool")
        return Path(folder)


def _is_weights(path: str) -> bool:
    return bool(weight_sets([Path(path).name]))

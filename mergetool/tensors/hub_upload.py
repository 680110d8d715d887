"""A finished folder on the Hub: only what is not there yet, in one commit or pull request.

What has to go is settled first, from the digests that the folder's lock holds and those that the Hub keeps; so the
same folder pushed twice sends nothing and makes no commit. Large files go the client's own way (Xet, or LFS in parts);
their SHA-256 is handed over where the client takes it, so that nobody computes it again.
"""

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergetool.errors import HubError, SourceError
from mergetool.tensors.hub_errors import explained, patient, persistent

_MAX_REGULAR = 64_000_000
"""Files that the Hub keeps in git itself are far smaller."""


@dataclass(frozen=True)
class Target:
    """Where to push."""

    repo: str
    private: bool = False
    """Make it as a private repository; refuse one that is public."""
    create: bool = False
    """Make the repository if there is none (so does `private`)."""
    pull_request: bool = False
    """Open a pull request, instead of a commit."""


@dataclass(frozen=True)
class Pushed:
    """What a push did."""

    repo: str
    url: str
    """Of the commit, or of the pull request."""
    commit: str
    uploaded: tuple[str, ...]
    deleted: tuple[str, ...]
    unchanged: int

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form, for `--json`."""
        return vars(self) | {"uploaded": list(self.uploaded), "deleted": list(self.deleted)}


def check_target(target: Target) -> bool:
    """Whether the repository is there. Raises HubError where a push could not work: before anything is merged."""
    with explained(target.repo), patient():
        persistent(_client().whoami)
    info = _info(target)
    if info is None and not (target.create or target.private):
        fix = "create it: add --create, or `create: true` to output.hub"
        raise HubError("there is no such repository", target.repo, fix)
    if info is not None and target.private and not info.private:
        fix = "make it private on the Hub, or leave `private` out"
        raise HubError("is public, and a private push was asked for", target.repo, fix)
    return info is not None


def push_folder(folder: Path, digests: Mapping[str, str], stale: str, title: str, target: Target) -> Pushed:
    """Make the repository hold these files of `folder` (their SHA-256 in hex by path), as one commit called `title`.

    Files that the `stale` file of the repository (an earlier lock) speaks of, and that are no longer among these, are
    deleted. Raises HubError.
    """
    if not check_target(target):
        with explained(target.repo), patient():
            _client().create_repo(target.repo, private=target.private or None, exist_ok=True)
    changed, gone, known = _to_do(folder, digests, stale, title, target)
    if known is not None:
        return known
    operations = _operations(folder, {path: digests[path] for path in changed}, gone)
    unchanged = len(digests) - len(changed)
    try:
        with explained(target.repo), patient():
            done = _client().create_commit(
                target.repo, operations=operations, commit_message=title, create_pr=target.pull_request
            )
    except HubError as error:
        with suppress(HubError):  # the commit may be there, and only the answer lost
            _, _, known = _to_do(folder, digests, stale, title, target)
        if known is None:
            raise error from None
        return replace(known, uploaded=tuple(changed), deleted=tuple(gone), unchanged=unchanged)
    url = str(done.pr_url or done.commit_url)
    return Pushed(target.repo, url, str(done.oid), tuple(changed), tuple(gone), unchanged)


def _to_do(
    folder: Path, digests: Mapping[str, str], stale: str, title: str, target: Target
) -> tuple[list[str], list[str], Pushed | None]:
    """Files to upload and to delete; what is there, where nothing is left to do."""
    info = _info(target)
    assert info is not None
    there = {file.rfilename: file for file in info.siblings or ()}
    changed = [path for path, digest in digests.items() if not _same(folder / path, digest, there.get(path))]
    outdated = stale in changed and stale in there
    gone = sorted((_listed(target, stale) & there.keys()) - digests.keys()) if outdated else []
    address, known = f"{_client().endpoint}/{target.repo}", None
    if not changed and not gone:
        known = Pushed(target.repo, f"{address}/commit/{info.sha}", info.sha, (), (), len(digests))
    elif target.pull_request and (number := _open_pull_request(target, title)) is not None:
        known = Pushed(target.repo, f"{address}/discussions/{number}", info.sha, (), (), len(digests))
    return changed, gone, known


def _client() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="mergetool")


def _info(target: Target) -> Any:
    """What the Hub knows of the repository; None if there is none."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with explained(target.repo), patient():
        try:
            return persistent(lambda: _client().model_info(target.repo, files_metadata=True))
        except RepositoryNotFoundError:
            return None


def _same(path: Path, digest: str, known: Any) -> bool:
    """Whether the Hub holds this very file."""
    if known is None or known.size != path.stat().st_size:
        return False
    if known.lfs is not None:
        return bool(known.lfs.sha256 == digest)
    if known.size > _MAX_REGULAR:
        return False
    content = path.read_bytes()
    return bool(known.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest())


def _listed(target: Target, lock: str) -> set[str]:
    """The output files that the repository's lock names."""
    import json

    from huggingface_hub import hf_hub_download

    with explained(target.repo), patient():
        path = Path(hf_hub_download(target.repo, lock, library_name="mergetool"))
    try:
        return set(json.loads(path.read_text("utf-8"))["output"]["files"])
    except (ValueError, KeyError, TypeError):  # somebody else's file of that name
        return set()


def _open_pull_request(target: Target, title: str) -> int | None:
    """The number of an open pull request that does the same."""
    with explained(target.repo), patient():
        asked = {"discussion_type": "pull_request", "discussion_status": "open"}
        requests = list(_client().get_repo_discussions(target.repo, **asked))
    return next((int(request.num) for request in requests if request.title == title), None)


def _operations(folder: Path, digests: Mapping[str, str], gone: list[str]) -> list[Any]:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = []
    for path, digest in digests.items():
        try:
            operation = CommitOperationAdd(path_in_repo=path, path_or_fileobj=folder / path)
        except (OSError, ValueError):
            raise SourceError("cannot be read", str(folder / path), "merge again") from None
        operation.upload_info.sha256 = bytes.fromhex(digest)
        added.append(operation)
    return [*added, *(CommitOperationDelete(path_in_repo=path) for path in gone)]

"""What the Hub's client raises, in words for people; and the client made to give up waiting and to keep quiet.

Nothing of what is raised or logged inside is passed on: addresses of downloads may carry a signature, and a signature
is a key. What is told is made of the repository's name, the status of the answer, and what to type next.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from mergetool.errors import HubError, MergetoolError

_T = TypeVar("_T")
_TRIES = 4
_LOGIN = "log in: hf auth login (or set HF_TOKEN)"
_AGAIN = "run the same command again later; what was fetched is kept"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever the client raises about `what` (a repository) into a HubError."""
    try:
        yield
    except MergetoolError:
        raise
    except Exception as error:
        if not _is_clients(error):
            raise
        text, fix = _words(_root(error), what.partition("@")[0])
        raise HubError(text, what, fix) from error


def unreachable(error: HubError) -> bool:
    """Whether the Hub gave no answer that means anything: it is down, far away or busy, or we are offline."""
    cause = _root(error.__cause__) if error.__cause__ is not None else error
    status = _status(cause)
    return status >= 500 or status == 429 or _is_silence(cause) or type(cause).__name__ in _OFFLINE


@contextmanager
def patient() -> Iterator[None]:
    """Let no request of the client wait for ever (by default it does), and let it log nothing."""
    from huggingface_hub import get_session
    from huggingface_hub.constants import HF_HUB_DOWNLOAD_TIMEOUT
    from huggingface_hub.utils import logging

    session, level = get_session(), logging.get_verbosity()
    before = session.timeout
    session.timeout = 6 * HF_HUB_DOWNLOAD_TIMEOUT
    logging.set_verbosity_error()
    try:
        yield
    finally:
        session.timeout = before
        logging.set_verbosity(level)


def persistent(call: Callable[[], _T]) -> _T:
    """The result of `call`, tried again a few times while the Hub is busy or stumbles."""
    for count in range(_TRIES):
        try:
            return call()
        except Exception as error:
            status = _status(error)
            if count == _TRIES - 1 or not (status == 429 or status >= 500 or _is_silence(error)):
                raise
            time.sleep(_wait(error, count))
    raise AssertionError("unreachable")


def _wait(error: BaseException, count: int) -> float:
    """Seconds until the next try: what the Hub asks for, within reason, or longer each time."""
    asked = getattr(getattr(error, "response", None), "headers", {}).get("retry-after", "")
    return min(float(asked), 60.0) if asked.isdecimal() else 0.5 * 2**count


def _is_clients(error: BaseException) -> bool:
    kinds = (kind.__module__.partition(".")[0] for kind in type(error).__mro__)
    return (
        isinstance(error, OSError)
        or any(kind in ("huggingface_hub", "httpx", "httpx2") for kind in kinds)
        or (error.__cause__ is not None and _is_clients(error.__cause__))
    )


def _root(error: BaseException) -> BaseException:
    """The error that says what happened: the client wraps it where it looked into the cache afterwards."""
    while _status(error) == 0 and error.__cause__ is not None and _is_clients(error.__cause__):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _is_silence(error: BaseException) -> bool:
    """No connection, a broken one, or no answer in time."""
    return any(kind.__name__ in ("TransportError", "TimeoutException") for kind in type(error).__mro__)


_OFFLINE = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "IncompleteSnapshotError")


def _words(error: BaseException, repo: str) -> tuple[str, str]:
    """(what, fix) for what the client says."""
    name, status = type(error).__name__, _status(error)
    where = f"https://huggingface.co/{repo}"
    if name in _OFFLINE:
        fix = f"unset HF_HUB_OFFLINE, or fetch it where there is a network: hf download {repo}"
        return "the cache does not hold this model at this revision, and the Hub may not be asked (HF_HUB_OFFLINE)", fix
    if name == "GatedRepoError":
        return f"is gated: its owners want you to accept their conditions first{_as_whom()}", (
            f"accept them at {where}, then {_LOGIN}"
        )
    if name in ("RevisionNotFoundError", "RevisionResolutionError"):
        return "there is no such branch, tag or commit in this repository", f"see {where}/commits"
    if name == "RemoteEntryNotFoundError":
        return "the repository lacks a file that it speaks of", "tell its owners, or name another revision"
    if name == "RepositoryNotFoundError" or (status == 401 and not _token()):
        return f"there is no such model on the Hub, or it is private{_as_whom()}", f"check the name, or {_LOGIN}"
    if name in ("HFValidationError", "HfUriError"):
        return "is no name of a repository", "write ORG/NAME or ORG/NAME@REVISION"
    if name == "LocalTokenNotFoundError":
        return "nobody is logged in here", _LOGIN
    return _by_status(error, status)


def _by_status(error: BaseException, status: int) -> tuple[str, str]:
    if status == 401:
        return "the Hub does not accept the token (401)", _LOGIN
    if status == 403:
        return f"the Hub forbids this (403){_as_whom()}", "use a token that may: https://huggingface.co/settings/tokens"
    if status == 429:
        return "the Hub has had too many requests from here (429)", f"wait some minutes, then {_AGAIN}"
    if status >= 500:
        return f"the Hub has a problem of its own ({status})", _AGAIN
    if status:
        return f"the Hub refused ({status}){_reason(error)}", "check the names and the permissions of the token"
    if "Timeout" in type(error).__name__:
        return "the Hub does not answer in time", f"check the network, then {_AGAIN}"
    if _is_silence(error):
        return (
            f"the Hub cannot be reached ({type(error).__name__})",
            f"check the network and HF_ENDPOINT, then {_AGAIN}",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return f"cannot be kept in the cache: {error.strerror}", "check the disk, or set HF_HOME to another folder"
    return f"what came was not what was asked for ({type(error).__name__})", _AGAIN


def _reason(error: Any) -> str:
    """What the Hub says about it, without anything that could be a key."""
    said = str(getattr(error, "server_message", "") or "").strip()
    token = _token()
    return f": {said.replace(token, '***') if token else said}"[:300] if said else ""


def _as_whom() -> str:
    return " (the token that is set here has no access)" if _token() else " (nobody is logged in here)"


def _token() -> str | None:
    from huggingface_hub import get_token

    token: str | None = get_token()
    return token

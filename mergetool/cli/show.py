"""How things look: errors, tables, progress. Colour and bars only on a terminal."""

import json
import sys
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, TextIO

from mergetool.errors import MergetoolError, RecipeError


def say(text: str) -> None:
    """A line for people."""
    print(_plain(text), file=sys.stderr)


def show_warnings_plainly() -> None:
    """What our code warns of looks like everything else for people; other packages' warnings stay as they are."""
    others = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category.__module__.startswith("mergetool."):
            say(f"warning: {message}")
        else:
            others(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def _plain(text: str) -> str:
    """Text in which names out of a hostile file can do nothing to a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else f"\\x{ord(c):02x}" for c in text)


def explain(error: MergetoolError, *, as_json: bool) -> None:
    """Print an error: on stderr for people, and with `as_json` on stdout too."""
    problems = error.problems if isinstance(error, RecipeError) else (error,)
    for problem in problems:
        print(f"{_paint('error', '31;1')}: {_plain(str(problem))}", file=sys.stderr)
    if as_json:
        _print_json(error.as_dict())


def explain_usage(error: Any, *, as_json: bool) -> None:
    """Print what the command-line library says about a wrong option or argument."""
    error.show()
    if as_json:
        _print_json(RecipeError(error.format_message(), "command line", "see: mergetool --help").as_dict())


def explain_bug(*, as_json: bool) -> None:
    """Print the traceback of an error that should not have been possible."""
    text = traceback.format_exc()
    say(text)
    say("this is a bug in mergetool: please report it, with the lines above")
    if as_json:
        _print_json({"error": "Bug", "exit_code": 1, "what": text, "where": "", "fix": "please report it"})


def _print_json(answer: Any) -> None:
    print(json.dumps(answer, indent=2, ensure_ascii=False))


def interrupted() -> None:
    """Say what Ctrl-C left behind."""
    say("interrupted; what was finished is kept, the same command goes on from there")


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Aligned columns on stdout; heads are left out when they are all empty."""
    cells = [[_cell(value) for value in row] for row in rows]
    lines = ([list(heads)] if any(heads) else []) + cells
    widths = [max((len(line[at]) for line in lines), default=0) for at in range(len(heads))]
    for line in lines:
        print("  ".join(_plain(text).ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if type(value) is int else str(value)


def show_methods(facts: Sequence[Mapping[str, Any]], *, in_full: bool) -> None:
    """The list of methods, or everything about one."""
    if not in_full:
        table(("method", "base", "what it does"), [(f["name"], f["base"], f["summary"]) for f in facts])
        return
    for fact in facts:
        print(f"{fact['name']}\n{'=' * len(fact['name'])}\n\n{fact['documentation']}\n")
        table(
            ("field", "type", "default", "meaning"),
            [(f["name"], f["type"], f["default"], f["help"]) for f in fact["fields"]],
        )


def _paint(text: str, code: str) -> str:
    return f"\033[{code}m{text}\033[0m" if sys.stderr.isatty() else text


class ProgressBar:
    """Progress by bytes on a terminal; nothing but messages elsewhere."""

    _WIDTH = 30
    _EVERY = 0.1

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._label = ""
        self._total = self._done = 0
        self._began = self._drawn = 0.0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, total_bytes: int, label: str) -> None:
        """Begin a bar of `total_bytes`."""
        self._total, self._label, self._done = total_bytes, label, 0
        self._began = time.monotonic()

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more are done."""
        self._done += num_bytes
        now = time.monotonic()
        if self._live and (now - self._drawn > self._EVERY or self._done >= self._total):
            self._drawn = now
            self._draw(now)

    def say(self, text: str) -> None:
        """A message that stays, above the bar."""
        self._erase()
        print(_plain(text), file=self._stream)

    def stop(self) -> None:
        """Take the bar away."""
        self._erase()
        self._total = 0

    def _draw(self, now: float) -> None:
        share = self._done / self._total if self._total else 1.0
        bar = ("=" * round(share * self._WIDTH)).ljust(self._WIDTH)
        rate = self._done / max(now - self._began, 1e-6)
        left = (self._total - self._done) / rate if rate else 0.0
        amount = f"{self._done / 1e9:.2f}/{self._total / 1e9:.2f} GB"
        text = f"{self._label} [{bar}] {amount}, {rate / 1e9:.2f} GB/s, {left:.0f} s left"
        self._stream.write(f"\r\033[K{text}")
        self._stream.flush()

    def _erase(self) -> None:
        if self._live and self._total:
            self._stream.write("\r\033[K")
            self._stream.flush()

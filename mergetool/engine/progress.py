"""Whom a run tells how far it is."""

from typing import Protocol


class Teller(Protocol):
    """The part of a progress display that stages talk to. Calls come from several threads, one at a time."""

    def start(self, total: int, label: str, unit: str = "B") -> None: ...
    def advance(self, count: int) -> None: ...
    def say(self, text: str) -> None: ...


class Progress(Teller, Protocol):
    """What a run tells while it works."""

    def stop(self) -> None: ...


class Silent:
    """No progress at all."""

    def start(self, total: int, label: str, unit: str = "B") -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def stop(self) -> None:
        pass

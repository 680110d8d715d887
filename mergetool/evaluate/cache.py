"""Answers kept between runs: one row per model and item, in one SQLite file.

The key holds everything that an answer depends on: what the model is (not what it is called), and what the item is
(`TaskItems.keys`). Several processes may use one file.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from mergetool.errors import OutputError
from mergetool.evaluate.items import Score

CACHE_NAME = "responses.sqlite"


class ResponseCache:
    """Scores by (model, item); without a folder it remembers nothing. Raises OutputError."""

    def __init__(self, folder: Path | None) -> None:
        self._database: sqlite3.Connection | None = None
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CACHE_NAME).touch()  # with the umask's mode, which SQLite would narrow
            self._database = sqlite3.connect(folder / CACHE_NAME, timeout=60, isolation_level=None)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS answers (model TEXT, item TEXT, value REAL, soft REAL, confidence REAL, "
                "PRIMARY KEY (model, item)) WITHOUT ROWID"
            )
            self._widen()
        except (OSError, sqlite3.Error) as error:
            raise OutputError(
                f"cannot be used as a cache: {error}", str(folder), "name another --cache folder"
            ) from error

    def _widen(self) -> None:
        """A file of an earlier version has no column for how sure a model was."""
        assert self._database is not None
        columns = [row[1] for row in self._database.execute("PRAGMA table_info(answers)")]
        if "confidence" not in columns:
            with suppress(sqlite3.OperationalError):  # another process has just done it
                self._database.execute("ALTER TABLE answers ADD COLUMN confidence REAL")

    def get(self, model: str, items: Sequence[str]) -> dict[str, Score]:
        """What is known of these items, by their keys."""
        if self._database is None:
            return {}
        rows = self._database.execute("SELECT item, value, soft, confidence FROM answers WHERE model = ?", (model,))
        wanted = set(items)
        return {item: Score(*score) for item, *score in rows if item in wanted}

    def everybody(self, items: Sequence[str]) -> dict[str, dict[str, Score]]:
        """What any model is known to have answered to these items, by model and item."""
        found: dict[str, dict[str, Score]] = {}
        wanted = set(items)
        if self._database is not None:
            for model, item, *score in self._database.execute(
                "SELECT model, item, value, soft, confidence FROM answers ORDER BY model, item"
            ):
                if item in wanted:
                    found.setdefault(model, {})[item] = Score(*score)
        return found

    def put(self, model: str, scores: Mapping[str, Score]) -> None:
        """Keep these scores."""
        if self._database is None:
            return
        rows = [(model, item, score.value, score.soft, score.confidence) for item, score in scores.items()]
        self._database.execute("BEGIN IMMEDIATE")
        self._database.executemany(
            "INSERT OR REPLACE INTO answers (model, item, value, soft, confidence) VALUES (?, ?, ?, ?, ?)", rows
        )
        self._database.execute("COMMIT")

    def close(self) -> None:
        """Close the file."""
        if self._database is not None:
            self._database.close()

"""How many texts a second does a service answer, and does it answer many at once as it answers one after the other?

    python examples/serve/load.py http://127.0.0.1:8000 texts.txt --threads 32

`texts.txt` has one text a line.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

Result = dict[str, Any]


def ask(address: str, texts: list[str], num_threads: int) -> tuple[list[Result], float]:
    """Answers in order, and texts a second; each thread keeps one connection."""
    free: SimpleQueue[HTTPConnection] = SimpleQueue()

    def one(text: str) -> Result:
        connection = free.get()
        connection.request("POST", "/", json.dumps({"text": text}))
        found = json.loads(connection.getresponse().read())
        free.put(connection)
        return found

    with ExitStack() as stack:
        for _ in range(num_threads):
            free.put(stack.enter_context(closing(HTTPConnection(str(urlsplit(address).netloc), timeout=300))))
        pool = stack.enter_context(ThreadPoolExecutor(num_threads))
        started = time.perf_counter()
        found = list(pool.map(one, texts))
        return found, len(texts) / (time.perf_counter() - started)


def same(a: Result, b: Result) -> bool:
    """The same task and class, as sure of it to rounding."""
    return (a["task"], a["label"]) == (b["task"], b["label"]) and abs(a["score"] - b["score"]) < 1e-3


def main() -> None:
    """Ask twice, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--threads", type=int, default=32)
    given = parser.parse_args()
    texts = given.texts.read_text("utf-8").split("\n")[:-1]
    first, _ = ask(given.address, texts[:8], 1)
    if wrong := [found["error"] for found in first if "error" in found]:
        sys.exit(wrong[0])
    alone, slow = ask(given.address, texts, 1)
    together, fast = ask(given.address, texts, given.threads)
    equal = sum(map(same, alone, together))
    sys.stdout.write(
        f"1 thread: {slow:.1f} texts a second\n{given.threads} threads: {fast:.1f}, {fast / slow:.1f} times\n"
    )
    sys.stdout.write(f"{equal} of {len(texts)} answers are the same\n")


if __name__ == "__main__":
    main()

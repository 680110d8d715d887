"""A bundle behind HTTP: texts that are asked for at the same time are answered together.

python examples/serve/serve.py out/bundle --port 8000
curl -d '{"text": "an input"}' http://127.0.0.1:8000
"""

import argparse
import json
import queue
import threading
from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mergetool.bundle.classifier import TextClassifier
from mergetool.bundle.opening import load_bundle
from mergetool.bundle.texts import parts_of
from mergetool.errors import MergetoolError

MOST_BYTES = 1 << 20
"""Of a request: longer texts would keep all others waiting while they are cut into words."""


class Server(ThreadingHTTPServer):
    """A thread for each connection; one more answers what they have gathered."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, address: tuple[str, int], classify: TextClassifier, most: int = 32) -> None:
        super().__init__(address, Handler)
        self.classify, self.most, self.counts = classify, most, Counter()
        self.waiting: queue.Queue[tuple[object, Future]] = queue.Queue()
        threading.Thread(target=self.answer, daemon=True).start()

    def answer(self) -> None:
        """Whatever has come while the last batch was under way is the next one: nobody waits for others."""
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.most and not self.waiting.empty():
                batch.append(self.waiting.get())
            if not self.answered(batch):
                for one in batch:  # what cannot be answered is refused alone
                    self.answered([one])

    def answered(self, batch: list[tuple[object, Future]]) -> bool:
        """Whether all of it could be answered; one that could not by itself is told why."""
        self.counts["batches"] += 1
        try:
            found = self.classify([text for text, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][1].set_exception(error)
            return len(batch) == 1
        for (_, future), result in zip(batch, found, strict=True):
            self.counts["answers"] += 1
            future.set_result(result)
        return True


class Handler(BaseHTTPRequestHandler):
    """POST / answers {"text": ...}, with a "pair" if there is one; GET /health and /metrics tell how it does."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # of a connection that says nothing
    server: Server

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # whoever asked has gone
            super().handle()

    def do_POST(self) -> None:
        status, said = self.answer(self.headers.get("Content-Length", ""))
        self.server.counts["refused"] += status != 200
        self.reply(status, json.dumps(said))

    def answer(self, length: str) -> tuple[int, object]:
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            self.close_connection = True  # where the next request begins is not known
            status, why = (413, "is too long") if length.isdecimal() else (411, "needs a Content-Length")
            return status, {"error": f"the request {why}: at most {MOST_BYTES} bytes"}
        future: Future = Future()
        try:
            text = json.loads(self.rfile.read(int(length)))
            parts_of(text)
            self.server.waiting.put((text, future))
            return 200, future.result()
        except (ValueError, RecursionError, MergetoolError) as error:
            return 400, {"error": str(error)}
        except RuntimeError as error:
            return 500, {"error": str(error)}

    def do_GET(self) -> None:
        counts = self.server.counts | Counter(waiting=self.server.waiting.qsize())
        lines = [f"bundle_{name} {counts[name]}" for name in ("answers", "batches", "refused", "waiting")]
        known = {"/health": "ok\n", "/metrics": "\n".join([*lines, ""])}
        self.reply(200 if self.path in known else 404, known.get(self.path, "not found\n"), "text/plain")

    def reply(self, status: int, body: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Metrics tell it."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args()
    with suppress(KeyboardInterrupt):
        Server(("127.0.0.1", given.port), TextClassifier(load_bundle(given.bundle))).serve_forever()

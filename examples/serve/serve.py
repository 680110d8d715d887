"""A bundle behind HTTP: texts that are asked for at the same time are answered together.

python examples/serve/serve.py out/bundle 8000
curl -d '{"text": "an input"}' http://127.0.0.1:8000
"""

import json
import sys
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mergetool.bundle.classifier import TextClassifier
from mergetool.bundle.opening import load_bundle
from mergetool.bundle.together import Together
from mergetool.errors import MergetoolError

MOST_BYTES = 1 << 20  # of a request: longer texts would keep all others waiting while they are cut into words


class Server(ThreadingHTTPServer):
    request_queue_size, daemon_threads = 128, True

    def __init__(self, address: tuple[str, int], classify: TextClassifier, patience: float = 60) -> None:
        super().__init__(address, Handler)
        self.together = Together(classify, patience=patience)


class Handler(BaseHTTPRequestHandler):
    protocol_version, timeout = "HTTP/1.1", 60  # seconds of a connection that says nothing

    def do_POST(self) -> None:
        status, said = self.answer(self.headers.get("Content-Length", ""))
        self.server.together.counts["refused"] += status != 200
        self.reply(status, json.dumps(said))

    def answer(self, length: str) -> tuple[int, object]:
        if not length.isdecimal() or len(length) > 9 or int(length) > MOST_BYTES:
            self.close_connection = True  # where the next request begins is not known
            return 413 if length.isdecimal() else 411, {"error": f"give a Content-Length of at most {MOST_BYTES}"}
        body = self.rfile.read(int(length))
        try:
            return 200, self.server.together(json.loads(body))
        except (ValueError, RecursionError, MergetoolError) as error:
            return 400, {"error": str(error)}
        except TimeoutError:
            return 503, {"error": "too much is asked for: try again later"}
        except RuntimeError as error:
            return 500, {"error": str(error)}

    def do_GET(self) -> None:
        together = self.server.together
        counts = Counter(together.counts, waiting=together.waiting)
        lines = [f"bundle_{name} {counts[name]}\n" for name in ("answers", "batches", "refused", "waiting")]
        known = {"/health": "ok\n", "/metrics": "".join(lines)}
        self.reply(200 if self.path in known else 404, known.get(self.path, "not found\n"), "text/plain")

    def reply(self, status: int, body: str, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body.encode())))
        self.end_headers()
        self.wfile.write(body.encode())

    def handle(self) -> None:
        with suppress(ConnectionError, TimeoutError):  # whoever asked has gone
            super().handle()

    def log_message(self, *_: object) -> None:
        """Metrics tell it."""


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        Server(("127.0.0.1", int(sys.argv[2])), TextClassifier(load_bundle(sys.argv[1]))).serve_forever()

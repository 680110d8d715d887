"""The service that can be copied: its answers, alone and under load, what it refuses, and what it tells of itself."""

import importlib.util
import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import pytest

import mergetool
from mergetool.bundle.classifier import TextClassifier
from tests.bundle.tiny import TEXTS, make_text_bundle

ROOT = Path(__file__).parents[2]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / "serve" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def classify(tmp_path_factory):
    return TextClassifier(mergetool.load_bundle(make_text_bundle(tmp_path_factory.mktemp("served"))))


@contextmanager
def served(classify, **options):
    server = example("serve").Server(("127.0.0.1", 0), classify, **options)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def ask(place, method="POST", path="/", body=None):
    with closing(HTTPConnection(place, timeout=60)) as connection:
        connection.request(method, path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


def test_texts_and_pairs_are_answered_and_others_refused_alone(classify):
    pair = {"text": "w1 w2", "pair": "w3"}
    with served(classify) as place:
        for asked in ({"text": "w2"}, "w2", pair):
            status, body = ask(place, body=asked)
            assert (status, json.loads(body)) == (200, pytest.approx(classify(asked)[0], abs=1e-5))
        status, body = ask(place, body={"words": 3})
        assert status == 400
        assert "is no text" in json.loads(body)["error"]
        assert ask(place, "GET", "/health") == (200, "ok\n")
        told = "bundle_answers 3\nbundle_batches 3\nbundle_refused 1\nbundle_waiting 0\n"
        assert ask(place, "GET", "/metrics") == (200, told)
        assert ask(place, "GET", "/nothing")[0] == 404


def test_many_threads_get_the_answers_of_one_and_share_batches(classify, tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{text} w{number}\n" for number in range(8) for text in TEXTS))
    with served(classify) as place:
        monkeypatch.setattr(sys, "argv", ["load.py", f"http://{place}", str(texts), "--threads", "32"])
        example("load").main()
        batches = int(ask(place, "GET", "/metrics")[1].splitlines()[1].split()[1])
    told = capsys.readouterr().out
    assert "32 of 32 answers are the same" in told, told
    assert 8 + 32 < batches < 8 + 32 + 24


LENGTH = b"Content-Length: %d\r\n\r\n"
WRONG = {
    "no JSON": (400, LENGTH % 1 + b"{"),
    "nothing": (400, LENGTH % 0),
    "no text": (400, LENGTH % 1 + b"3"),
    "an empty text": (400, LENGTH % 2 + b'""'),
    "half a character": (400, LENGTH % 8 + b'"\\ud800"'),
    "no UTF-8": (400, LENGTH % 3 + b'"\xff"'),
    "too deep": (400, LENGTH % 100_000 + b"[" * 100_000),
    "too long": (413, LENGTH % (1 << 30)),
    "longer than a number may be": (413, b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    "no length": (411, b"\r\n"),
    "a length below nothing": (411, b"Content-Length: -1\r\n\r\n"),
    "pieces": (411, b"Transfer-Encoding: chunked\r\n\r\n"),
}


def test_whatever_is_sent_is_answered_with_what_is_wrong_and_the_next_one_is_served(classify, capfd):
    with served(classify) as place:
        host, port = place.split(":")
        for kind, (status, sent) in WRONG.items():
            with socket.create_connection((host, int(port)), timeout=60) as asking, asking.makefile("rb") as said:
                asking.sendall(b"POST / HTTP/1.1\r\n" + sent)
                assert said.readline().split()[1] == b"%d" % status, kind
        with socket.create_connection((host, int(port))) as gone:
            gone.sendall(b"POST / HTTP/1.1\r\nContent-Length: 50\r\n\r\n{}")
        assert ask(place, body="w2")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_a_text_that_cannot_be_answered_is_refused_alone(classify):
    texts = ["w1 w2", "", "w3", *[f"w{number}" for number in range(4, 12)], "  "] * 2
    with served(classify) as place, ThreadPoolExecutor(len(texts)) as pool:
        found = list(pool.map(lambda text: ask(place, body=text)[0], texts))
    assert found == [200 if text.strip() else 400 for text in texts]


def test_a_text_that_waits_too_long_is_told_to_come_again(classify):
    held = threading.Event()

    def slow(texts):
        assert held.wait(60)
        return classify(texts)

    with served(slow, patience=0.1) as place:
        status, body = ask(place, body="w2")
        held.set()
        assert (status, json.loads(body)) == (503, {"error": "too much is asked for: try again later"})

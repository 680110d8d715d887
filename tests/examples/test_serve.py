"""The service that can be copied: its answers, alone and under load, what it refuses, and what it tells of itself."""

import importlib.util
import json
import sys
import threading
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
def served(classify):
    server = example("serve").Server(("127.0.0.1", 0), classify)
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

"""Searches that are killed, and searches by several processes: the same journal, the same winner."""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys

import pytest

import mergetool
from tests.files import LONG
from tests.forks import free_port
from tests.held import kill_after
from tests.tuning.planted import World
from tests.tuning.test_run import ESTIMATED, journal, recipe

pytestmark = pytest.mark.slow  # searches, and there are many

FORK = multiprocessing.get_context("forkserver")
"""Children of one small process that has imported everything: this one may have much memory, and threads."""
FORK.set_forkserver_preload(
    [
        "lm_eval.models.huggingface",
        "lm_eval.tasks",
        "mergetool.engine.worker",
        "mergetool.outputs.checkpoint",
        "mergetool.tuning.session",
        "tests.tuning.test_run",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.tokenization_utils_tokenizers",
    ]
)


@pytest.fixture(scope="module", autouse=True)
def online():
    """Nothing forbids these children to go online."""
    offline = {name: os.environ.pop(name) for name in list(os.environ) if name.endswith("_OFFLINE")}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ |= offline


def spared(**arguments):
    """A search without the pictures of its report."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergetool.pages.pictures.drawn", lambda *_: "")
        mergetool.run(**arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    World(count=80).write(folder)
    return folder


@pytest.fixture(scope="module")
def asked(folder):
    return recipe(folder, search={"algorithm": "cma-es"}, estimator=ESTIMATED)


@pytest.fixture(scope="module")
def undisturbed(asked, tmp_path_factory):
    """The folder of a search that ran through."""
    folder = tmp_path_factory.mktemp("undisturbed")
    spared(recipe=asked, output=folder / "out")
    return folder / "out.search"


def at_most(count, output, **arguments):
    """A search whose process is killed when its journal has so many lines."""
    lines = output.with_name("out.search") / "search.jsonl"
    written = lines.read_bytes().count(b"\n") if lines.exists() else 0
    kill_after("mergetool.tuning.journal:SearchJournal._write", count - written)
    spared(output=output, **arguments)


def killed_after(count, **arguments):
    child = FORK.Process(target=at_most, args=(count,), kwargs=arguments)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


def findings(folder):
    """What a search found and what it cost, without its times."""
    return {key: value for key, value in json.loads((folder / "report.json").read_text()).items() if key != "seconds"}


def test_a_search_killed_at_random_moments_ends_as_if_it_had_run_through(asked, undisturbed, tmp_path):
    rng = random.Random(0)
    total = len(journal(undisturbed))
    lines = tmp_path / "out.search" / "search.jsonl"
    for moment in sorted(rng.sample(range(1, total), 5 if LONG else 1)):
        killed_after(moment, recipe=asked, output=tmp_path / "out")
        with lines.open("ab") as file:
            file.write(b'{"question":["torn')
    assert not (tmp_path / "out").exists()
    mergetool.run(asked, output=tmp_path / "out")
    assert journal(tmp_path / "out.search") == journal(undisturbed)
    assert findings(tmp_path / "out.search") == findings(undisturbed)


def member(rank, size, port, asked, output):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    spared(recipe=asked, output=output)


def alone(asked, output):
    """A search in a process that ends with 9 as soon as it tries a connection or asks for an address."""

    def refuse(event, arguments):
        if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
            os.write(2, f"a connection was tried: {arguments}".encode())
            os._exit(9)

    sys.addaudithook(refuse)
    spared(recipe=asked, output=output)


def test_no_connection_is_tried_where_everything_is_local(folder, tmp_path):
    arguments = {"asked": recipe(folder, search={"generations": 1, "population": 3}), "output": tmp_path / "out"}
    child = FORK.Process(target=alone, kwargs=arguments)
    child.start()
    child.join(120)
    assert child.exitcode == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_two_processes_search_as_one(asked, undisturbed, tmp_path):
    port = free_port()
    members = [FORK.Process(target=member, args=(rank, 2, port, asked, tmp_path / "out")) for rank in range(2)]
    for process in members:
        process.start()
    for process in members:
        process.join(120)
    assert [process.exitcode for process in members] == [0, 0]
    assert journal(tmp_path / "out.search") == journal(undisturbed)
    assert findings(tmp_path / "out.search") == findings(undisturbed)


def test_answers_are_shared_between_runs_through_a_cache(asked, undisturbed, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    mergetool.run(asked, output=tmp_path / "first", cache=cache)

    def nobody(*_):
        raise AssertionError("the model was asked")

    monkeypatch.setattr("mergetool.evaluate.items._answer", nobody)
    mergetool.run(asked, output=tmp_path / "second", cache=cache)
    assert journal(tmp_path / "first.search") == journal(tmp_path / "second.search") == journal(undisturbed)


def test_a_second_search_of_the_same_output_is_kept_out(asked, undisturbed):
    from mergetool.tuning.journal import SearchJournal

    header = json.loads((undisturbed / "search.jsonl").read_text().splitlines()[0])
    held = SearchJournal(undisturbed, header, resume=True)
    with pytest.raises(mergetool.OutputError, match="another search"):
        mergetool.run(asked, output=undisturbed.parent / "out", overwrite=True)
    held.close()


def test_an_extended_search_that_is_killed_loses_nothing(folder, tmp_path):
    def longer(generations):
        return recipe(folder, search={"generations": generations, "population": 3, "rerank": 1})

    lines = tmp_path / "out.search" / "search.jsonl"
    mergetool.run(longer(1), output=tmp_path / "out")
    before = lines.read_bytes()
    arguments = {"recipe": longer(4), "output": tmp_path / "out", "overwrite": True}
    killed_after(before.count(b"\n") + 4, **arguments)
    killed = lines.read_bytes()
    mergetool.run(longer(4), output=tmp_path / "out", overwrite=True)
    mergetool.run(longer(4), output=tmp_path / "fresh")
    assert killed.startswith(before)
    assert lines.read_bytes().startswith(killed[: killed.rfind(b"\n") + 1])
    assert findings(tmp_path / "out.search") == findings(tmp_path / "fresh.search")

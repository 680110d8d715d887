"""What is measured layer by layer goes on behind the last layer that was done when it was killed."""

import signal

import pytest
import torch

import mergetool
from mergetool import MergeError
from mergetool.networks.kept import Unfinished
from mergetool.networks.weights import LentWeights
from tests.files import LONG, content
from tests.statistics.networks import write_classifier, write_dense, write_rows

KILLED = """
import os, signal, sys
import mergetool
from mergetool.networks.kept import Unfinished

def done(self, step, values, over=(), plain=Unfinished.done):
    plain(self, step, values, over)
    if step == sys.argv[5]:
        os.kill(os.getpid(), signal.SIGKILL)

Unfinished.done = done
mergetool.measure(sys.argv[1], sys.argv[2], sys.argv[3], cache=sys.argv[4], memory=1)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unfinished")
    write_dense(folder / "llama")
    write_classifier(folder / "bert")
    write_rows(folder / "rows.jsonl")
    return folder


MOMENTS = [
    ("llama", "gram", "way 2", ("embed_tokens", "layers.0.", "layers.1.")),
    ("llama", "fisher", "back 2: 3 of 4", ("layers.2.",)),
    ("llama", "fisher", "side 12 of 14", ("layers.0.", "layers.1.", "layers.2.", "lm_head")),
    ("bert", "gradient", "back 2", ("layer.1.",)),
    ("llama", "activation", "way 0", ("embed_tokens",)),
    ("bert", "features", "way 2", ("embeddings", "layer.0.", "layer.1.")),
    ("llama", "fisher", "way 1", ()),
]
"""A model, what is measured, the step after which it is killed, and what is not read again; kinds of steps first."""


@pytest.mark.parametrize(("kind", "statistic", "step", "gone"), MOMENTS if LONG else MOMENTS[:3])
def test_a_killed_one_goes_on_and_comes_to_the_same_bytes(
    network_forks, place, kind, statistic, step, gone, tmp_path, monkeypatch
):
    arguments = [str(each) for each in (place / kind, statistic, place / "rows.jsonl", tmp_path / "killed", step)]
    (killed,) = network_forks.python("-c", KILLED, *arguments).wait()
    assert killed.code == -signal.SIGKILL, killed.err
    whole = mergetool.measure(place / kind, statistic, place / "rows.jsonl", cache=tmp_path / "whole")
    read, plain = set(), LentWeights._read
    monkeypatch.setattr(
        LentWeights, "_read", lambda self, empty: read.add(self._names[id(empty)]) or plain(self, empty)
    )
    found = mergetool.measure(place / kind, statistic, place / "rows.jsonl", cache=tmp_path / "killed", memory=1)
    assert content(tmp_path / "killed") == content(tmp_path / "whole")
    assert all(found[name].equal(value) for name, value in whole.items())
    assert read
    assert not [name for name in read if any(part in name for part in gone)]


def test_two_at_once_do_not_share_what_is_unfinished(tmp_path):
    with Unfinished(tmp_path / "one") as first, Unfinished(tmp_path / "one") as second:
        first.tensors["x"] = torch.ones(3)
        second.tensors["x"] = torch.zeros(3)
        assert first.tensors["x"].tolist() == [1.0] * 3
        assert second.tensors["x"].tolist() == [0.0] * 3


def stopped(error, folder, values):
    """What is done in a folder when an error comes."""
    begun = Unfinished(folder)
    begun.done("first", values)
    begun.__exit__(type(error), error, None)
    return begun


def test_it_goes_when_something_is_wrong_and_stays_when_a_user_stops_it(tmp_path):
    for error, stays in ((MergeError("what"), False), (KeyboardInterrupt(), True)):
        stopped(error, tmp_path / "one", {"made": [torch.ones(2), None, (1, "x")]})
        assert (tmp_path / "one").exists() == stays
    with Unfinished(tmp_path / "one") as again:
        assert again.is_done("first")
        made = again.value("made")
        assert (made[0].tolist(), made[1:]) == ([1.0, 1.0], [None, (1, "x")])
    assert not any(tmp_path.iterdir())


def test_what_no_file_can_hold_is_there_but_nobody_goes_on(tmp_path):
    folder, odd = tmp_path / "one", object()
    assert stopped(KeyboardInterrupt(), folder, {"made": [odd]}).value("made") == [odd]
    with Unfinished(folder) as again:
        assert not again.is_done("first")

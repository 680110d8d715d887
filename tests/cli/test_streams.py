"""What goes to stdout, what to stderr, whatever goes wrong: programs read the one, terminals show the other."""

import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.files import LONG, tensors, write_model, write_models, write_raw, write_recipe
from tests.held import JOURNALLED


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Models base, a and b and a recipe of them in the current folder."""
    monkeypatch.chdir(tmp_path)
    write_models(tmp_path)
    write_recipe("r.yaml", models={"a": "a", "b": "b"}, merge={"method": "linear"}, output={"path": "out"})
    return tmp_path


def process(*arguments, **options):
    """Run a command in a process that nothing has been imported for."""
    command = [sys.executable, "-m", "mergetool", *arguments]
    return subprocess.Popen(command, **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options})


@pytest.fixture
def on_terminal(forks):
    """What a command draws on a terminal that is its stdout or its stderr, and (stdout, stderr) of the other."""

    def run(*arguments, to, env=()):
        ours, theirs = pty.openpty()
        running = forks.open(*arguments, env=env, **{to: os.ttyname(theirs)})
        done = running.wait()[0]
        os.close(theirs)
        drawn = read_all(ours)
        os.close(ours)
        return drawn, done

    return run


# -------------------------------------------------------------------- for programs


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("validate r.yaml", "valid"),
        ("plan r.yaml", "steps"),
        ("run r.yaml", "bytes_read"),
        ("inspect a", "tensors"),
        ("inspect a/model.safetensors", "tensors"),
        ("verify a", "summary"),
        ("methods", None),
        ("methods ties", None),
    ],
)
def test_every_command_answers_in_json(call, here, command, key):
    code, out, _ = call(*command.split(), "--json")
    answer = json.loads(out)
    assert code == 0
    assert (key in answer) if key else isinstance(answer, list)


def test_the_schema_is_json(call):
    assert json.loads(call("schema")[1])["title"] == "mergetool recipe"


WRONG = {
    "no command of that name": ("walk --json", 2),
    "no such flag": ("run r.yaml --fast --json", 2),
    "no recipe": ("run --json", 2),
    "wrong number": ("run r.yaml --workers 0 --json", 2),
    "wrong size": ("run r.yaml --memory 1XB --json", 2),
    "recipe is not there": ("plan gone.yaml --json", 2),
    "recipe is wrong": ("validate wrong.yaml --json", 2),
    "setting is wrong": ("run r.yaml --set merge.wieght=1 --json", 2),
    "method is not there": ("methods tiess --json", 2),
    "model is not there": ("inspect gone --json", 3),
    "model is broken": ("verify broken --json", 3),
    "models do not fit": ("plan r.yaml --memory 1MB --json", 4),
    "device is not there": ("run r.yaml --device cuda:99 --json", 4),
    "result is not finite": ("run nan.yaml -o new --json", 5),
    "output exists": ("run r.yaml -o a --json", 6),
}


@pytest.mark.parametrize("case", WRONG)
def test_every_error_is_told_in_json_too(call, here, case):
    write_recipe("wrong.yaml", models={"a": "a"}, merge={"method": "linaer", "x": 1}, outptu={})
    write_model(here / "bad", {name: value * float("nan") for name, value in tensors(0).items()})
    write_recipe("nan.yaml", models={"a": "bad"}, merge={"method": "linear"})
    (here / "broken").mkdir()
    command, expected = WRONG[case]
    code, out, err = call(*command.split())
    answer = json.loads(out)
    assert (code, answer["exit_code"]) == (expected, expected)
    assert answer["what"]
    assert "Traceback" not in err
    assert answer["what"] in err or answer["problems"]


def test_all_problems_of_a_recipe_are_in_the_json(call, here):
    write_recipe("wrong.yaml", models={"a": "a"}, merge={"method": "ties", "x": 1}, outptu={})
    answer = json.loads(call("validate", "wrong.yaml", "--json")[1])
    assert [problem["where"].partition(" ")[2] for problem in answer["problems"]] == [
        "outptu",
        "merge.x",
        "merge.method",
    ]


BROKEN_METHOD = """
import sys
from typing import ClassVar, Literal
from mergetool.methods.base import TensorMethod

class Broken(TensorMethod):
    method: Literal["broken"] = "broken"
    needs_base: ClassVar = "unused"
    granularity: ClassVar = "element"

    def merge(self, group, p, stats):
        raise ZeroDivisionError("of my own")

sys.argv = ["mergetool", "run", "r.yaml", "--json", "--set", "merge.method=broken"]
from mergetool.cli import main
main()
"""


def test_a_bug_is_called_a_bug(here, forks):
    (ended,) = forks.python("-c", BROKEN_METHOD).wait()
    assert ended.code == 1
    assert "ZeroDivisionError: of my own" in ended.err
    assert "please report" in ended.err
    assert json.loads(ended.out)["exit_code"] == 1


@pytest.mark.parametrize("arguments", [["schema"], ["plan", "r.yaml"]])
def test_a_reader_who_leaves_is_no_error(here, forks, arguments):
    os.mkfifo("pipe")
    running = forks.open(*arguments, out="pipe")
    os.close(os.open("pipe", os.O_RDONLY))
    (ended,) = running.wait()
    assert (ended.code, ended.err) == (141, "")


@pytest.mark.parametrize("arguments", [["schema"], ["plan", "r.yaml"]])
def test_a_full_disk_behind_stdout_is_no_bug(here, forks, arguments):
    """What is longer than the buffer fails on the way, the rest at the end."""
    (ended,) = forks.open(*arguments, out="/dev/full").wait()
    assert ended.code == 6
    assert ended.err.splitlines()[-2:] == [
        "error: stdout: no space left on the disk",
        "  fix: free some space, or choose another place with -o PATH",
    ]


# -------------------------------------------------------------------- names that are no plain text


def test_names_out_of_a_file_do_nothing_to_a_terminal(call, here):
    name = "w\x1b]0;owned\x07\x9b31m\r\u202e"
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    (here / "bad").mkdir()
    write_raw(here / "bad/model.safetensors", {name: {**entry, "dtype": "F31"}}, bytes(4))
    write_raw(here / "odd.safetensors", {name: entry}, bytes(4))
    code, out, err = call("inspect", "bad")
    assert (code, out) == (3, "")
    _, table, _ = call("inspect", "odd.safetensors")
    _, alone, _ = call("diff", "odd.safetensors", "a")
    recipe = {"base": "base", "models": {name: "a"}, "merge": {"method": "task-arithmetic"}}
    (here / "odd.yaml").write_text(json.dumps(recipe))
    _, analysis, _ = call("analyze", "odd.yaml")
    for text in (err, table, alone, analysis):
        assert "owned" in text
        assert not set(text) & set("\x1b\x07\x9b\r\u202e")
    facts = json.loads(call("inspect", "odd.safetensors", "--json")[1])
    assert facts["tensors"][0]["name"] == name


def test_an_output_whose_name_is_no_unicode_is_written_and_printed(here, forks):
    (done,) = forks.open("run", "r.yaml", "-o", b"\xff\xfe").wait()
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert done.out.strip().endswith(r"\udcff\udcfe")
    assert (here / os.fsdecode(b"\xff\xfe") / "model.safetensors").is_file()


def test_a_terminal_that_knows_only_ascii_is_enough(here):
    write_model(here / "ü", {"größe": torch.ones(2)})
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    both = [process("inspect", "ü", *flags, env=environment) for flags in ([], ["--json"])]
    assert all(b"gr" in running.communicate()[0] for running in both)


# -------------------------------------------------------------------- for people


def read_all(descriptor):
    found = b""
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:  # the other end of a terminal was closed
            return found.decode()
        if not data:
            return found.decode()
        found += data


def test_progress_is_drawn_on_a_terminal_only(here, forks, on_terminal):
    drawn, done = on_terminal("run", "r.yaml", to="err")
    assert done.out.strip() == str(here / "out")
    assert re.search(r"merging.* \d+% of [0-9.]+ kB", drawn)
    assert "\x1b[2K" in drawn
    (done,) = forks.open("run", "r.yaml", "-o", "again").wait()
    assert [line for line in done.err.splitlines() if line.startswith("merging: 0% of ")]
    assert "\x1b" not in done.err


def test_a_terminal_without_colours_and_one_that_is_dumb(here, on_terminal):
    for environment, allowed in (({"NO_COLOR": "1"}, "0123456789;"), ({"TERM": "dumb"}, "")):
        drawn, _ = on_terminal("run", "nowhere.yaml", to="err", env=environment)
        assert "cannot be read" in drawn
        assert not re.search(r"\x1b\[[0-9;]*3[0-9]", drawn)  # no colour of the foreground
        assert allowed or "\x1b" not in drawn


def test_a_table_on_a_terminal_has_bold_heads_and_whole_names(here, forks, on_terminal):
    drawn, _ = on_terminal("plan", "r.yaml", to="out", env={"COLUMNS": "70"})
    assert re.search(r"\x1b\[1mtensor", drawn)
    assert "model.layers.{0..1}.norm.weight" in drawn
    assert "\x1b" not in forks.open("plan", "r.yaml").wait()[0].out


def test_an_error_is_red_on_a_terminal_only(here, forks, on_terminal):
    drawn, _ = on_terminal("validate", "gone.yaml", to="err")
    assert drawn.startswith("\x1b[1;31merror\x1b[0m: gone.yaml")
    assert forks.open("validate", "gone.yaml").wait()[0].err.startswith("error: gone.yaml")


# -------------------------------------------------------------------- interrupted


@pytest.mark.parametrize("seed", range(4 if LONG else 2))
def test_ctrl_c_at_any_moment_is_no_bug(here, seed):
    """Also while modules are being imported, which makes other errors out of it, and torch's kernels linked."""
    begin = "import sys; sys.argv[0] = 'mergetool'; from mergetool.cli import start; print('up', flush=True); start()"
    command = [sys.executable, "-c", begin, "run", "r.yaml"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout.readline() == b"up\n"  # before that a signal meets Python's own start, not us
    time.sleep(random.Random(seed).uniform(0.1, 2.5))
    running.send_signal(signal.SIGINT)
    out, told = running.communicate()
    assert running.returncode in (0, 130, -signal.SIGINT), told
    assert b"this is a bug" not in told
    if running.returncode == 0:
        assert out.decode().strip() == str(here / "out")
    if (here / "out").exists():
        assert load_file(here / "out/model.safetensors").keys() == tensors(0).keys()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_whoever_ends_a_run_is_told_what_is_kept_and_how_to_go_on(here, forks, number, code):
    shapes = {f"layers.{layer}.weight": (128, 128) for layer in range(40)}
    write_models(here, shapes=shapes)
    write_recipe("long.yaml", base="base", models={"a": "a", "b": "b"}, merge={"method": "tsv-merge"})
    running = forks.open("run", "long.yaml", "-o", "kept", "--workers", "1", "--json", held=(JOURNALLED, 3))
    journal = here / "kept.partial.journal"
    while running.poll() is None and not (journal.exists() and journal.read_bytes().count(b'"unit"') >= 3):
        time.sleep(0.002)
    running.send_signal(number)
    out, told = running.communicate()
    assert running.returncode == json.loads(out)["exit_code"] == code
    assert "interrupted; what was finished is kept" in told
    (again,) = re.findall(r"this goes on from there: mergetool (.*)", told)
    out, err = forks.open(*again.split()).communicate()
    assert json.loads(out)["tensors"] == 40, err


def test_a_signal_that_was_to_be_ignored_is_ignored(here, forks):
    """It comes when four units are done, and the run goes on."""
    running = forks.python("-c", IGNORING)
    assert running.wait()[0].code == 0, running.wait()[0].err
    assert (here / "out/model.safetensors").is_file()


IGNORING = f"""
import os, signal, sys
import tests.held, mergetool.cli

signal.signal(signal.SIGINT, signal.SIG_IGN)
tests.held._after({JOURNALLED!r}, 4, lambda: os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["mergetool", "run", "r.yaml", "--workers", "1"]
mergetool.cli.main()
"""

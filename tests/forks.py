"""Commands in processes of their own without a second of imports each: children of one process that has imported torch.

What huggingface_hub needs is imported there, it itself is not: it looks at the environment once, when it is.

With KILL_AT=n in its environment a command is killed (SIGKILL) before it makes, renames or removes the n-th file or
folder in whose path is KILL_IN; with "KILL_AFTER=module:function n" after the n-th call of a function; with
"HOLD=module:function n" it holds still then (`tests.held`).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from tests.held import JOURNALLED

_SERVER = """
import gc, json, logging, os, signal, sys, tempfile
import mergetool.cli.app, mergetool.cli.show, mergetool.engine, mergetool.planning, mergetool.engine.worker
import mergetool.engine.fit, mergetool.engine.fork, mergetool.outputs.checkpoint, mergetool.tuning.run, tests.held
import torch.distributed
from mergetool.methods import registry
from mergetool.recipe.load import sections

registry(), sections()  # and all modules that these import
from huggingface_hub import HfApi
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
logging.getLogger("huggingface_hub").handlers.clear()
del HfApi
gc.freeze()

def kill_at(left, place):
    def hook(event, arguments):
        nonlocal left
        touched = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        touched = touched or (event == "open" and (arguments[2] or 0) & os.O_CREAT)
        if touched and place in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

def start(wanted):
    child = os.fork()
    if child:
        return child
    for stream, name in ((0, os.devnull), (1, wanted["out"]), (2, wanted["err"])):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
    os.chdir(wanted["cwd"])
    os.environ.clear()
    os.environ.update(wanted["env"])
    tempfile.tempdir = None  # look at the new environment
    sys.argv = ["mergetool", *wanted["arguments"]]
    sys.stdin = open(0)
    if "KILL_AT" in os.environ:
        kill_at(int(os.environ["KILL_AT"]), os.environ["KILL_IN"])
    if "KILL_AFTER" in os.environ:
        target, count = os.environ["KILL_AFTER"].split()
        tests.held.kill_after(target, int(count))
    if "HOLD" in os.environ:
        target, count = os.environ["HOLD"].split()
        tests.held.heed(tests.held.hold(target, int(count)))
    code = 70
    try:
        mergetool.cli.main()
    except SystemExit as end:
        code = end.code or 0
    sys.stdout and sys.stdout.flush()
    sys.stderr and sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    children = [start(wanted) for wanted in json.loads(line)]
    print(json.dumps(children), flush=True)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


class Running:
    """Some processes of one command; the first of them can be asked what `subprocess.Popen` can."""

    def __init__(self, server, arguments, cwd, envs):
        self._server, self._place, self.ended = server, tempfile.TemporaryDirectory(), []
        self._paths = [
            tuple(str(Path(self._place.name) / f"{way}{n}") for way in ("out", "err")) for n, _ in enumerate(envs)
        ]
        for path in (path for pair in self._paths for path in pair):
            Path(path).touch()  # a process may be killed before it opens them
        wanted = [
            {"arguments": arguments, "cwd": cwd, "env": {**env, "TMPDIR": self._place.name}, "out": out, "err": err}
            for env, (out, err) in zip(envs, self._paths, strict=True)
        ]
        server.stdin.write(json.dumps(wanted) + "\n")
        server.stdin.flush()
        self.pids = json.loads(server.stdout.readline())
        self.pid = self.pids[0]

    def wait(self):
        """Exit code, stdout and stderr of every process, when all have ended."""
        if not self.ended:
            codes = json.loads(self._server.stdout.readline())
            with self._place:
                self.ended = [
                    SimpleNamespace(code=code, out=Path(out).read_text(), err=Path(err).read_text())
                    for code, (out, err) in zip(codes, self._paths, strict=True)
                ]
        return self.ended

    def poll(self):
        """The exit code, or None while it runs."""
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:  # the server has taken note of its end
            return self.wait()[0].code
        return None

    def send_signal(self, number):
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """stdout and stderr; `returncode` is known then."""
        (done,) = self.wait()
        return done.out, done.err

    @property
    def returncode(self):
        return self.wait()[0].code

    def end(self):
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait()


class Forks:
    """Runs the command line."""

    def __init__(self):
        command = [sys.executable, "-c", _SERVER]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._running = None

    def run(self, arguments, *, cwd, env):
        """Exit code, stdout and stderr of `mergetool *arguments`."""
        return self.start(arguments, cwd=cwd, envs=[env]).wait()[0]

    def open(self, *arguments, held=None):
        """A command here and with this environment; `held`: what is counted and how often, until it holds still."""
        env = {**os.environ, **({"HOLD": f"{held[0]} {held[1]}"} if held else {})}
        return self.start(arguments, cwd=Path.cwd(), envs=[env])

    def team(self, size, arguments, *, cwd, held=None):
        """The same command in processes that know of one another, as a launcher starts them.

        `held`: the rank of one that holds still after 20 units, until it is killed.
        """
        shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        envs = [
            clean_environment()
            | {key: str(value) for key, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
            | ({"HOLD": f"{JOURNALLED} 20"} if rank == held else {})
            for rank in range(size)
        ]
        return self.start(arguments, cwd=cwd, envs=envs)

    def start(self, arguments, *, cwd, envs):
        """The command once for each environment. One `start` at a time: what a failed test left running is killed."""
        if self._running is not None and not self._running.ended:
            self._running.end()
        self._running = Running(self._server, [*map(str, arguments)], str(cwd), envs)
        return self._running

    def close(self):
        self._server.stdin.close()
        self._server.wait(timeout=120)
        self._server.stdout.close()


def free_port():
    """A port that nobody listens on now, nor will until it is used.

    Below those that systems give to whoever asks for any; each process looks on from a place of its own.
    """
    first = 10_000 + os.getpid() % 20_000
    return next(port for port in range(first, 32_768) if not is_listening(port))


def is_listening(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def clean_environment():
    """This process's environment without anything that concerns the Hub."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}

"""Commands in processes of their own without a second of imports each: children of one process that has imported torch.

The workers of one pytest have these processes from one that they share (`Common`), so that it imports once for all.
What huggingface_hub needs is imported there (`tests.forked`), it itself is not: it looks at the environment once, when
it is.

With KILL_AT=n in its environment a command is killed (SIGKILL) before it makes, renames or removes the n-th file or
folder in whose path is KILL_IN; with "KILL_AFTER=module:function n" after the n-th call of a function; with
"HOLD=module:function n" it holds still then (`tests.held`).
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from tests.held import JOURNALLED

ROOT = Path(__file__).resolve().parents[1]


HOW = {"session": False, "network": None, "path": None}
"""What can be asked of a child besides: a session of its own, the file of a network namespace, and to be any Python
process, with this path before everything else."""


class Running:
    """Some processes of one command; the first of them can be asked what `subprocess.Popen` can."""

    def __init__(self, server, arguments, cwd, envs, *, out=None, err=None, network=(), **how):
        self._server, self._place, self.ended = server, tempfile.TemporaryDirectory(), []
        own = {"out": out, "err": err}
        self._paths = [
            tuple(str(own[way] or Path(self._place.name) / f"{way}{n}") for way in ("out", "err"))
            for n, _ in enumerate(envs)
        ]
        for path in (path for pair in self._paths for path in pair if path.startswith(self._place.name)):
            Path(path).touch()  # a process may be killed before it opens them
        wanted = [
            {"arguments": arguments, "cwd": cwd, "env": {**env, "TMPDIR": self._place.name}, "out": out, "err": err}
            | HOW
            | how
            for env, (out, err) in zip(envs, self._paths, strict=True)
        ]
        for each, name in zip(wanted, network, strict=False):
            each["network"] = str(name)
        self.pids = ask(server, wanted)
        self.pid = self.pids[0]

    def wait(self):
        """Exit code, stdout and stderr of every process, when all have ended."""
        if not self.ended:
            codes = json.loads(self._server.stdout.readline())
            with self._place:
                told = [[self._told(path) for path in pair] for pair in self._paths]
                self.ended = [
                    SimpleNamespace(code=code, out=out, err=err) for code, (out, err) in zip(codes, told, strict=True)
                ]
        return self.ended

    def _told(self, path):
        """What a process has written there, unless the test reads it itself."""
        return Path(path).read_text() if path.startswith(self._place.name) else None

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


def ask(server, what):
    """The answer of the process beside."""
    server.stdin.write(json.dumps(what) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


def text(argument):
    return os.fsdecode(argument) if isinstance(argument, bytes) else str(argument)


COMMAND = [sys.executable, "-m", "tests.forked"]


class Common:
    """One process behind the servers of all workers of a pytest: it is begun when the first of them asks for it."""

    def __init__(self, folder):
        self._listener, self._process = socket.socket(socket.AF_UNIX), None
        self.path = str(Path(folder) / "forks")
        self._listener.bind(self.path)
        self._listener.listen()
        threading.Thread(target=self._begin, daemon=True).start()

    def _begin(self):
        place = self._listener.fileno()
        select.select([place], [], [])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}  # files could be sought in, and be a terminal
        self._process = subprocess.Popen([*COMMAND, str(place)], cwd=ROOT, pass_fds=[place], **pipes)

    def close(self):
        if self._process is not None:
            self._process.stdin.close()
            self._process.wait(timeout=120)
            self._process.stdout.close()
        self._listener.close()


class Child:
    """A server that the common process has forked: it is spoken to as to a process of one's own."""

    def __init__(self, path):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            self.stdin, self.stdout = connection.makefile("w"), connection.makefile("r")

    def wait(self, timeout):
        """It ends by itself."""


def server(common):
    """A process that has imported torch: from the common one whose path this is, or one of its own."""
    if common is not None:
        return Child(common)
    return subprocess.Popen(COMMAND, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


class Forks:
    """Runs the command line."""

    def __init__(self, common=None):
        self._server, self._running = server(common), None

    def know(self, module):
        """Have a module imported for all children that come."""
        ask(self._server, module)

    def live_in(self, environment):
        """Have all children come with the client of the Hub, as it is where the environment says this of it."""
        ask(self._server, environment)

    def run(self, arguments, *, cwd, env):
        """Exit code, stdout and stderr of `mergetool *arguments`."""
        return self.start(arguments, cwd=cwd, envs=[env]).wait()[0]

    def open(self, *arguments, held=None, env=(), **how):
        """A command here and with this environment; `held`: what is counted and how often, until it holds still."""
        env = {**os.environ, **dict(env), **({"HOLD": f"{held[0]} {held[1]}"} if held else {})}
        return self.start(arguments, cwd=Path.cwd(), envs=[env], **how)

    def python(self, *arguments, cwd=None, path=ROOT, **how):
        """What `python *arguments` does, but for what it needs no second to import."""
        return self.start(arguments, cwd=cwd or Path.cwd(), envs=[os.environ], path=str(path), **how)

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

    def start(self, arguments, *, cwd, envs, **how):
        """The command once for each environment (see HOW).

        One `start` at a time: what a failed test left running is killed.
        """
        if self._running is not None and not self._running.ended:
            self._running.end()
        self._running = Running(self._server, [*map(text, arguments)], str(cwd), envs, **how)
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

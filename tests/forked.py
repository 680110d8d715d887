"""Beside `tests.forks`: the process that has imported torch, and what becomes of its children."""

import ctypes
import functools
import gc
import importlib
import json
import logging
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress

import huggingface_hub
import typer.main

import mergetool.cli.app
import mergetool.cli.show
import mergetool.engine.fit
import mergetool.engine.fork
import mergetool.engine.worker
import mergetool.networks.spread
import mergetool.outputs.checkpoint
import mergetool.outputs.difference
import mergetool.planning.report
import mergetool.tuning.run
import tests.held
import tests.limits
from mergetool.methods import has_plugins, registry
from mergetool.recipe.load import sections

HUB = ("huggingface_hub", "transformers", "accelerate")
"""They look at the environment once, when they are imported."""
CLIENT = ("huggingface_hub.hf_api", "huggingface_hub._snapshot_download")
KNOWN = ("transformers.modeling_utils", "scipy.optimize", "mergetool.alignment.fitted")
"""What some of the children need besides, and takes long: where one process has children for all, it has these."""
NEW_NETWORK = 0x40000000
"""CLONE_NEWNET."""


def forget(*packages):
    """Whoever needs these imports them anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
    logging.getLogger("huggingface_hub").handlers.clear()
    importlib.invalidate_caches()


def of_the_hub(environment):
    """What its client looks at when it is imported."""
    return {key: value for key, value in environment.items() if key.startswith("HF_") and key != "HF_TOKEN"}


def live_in(environment):
    """From now on, and the client with it."""
    forget(*HUB)
    os.environ.clear()
    os.environ.update(environment)
    for module in CLIENT:
        importlib.import_module(module)


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


def settle(wanted):
    """Take over streams, folder, environment, network and session of the process that this stands for."""
    os.chdir(wanted["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, wanted["out"]), (2, wanted["err"])):
        os.dup2(os.open(name, os.O_WRONLY), stream)
    if of_the_hub(wanted["env"]) not in ({}, of_the_hub(os.environ)):
        forget(*HUB)
    os.environ.clear()
    os.environ.update(wanted["env"])
    tempfile.tempdir = None  # look at the new environment
    sys.stdin = open(0)  # noqa: SIM115
    if wanted["network"]:
        with open(wanted["network"]) as there:
            assert ctypes.CDLL(None).setns(there.fileno(), NEW_NETWORK) == 0
    if wanted["session"]:
        os.setsid()


def disturb(env):
    """Kill or hold this process, as it is asked to be."""
    if "KILL_AT" in env:
        kill_at(int(env["KILL_AT"]), env["KILL_IN"])
    if "KILL_AFTER" in env:
        target, count = env["KILL_AFTER"].split()
        tests.held.kill_after(target, int(count))
    if "HOLD" in env:
        target, count = env["HOLD"].split()
        tests.held.heed(tests.held.hold(target, int(count)))
    if "LARGEST" in env:  # as on a disk that is full
        tests.limits.limit_files(int(env["LARGEST"]))
    if "HASTE" in env:  # sleeps, as between two attempts, are this many times shorter
        sleep, haste = time.sleep, float(env["HASTE"])
        time.sleep = lambda seconds: sleep(seconds / haste)


def python(path, arguments):
    """What `python *arguments` does with `path` before everything else: a text, a module or a file."""
    forget("mergetool", "tests", "anyio")  # the last brings a plugin of pytest, which looks at it before it is imported
    sys.path.insert(0, path)
    kind, *rest = arguments
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = [kind, *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(kind, run_name="__main__")


def live(wanted):
    """The life of a child, up to its exit code."""
    settle(wanted)
    disturb(os.environ)
    try:
        if wanted["path"] is not None:
            python(wanted["path"], wanted["arguments"])
            return 0
        sys.argv = ["mergetool", *wanted["arguments"]]
        mergetool.cli.main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 70


def start(wanted):
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        code = live(wanted)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def shared(listener):
    """Have a child for everybody who connects: it returns and serves them, until they end and so does this process."""
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                for stream in (0, 1):
                    os.dup2(connection.fileno(), stream)
                return


def main():
    os.fsync = os.fdatasync = lambda _: None  # as in the tests themselves
    registry(), sections(), has_plugins()  # and all modules that these import
    typer.main.get_command = functools.cache(typer.main.get_command)
    typer.main.get_command(mergetool.cli.app.app)  # each child would make it anew, of all commands
    assert huggingface_hub.HfApi  # what it needs is imported
    forget(*HUB)
    if sys.argv[1:]:
        for module in KNOWN:
            importlib.import_module(module)
    gc.freeze()
    if sys.argv[1:]:
        with socket.socket(fileno=int(sys.argv[1])) as listener:
            shared(listener)
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, str | dict):
            importlib.import_module(asked) if isinstance(asked, str) else live_in(asked)
            print("null", flush=True)
            continue
        children = [start(wanted) for wanted in asked]
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


if __name__ == "__main__":
    main()

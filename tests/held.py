"""Commands that wait for their test: from a given moment on they hold still, until a signal comes or they are killed.

A run that is to be met in the middle must not depend on how fast it is. What is counted is written `module:name` of a
function, with how many calls are let through (`tests.forks`).
"""

import os
import signal
import sys
import threading
from importlib import import_module

JOURNALLED = "mergetool.outputs.journal:Journal.unit"
"""Called when a unit is done."""


def is_measured():
    """Whether coverage is looking: then each process that is forked begins with work of its own, and ends with some."""
    coverage = sys.modules.get("coverage")
    return coverage is not None and coverage.Coverage.current() is not None


def hold(target, count):
    """After `count` calls of a function, whoever calls it stops there until `release` of the result is called."""
    go = threading.Event()
    _after(target, count, go.wait)
    return go


def kill_after(target, count):
    """SIGKILL after `count` calls of a function."""
    _after(target, count, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _after(target, count, act):
    """Have a function act at the end of its `count`-th call, and of every later one."""
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    function, lock = getattr(owner, name), threading.Lock()
    left = [count]

    def counted(*arguments, **options):
        found = function(*arguments, **options)
        with lock:
            left[0] -= 1
            stop = left[0] <= 0
        if stop:
            act()
        return found

    setattr(owner, name, counted)


def heed(go):
    """An interruption lets a held command go on to its end, SIGUSR1 just lets it go on."""
    import mergetool.cli as cli

    interrupt = cli._interrupt

    def interrupted(*arguments):
        go.set()
        interrupt(*arguments)

    cli._interrupt = interrupted
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
    signal.signal(signal.SIGUSR1, lambda *_: go.set())

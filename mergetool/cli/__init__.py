"""The command line: the only place that prints, colours and exits."""

import atexit
import errno
import gc
import os
import signal
import sys
from contextlib import suppress
from io import TextIOWrapper
from types import FrameType
from typing import Any


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM. An exception of its own: the command-line library would swallow a KeyboardInterrupt."""

    process = 0
    by: int | None = None
    """The signal that has come, in this process."""


def start() -> None:
    """`main` for a process of its own: it ends without taking torch apart, which would last a third of a second."""
    try:
        main()
    except SystemExit as end:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def main() -> None:
    """Run the command line and exit with the code of design section 3: 0 done, 1 our bug, 2 to 8 by error class."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _Interrupted.process = os.getpid()
    if handlers[signal.SIGINT] is signal.default_int_handler:  # else it is ignored (nohup), and shall be
        signal.signal(signal.SIGINT, _interrupt)
    if "MASTER_ADDR" in os.environ:  # a launcher ends the others so when one of its processes dies
        signal.signal(signal.SIGTERM, _terminate)
    elif handlers[signal.SIGTERM] is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _interrupt)
    if isinstance(sys.stdout, TextIOWrapper):  # a file name may be no Unicode, and a terminal may know only ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    gc.set_threshold(100_000, 50, 50)  # importing torch makes many objects and no garbage
    sys.setswitchinterval(2e-4)  # threads that hash meanwhile must not wait 5 ms for the lock after every block
    code = _run()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except OSError as error:
        code = _unwritten(error)
    if code == 141:  # whoever read our output has gone; nothing more to say
        sys.stdout = sys.stderr = None
    sys.exit(code)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End in good order; the second time, at once, as in a worker's process: its parent goes on or ends, too."""
    if _Interrupted.by is not None or os.getpid() != _Interrupted.process:
        os._exit(128 + number)
    _Interrupted.by = number
    raise _Interrupted


def _terminate(number: int, frame: FrameType | None) -> None:
    """End in good order, with an error that says what has happened."""
    from mergetool.engine.processes import terminated

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise terminated()


def _unwritten(error: OSError) -> int:
    """Say that what was printed did not reach a file, and print no more into it."""
    from mergetool.cli.show import explain
    from mergetool.tensors.io import write_error

    sys.stdout = None
    told = write_error(error, error.filename or "stdout")
    explain(told, as_json=False)
    return told.exit_code


def _is_heard() -> bool:
    """Whether this process speaks for all that a launcher has started."""
    if "MASTER_ADDR" not in os.environ:
        return True
    from mergetool.engine.processes import reports_errors

    return reports_errors()


def _run() -> int:
    """Run a command; its exit code."""
    try:  # a signal may come while the first modules are being imported
        from mergetool.cli.app import app
        from mergetool.cli.show import show_warnings_plainly

        show_warnings_plainly()
        ended: Any = app(standalone_mode=False)
        return ended if isinstance(ended, int) else 0
    except SystemExit as end:  # how the library answers a pipe that is closed
        if isinstance(end.__context__, BrokenPipeError):
            return 141
        raise
    except BaseException as error:
        return _failed(error, as_json="--json" in sys.argv)


def _failed(error: BaseException, as_json: bool) -> int:
    """Say what has ended a command; its exit code."""
    from mergetool.cli.show import explain, explain_bug, explain_usage, interrupted
    from mergetool.errors import MergetoolError

    if _Interrupted.by is not None:  # whatever became of it: modules that were being imported make others of it
        code = 128 + _Interrupted.by
        interrupted(sys.argv[1:], code, as_json=as_json)
        return code
    if not _is_heard():
        return 0  # the leader says it, and fails
    if isinstance(error, MergetoolError):
        explain(error, as_json=as_json)
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _unwritten(error)
    if hasattr(error, "format_message"):  # a wrong option or argument
        explain_usage(error, as_json=as_json)
        return 2
    explain_bug(as_json=as_json)
    return 1

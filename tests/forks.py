"""Commands in processes of their own without a second of imports each: children of one process that has imported torch.

huggingface_hub is not imported there, as it looks at the environment once, when it is.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

_SERVER = """
import json, os, sys
import mergetool.cli.app, mergetool.cli.show, mergetool.engine, mergetool.planner, mergetool.engine.worker, torch

for line in sys.stdin:
    wanted = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, name in ((0, os.devnull), (1, wanted["out"]), (2, wanted["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), stream)
        os.chdir(wanted["cwd"])
        os.environ.clear()
        os.environ.update(wanted["env"])
        sys.argv = ["mergetool", *wanted["arguments"]]
        sys.stdin = open(0)
        try:
            mergetool.cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code or 0)
        os._exit(70)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(code, flush=True)
"""


class Forks:
    """Runs the command line. One command at a time."""

    def __init__(self):
        command = [sys.executable, "-c", _SERVER]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, arguments, *, cwd, env):
        """Exit code, stdout and stderr of `mergetool *arguments`."""
        with tempfile.TemporaryDirectory() as place:
            out, err = Path(place) / "out", Path(place) / "err"
            wanted = {
                "arguments": [*map(str, arguments)],
                "cwd": str(cwd),
                "env": env,
                "out": str(out),
                "err": str(err),
            }
            self._server.stdin.write(json.dumps(wanted) + "\n")
            self._server.stdin.flush()
            code = int(self._server.stdout.readline())
            return SimpleNamespace(code=code, out=out.read_text(), err=err.read_text())

    def close(self):
        self._server.stdin.close()
        self._server.wait(timeout=20)
        self._server.stdout.close()


def clean_environment():
    """This process's environment without anything that concerns the Hub."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}

"""The command line: the only place that prints, colours and exits."""

import gc
import sys


def main() -> None:
    """Run the command line and exit with the code of design section 3: 0 done, 1 our bug, 2 to 8 by error class."""
    from mergetool.cli.app import app
    from mergetool.cli.show import explain
    from mergetool.errors import MergetoolError

    gc.set_threshold(100_000, 50, 50)  # importing torch makes many objects and no garbage
    try:
        app()
    except MergetoolError as error:
        explain(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing more to say
        sys.exit(141)
    finally:
        gc.freeze()  # the process ends here: what is left need not be searched for garbage

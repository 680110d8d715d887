"""The command line: the only place that prints, colours and exits."""

import sys


def main() -> None:
    """Run the command line and exit with the code of design section 3: 0 done, 1 our bug, 2 to 8 by error class."""
    from mergetool.cli.app import app
    from mergetool.cli.show import explain, interrupted
    from mergetool.errors import MergetoolError

    try:
        app()
    except MergetoolError as error:
        explain(error, as_json="--json" in sys.argv)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        interrupted()
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read our output has gone; nothing more to say
        sys.exit(141)

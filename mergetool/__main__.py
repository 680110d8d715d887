"""`python -m mergetool` is the `mergetool` command."""

from mergetool.cli import start

if __name__ == "__main__":
    start()

"""`python -m mergetool` is the `mergetool` command."""

from mergetool.cli import main

if __name__ == "__main__":
    main()

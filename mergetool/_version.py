"""The version, where everyone can read it without importing the package's face; and those of other packages."""

from functools import cache

__version__ = "0.1.0"


@cache
def installed(name: str) -> str:
    """The version of a package that is installed; it takes milliseconds to read."""
    from importlib.metadata import version

    return version(name)

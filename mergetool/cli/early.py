"""What a command that will need torch can begin before it imports it."""

import ctypes
import importlib.util
import os
import sys
from contextlib import suppress
from pathlib import Path
from threading import Thread

_LIBRARIES = (("libtorch_global_deps.so", os.RTLD_GLOBAL), ("libtorch_cpu.so", os.RTLD_LOCAL))
"""In the order, and in the way, in which torch loads them itself."""


def load_libraries() -> Thread | None:
    """Have torch's libraries loaded by a thread, on Linux; None where there is nothing to load.

    Importing torch would do it with the interpreter's lock held, for a quarter of a second; here a call of C's own
    `dlopen` leaves the lock alone, and planning goes on. A library that cannot be loaded is left to that import.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return None
    with suppress(ValueError):  # a torch without a spec is a stand-in
        found = importlib.util.find_spec("torch")
        if found is not None and found.origin is not None:
            folder = Path(found.origin).with_name("lib")
            thread = Thread(target=_load, args=(folder,), daemon=True)
            thread.start()
            return thread
    return None


def _load(folder: Path) -> None:
    with suppress(OSError, AttributeError):  # another C library may keep its `dlopen` elsewhere
        open_library = ctypes.CDLL(None).dlopen
        open_library.argtypes, open_library.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
        for name, scope in _LIBRARIES:
            open_library(os.fsencode(folder / name), scope | os.RTLD_NOW)

"""Tests run side by side on few cores: one OpenMP thread each, here and in what they start. None goes online.

What mergetool remembers between runs lies in a folder of this test run.
"""

import faulthandler
import functools
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import typer.main
from _pytest.faulthandler import fault_handler_stderr_fd_key

TESTS = Path(__file__).parent

os.environ["OMP_NUM_THREADS"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(name, "1")
os.fsync = os.fdatasync = lambda _: None  # what tests write need not outlive a power cut, and the disk has no rest
typer.main.get_command = functools.cache(typer.main.get_command)  # made of all commands anew, for each command
os.environ["XDG_CACHE_HOME"] = CACHE = tempfile.mkdtemp(prefix="mergetool-tests-")
COMMON = pytest.StashKey()
COMMON_PATH = os.environ.pop("MERGETOOL_TESTS_FORKS", None)  # not for what is started here

FAST = ("kernels", "laws", "methods", "planning", "recipe", "search", "tensors", "test_house", "test_documents")
"""What `scripts/test --fast` runs: places whose tests start no process, train nothing and build no network."""
LONG = {
    "methods/test_c2m3",
    "methods/test_moe",
    "methods/test_repair",
    "kernels/test_frank_wolfe",
    "recipe/test_advice",
    "recipe/test_filters",
    "search/test_engines",
    "search/test_estimate",
    "search/test_irt",
    "tensors/test_foreign",
    "tensors/test_pickled",
    "laws/test_devices",
    "laws/test_documentation",
    "laws/test_every_bundle",
}
"""Files among them that take long all the same."""
LONG_TESTS = {
    "test_large_tensors_are_trimmed_exactly_whatever_a_sample_of_them_shows",
    "test_a_section_that_the_page_about_recipes_leaves_out_is_told",
    "test_importing_the_package_imports_no_torch",
    "test_junk_anywhere_in_a_recipe_is_a_recipe_error_or_fine",
}
OF_DEVICES = ("mark.gpu", "every_device", "= laws(")
"""One of these stands in every file with tests for a GPU."""
REAL_RUNS = {"slices", "workers", "memory", "device"}
"""Laws that run from files to files; the others are tried with each method's defaults only."""


@pytest.fixture(scope="session")
def forks():
    """Commands in processes of their own: one server for all tests of a worker."""
    from tests.forks import Forks

    server = Forks(COMMON_PATH)
    yield server
    server.close()


@pytest.fixture(scope="session")
def network_forks(forks):
    """The same, for commands that build networks: transformers is imported once for all of them."""
    forks.know("transformers.modeling_utils")
    return forks


@pytest.fixture(scope="module", autouse=True)
def told_where_it_hangs(pytestconfig):
    """Where all threads are after ten minutes of one file; a clock for every test takes a millisecond of each."""
    faulthandler.dump_traceback_later(600, file=pytestconfig.stash[fault_handler_stderr_fd_key])
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def browser():
    """A Chromium. Not for longer than a module: while it is there, other tests cannot start an event loop."""
    from tests.pages.browsing import CHROMIUM, browser

    if CHROMIUM is None:
        pytest.skip("no chromium here")
    with browser() as found:
        yield found


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Modules and tests stay to the end: no search for garbage goes through them, now or later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(
            20_000, 20, 50
        )  # as rarely as the command does, which networks of many small parts profit from
        gc.enable()


def pytest_configure(config: pytest.Config) -> None:
    """The workers share one process that has imported what their commands need."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        from tests.forks import Common

        config.stash[COMMON] = Common(CACHE)
        os.environ["MERGETOOL_TESTS_FORKS"] = config.stash[COMMON].path


def pytest_unconfigure(config: pytest.Config) -> None:
    if COMMON in config.stash:
        config.stash[COMMON].close()
    shutil.rmtree(CACHE, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)  # first, not when the other workers are done
    for item in items:
        if is_fast(item):
            item.add_marker(pytest.mark.fast)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that could not be chosen are not even imported."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        text = collection_path.read_text()
        return None if any(sign in text for sign in OF_DEVICES) else True
    if config.option.markexpr != "fast" or collection_path in (TESTS, TESTS.parent):
        return None
    place = collection_path.relative_to(TESTS).with_suffix("")
    return True if place.parts[0] not in FAST or str(place) in LONG else None


def is_fast(item: pytest.Item) -> bool:
    """Whether a test belongs into the lane for every save."""
    place = str(item.path.relative_to(TESTS).with_suffix(""))
    given = item.callspec.params if hasattr(item, "callspec") else {}
    if "law" in given and (given["law"].name in REAL_RUNS or given["case"].option):
        return False
    return place.partition("/")[0] in FAST and place not in LONG and getattr(item, "originalname", "") not in LONG_TESTS

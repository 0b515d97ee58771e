"""Settings for all tests: worker processes can import test modules, no test reaches a hub, one thread per process."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import open_chromium

from pipelines.as_typed import DOOR

REPOSITORY = Path(__file__).resolve().parent.parent

os.environ["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
os.environ["HF_HUB_OFFLINE"] = "1"
for outer_make in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # the make that runs the tests would have theirs name folders
    os.environ.pop(outer_make, None)
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell that starts the tests in the background has them ignore Ctrl-C, and with them every command they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def by_no_door() -> Iterator[None]:
    """A test that enters by a door of the house leaves it: messages of the others name commands as make has them."""
    yield
    os.environ.pop(DOOR, None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A browser for the tests of a module, or they are skipped."""
    with open_chromium() as opened:
        yield opened


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where two workers share the files, those with slow tests come first: a long one at the end leaves one idle."""
    if hasattr(config, "workerinput"):
        slow_files = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow_files)

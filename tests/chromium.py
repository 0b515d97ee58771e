"""A real browser for pages: Debian's chromium, driven by playwright; tests without one are skipped."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
# No sandbox, as tests may run as root; and nothing that a browser does of its own accord.
ARGUMENTS = (
    *("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)


def require_chromium() -> None:
    """Skip the test where there is none."""
    pytest.importorskip("playwright.sync_api", reason="the playwright package is missing")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")


@contextmanager
def open_chromium(more: Sequence[str] = ()) -> Iterator[Any]:
    """A browser, closed at the end; `more` are arguments beside the usual ones."""
    require_chromium()
    from playwright.sync_api import sync_playwright

    logging.getLogger("asyncio").setLevel(logging.ERROR)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*ARGUMENTS, *more])
        yield browser
        browser.close()

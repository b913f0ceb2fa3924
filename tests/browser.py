"""A real headless browser for tests of pages: Chromium or Chrome of this machine, driven by playwright.

A machine without one skips such tests, with the reason; in CI (``CI=true``) they fail, so that they are never silently lost.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
HOW = "Install it: apt-get install chromium, and pip install -e '.[dev]'; or name one in the variable BROWSER."
PHONE = (390, 844)
DESKTOP = (1280, 900)


@dataclass
class Tab:
    """An open page and what went wrong on it."""

    page: Any
    """playwright's Page."""
    errors: list[str] = field(default_factory=list)
    """Console errors and warnings, uncaught exceptions, and requests that failed."""
    requests: list[str] = field(default_factory=list)
    """Every address that was asked for; data: URIs are not."""

    def overflow(self) -> int:
        """Return by how many pixels the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def executable() -> str | None:
    """Return the browser of this machine: the one in ``BROWSER``, or the first that is installed."""
    named = os.environ.get("BROWSER")
    return next((path for name in (named, *NAMES) if name and (path := shutil.which(name))), None)


@contextmanager
def tab(size: tuple[int, int] = DESKTOP, *, dark: bool = False) -> Iterator[Tab]:
    """Open an empty page; ``tab.page.goto(...)`` loads one.

    Args:
        size: width and height of the window in CSS pixels.
        dark: whether the browser asks for dark colours.
    """
    path = executable()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        path, sync_playwright = None, None
    if path is None:
        missing = "a browser (Chromium or Chrome)" if sync_playwright else "playwright"
        reason = f"This test needs {missing}. {HOW}"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    with sync_playwright() as driver:
        # root, as in a container, has no sandbox; /dev/shm is often small there
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = driver.chromium.launch(executable_path=path, args=options)
        try:
            page = browser.new_page(
                viewport={"width": size[0], "height": size[1]},
                color_scheme="dark" if dark else "light",
                reduced_motion="reduce",
            )
            opened = Tab(page)
            page.on("console", lambda message: _note(opened, message.type, message.text))
            page.on("pageerror", lambda error: opened.errors.append(f"exception: {error}"))
            page.on("requestfailed", lambda request: opened.errors.append(f"failed: {request.url[:200]}"))
            page.on("request", lambda request: request.url.startswith("data:") or opened.requests.append(request.url))
            yield opened
        finally:
            browser.close()


def _note(opened: Tab, kind: str, text: str) -> None:
    if kind in ("error", "warning"):
        opened.errors.append(f"{kind}: {text}")

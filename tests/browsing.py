"""A real browser for the tests of the page."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


def find_chromium() -> str:
    """Return the path of a Chromium that is installed; with `CI=1`, root installs that of Debian."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    found = next(filter(None, map(shutil.which, names)), None)
    may_install = os.environ.get("CI") == "1" and shutil.which("apt-get") is not None
    if found is None and may_install and hasattr(os, "geteuid") and os.geteuid() == 0:
        for words in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            subprocess.run(["apt-get", "-qq", *words], check=False, stdout=subprocess.DEVNULL)  # a skip without it
        found = shutil.which("chromium")
    if found is None:
        pytest.skip("no Chromium: install one (apt-get install chromium), or set CI=1 to let root install it")
    return found


class Browsed:
    """A page, with everything that a test must not miss: requests, errors, and requests to other machines.

    Args:
        page: The page of playwright.
        base_url: Address of the server.
    """

    def __init__(self, page: Any, base_url: str) -> None:
        self.page, self.base_url = page, base_url.rstrip("/")
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.on("request", self._requested)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("console", lambda message: message.type == "error" and self.problems.append(message.text))

    def _requested(self, request: Any) -> None:
        self.requests.append(f"{request.method} {request.url.removeprefix(self.base_url)}")
        if not request.url.startswith((f"{self.base_url}/", "blob:")):
            self.problems.append(f"a request to another machine: {request.url}")

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what a function in the page returns."""
        return self.page.evaluate(script, *arguments)

    def until(self, script: str, seconds: float = 60) -> Any:
        """Wait until a function in the page returns something that is true, and return it.

        Playwright's own `wait_for_function` needs `eval`, which the page forbids.
        """
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                status = self.run("() => document.getElementById('status')?.textContent")
                raise AssertionError(f"it did not come true in time: {script}; the page says {status!r}")
            time.sleep(0.03)
        return value

    def open(self, view: str = "try") -> None:
        """Load the page anew, with a view."""
        self.page.goto("about:blank")
        self.page.goto(f"{self.base_url}/#{view}")
        self.until("() => document.documentElement.dataset.ready === 'true'")

    def click_at(self, part: str, x: float, y: float, **options: Any) -> None:
        """Click a canvas at a point in pixels of the picture."""
        view, name = part.split("/")
        script = f"() => {{ const v = groundedSam.views['{view}']; return [v.viewer.scale, ...v.viewer.offset]; }}"
        scale, left, top = self.run(script)
        canvas = self.page.locator(f"#view-{view} [data-part={name}]")
        canvas.click(position={"x": left + x * scale, "y": top + y * scale}, **options)


@contextmanager
def browsing(base_url: str, size: tuple[int, int] = (1360, 860), dark: bool = False) -> Iterator[Browsed]:
    """Start a browser with one page."""
    from playwright.sync_api import sync_playwright

    path = find_chromium()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            viewport: Any = {"width": size[0], "height": size[1]}
            context = browser.new_context(viewport=viewport, color_scheme="dark" if dark else "light")
            yield Browsed(context.new_page(), base_url)
        finally:
            browser.close()

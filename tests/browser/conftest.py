"""A real server with two ranks of timers, and a real browser in front of it. Screenshots go to out/screenshots."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.waiting import HANG_S

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "out" / "screenshots"
WIDE = {"width": 1440, "height": 900}

NO_BROWSER = "no Chromium on the PATH: the board is not tested in a browser (make browser)"

Open = Callable[..., Page]

expect.set_options(timeout=HANG_S * 1000)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(NO_BROWSER in str(report.longrepr) for report in terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(f"tests/browser was skipped: {NO_BROWSER}", yellow=True)


@contextmanager
def _served(*options: str) -> Iterator[str]:
    command = [sys.executable, str(ROOT / "tests" / "server" / "fake_engine.py"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "launching\n"
            yield process.stdout.readline().strip()
        finally:
            process.terminate()
        assert process.wait(HANG_S) == 0


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of tests with one of their own
def chromium() -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip(NO_BROWSER)
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to sandbox for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Callable[..., AbstractContextManager[str]]:
    """The URL of a server of the test's own, which ends with the context. Takes its options."""
    return _served


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with _served() as url:
        yield url


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Opens the board in a fresh profile. Errors of scripts or the policy of contents fail the test at its end."""
    contexts, complaints = [], []

    def open_page(url: str, **options: object) -> Page:
        context = chromium.new_context(**{"viewport": WIDE, "color_scheme": "light", **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(HANG_S * 1000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    # That a request was refused is for the page to tell, which is tested.
    assert [text for text in complaints if not text.startswith("Failed to load resource")] == []


@pytest.fixture
def page(open_page: Open, url: str) -> Page:
    page = open_page(url)
    page.wait_for_selector("#connection[data-state=live]")
    return page


@pytest.fixture
def keep() -> Callable[[Page, str], None]:
    """Takes a screenshot of what is in sight."""

    def keep(page: Page, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png")

    return keep

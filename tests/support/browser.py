"""Chromium for the tests of the chat page: one browser, its log, and the page as a person sees it."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

MOST_SECONDS = 60.0  # a hang, on any machine
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextmanager
def chromium(folder: Path) -> Iterator[webdriver.Chrome]:
    """Run Chromium with a profile in an empty folder; if it is not installed, skip the test, or fail it in CI."""
    browser, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if browser is None or driver is None:
        message = "chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for option in (*_OPTIONS, f"--user-data-dir={folder}", "--window-size=1280,800"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    chrome.set_script_timeout(MOST_SECONDS)
    try:
        yield chrome
    finally:
        chrome.quit()


class ChatPage:
    """The chat page of a server.

    Attributes:
        driver: the browser.
        requested: the addresses of all requests so far, since the page was opened.

    """

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        """Open the page as if it were the first time."""
        self.driver, self.url = driver, url
        driver.get(url)
        driver.execute_script("localStorage.clear()")
        driver.get_log("performance"), driver.get_log("browser")
        self.requested: list[str] = []
        self._bodies: list[dict[str, Any]] = []
        driver.get(url + "/?")
        self.wait_until(lambda: self.text("#empty-model") != "")

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """The texts of all such elements, hidden or not."""
        script = "return Array.from(document.querySelectorAll(arguments[0]), (element) => element.textContent)"
        return list(self.driver.execute_script(script, selector))

    def text(self, selector: str) -> str:
        """The text of the first such element; empty if there is none."""
        return next(iter(self.texts(selector)), "")

    def answer(self) -> str:
        """The text of the last answer, without white space around it."""
        return ["", *self.texts(".answer .prose")][-1].strip()

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press keys in whatever has the focus."""
        chain = webdriver.ActionChains(self.driver)
        if shift:
            chain = chain.key_down(Keys.SHIFT)
        chain.send_keys(*keys).key_up(Keys.SHIFT).perform()

    def focused(self) -> str:
        """The name of what has the focus, as a screen reader gives it."""
        element = self.driver.switch_to.active_element
        return element.accessible_name or element.text

    def tab_to(self, name: str, *, backwards: bool = False) -> None:
        """Press Tab until something of that name has the focus."""
        seen = []
        for _ in range(40):
            self.press(Keys.TAB, shift=backwards)
            seen.append(self.focused())
            if seen[-1] == name:
                return
        raise AssertionError(f"Tab does not lead to {name}, but to {seen}")

    def send(self, text: str) -> None:
        """Write a message and send it."""
        self.find("#message").send_keys(text, Keys.ENTER)

    @property
    def answering(self) -> bool:
        return bool(self.all(".send.stops"))

    def wait_for_answer(self) -> None:
        self.wait_until(lambda: not self.answering)

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until something is so, and fail if it never is."""
        deadline = time.monotonic() + MOST_SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it does not come"
            time.sleep(0.02)

    def bodies(self) -> list[dict[str, Any]]:
        """The bodies of all requests for an answer, since the page was opened."""
        self._read_log()
        return self._bodies

    def check_hosts(self) -> None:
        """Assert that no request has left the host, and that the policy has nothing to report."""
        self._read_log()
        assert self.requested
        outside = [url for url in self.requested if urlsplit(url).scheme != "data" and not url.startswith(self.url)]
        assert not outside, outside
        reports = [entry["message"] for entry in self.driver.get_log("browser") if "Policy" in entry["message"]]
        assert not reports, reports

    def _read_log(self) -> None:
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] != "Network.requestWillBeSent":
                continue
            request = message["params"]["request"]
            self.requested.append(request["url"])
            if request["url"].endswith("/v1/chat/completions") and "postData" in request:
                self._bodies.append(json.loads(request["postData"]))

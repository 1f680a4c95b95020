"""The chat page in a real browser, on a real server whose model says what the test wants."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from browser import ChatPage, chromium
from scripted_model import END, ScriptedModel, scripted
from selenium import webdriver
from selenium.webdriver.common.keys import Keys
from serving import MOST_SECONDS, RunningServer, running_server
from small_tokenizers import encode

from tritgguf.generation.engine import Engine
from tritgguf.runtime.kv_pool import KVPool
from tritgguf.runtime.token_batch import TokenBatch

pytestmark = pytest.mark.slow

ATTACKS = """Look: <img src=x onerror="window.pwned = 1"> <script>window.pwned = 2</script> <b onclick=pwned()>b</b>

<iframe src="https://evil.example/frame"></iframe>

<svg onload="window.pwned = 3"><animate onbegin="window.pwned = 4" attributeName=x dur=1s></svg>

[click](javascript:window.pwned=5) [data](data:text/html,<script>1</script>) [odd](JaVaScRiPt&colon;alert`6`)

![pixel](https://evil.example/pixel.png) ![x](x" onerror="window.pwned = 7) <https://example.com/a"onclick="b>

<style>body { display: none }</style><link rel=stylesheet href=https://evil.example/s.css><base href=//evil.example>

`<img src=x onerror=window.pwned=8>`

```html" onmouseover="window.pwned = 9
</code></pre><img src=x onerror="window.pwned = 10">
```
<math><mtext></form><form><mglyph><style></math><img src onerror=window.pwned=11>
"""


class Speaker(ScriptedModel):
    """Says a text for each request, a token per forward pass, and may wait in the middle until the test has looked."""

    def __init__(self) -> None:
        super().__init__([])
        self.waits_before = 0  # so many of its last tokens
        self.goes_on = threading.Event()

    def forward(
        self, batch: TokenBatch, kv: KVPool, logits: np.ndarray | None, hidden: np.ndarray | None = None
    ) -> None:
        if len(self.script) <= self.waits_before:
            assert self.goes_on.wait(MOST_SECONDS)
        super().forward(batch, kv, logits, hidden)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module")
def speaking_server() -> Iterator[RunningServer]:
    loaded = scripted([])
    loaded.model = Speaker()
    loaded.engine = Engine(cast(Any, loaded.model), context=2000, parallel=2)
    with running_server(loaded, alias="speaker") as server:
        yield server


@pytest.fixture
def page(driver: webdriver.Chrome, speaking_server: RunningServer) -> Iterator[ChatPage]:
    opened = ChatPage(driver, speaking_server.url)
    yield opened
    opened.check_hosts()


@pytest.fixture
def speaker(speaking_server: RunningServer) -> Speaker:
    return cast(Any, speaking_server.service.model).model


def say(speaker: Speaker, text: str, rest: str = "") -> None:
    """Let the model say a text in its next answer, and the rest of it once `goes_on` is set."""
    begun, whole = (encode(scripted([]).tokenizer, part) for part in (text, text + rest))
    assert whole[: len(begun)] == begun
    speaker.script = [*whole, END]
    speaker.waits_before = len(whole) - len(begun) + 1 if rest else 0
    speaker.goes_on.clear()
    if not rest:
        speaker.goes_on.set()


def go_on_alone(speaker: Speaker, server: RunningServer) -> None:
    """Let the model go on once the server has noticed that nobody waits for the answer; nothing may be left of it."""
    server.wait_until(lambda: not server.service.engine_thread.jobs)
    speaker.goes_on.set()
    server.check_idle()


def test_a_chat_streams(page: ChatPage, speaker: Speaker) -> None:
    begun, rest = "The **quick** brown", " fox\n\n```python\nprint('fox')\n```\n"
    say(speaker, begun, rest)
    page.send("Tell me of the fox.")
    page.wait_until(lambda: page.answering and "quick" in page.answer())
    assert "print" not in page.answer()
    speaker.goes_on.set()
    page.wait_for_answer()
    assert page.text(".answer strong") == "quick"
    assert page.text(".answer .code-head") == "python"
    assert page.text(".answer pre") == "print('fox')\n"
    assert "tokens/s" in page.text(".answer .figures")
    assert page.text("#context-text").endswith("of 2,000 tokens")
    assert page.text("#conversation-list .entry") == "Tell me of the fox."
    assert page.text("#announcer") == begun + rest
    say(speaker, "It is brown.")
    page.send("Which colour?")
    page.wait_until(lambda: page.answer() == "It is brown.")
    page.wait_for_answer()
    body = page.bodies()[-1]
    assert [message["role"] for message in body["messages"]] == ["user", "assistant", "user"]
    assert body["messages"][1]["content"] in (begun + rest, (begun + rest).rstrip())


def test_escape_stops_an_answer(page: ChatPage, speaker: Speaker, speaking_server: RunningServer) -> None:
    say(speaker, "brown fox brown fox", " brown fox" * 200)
    page.send("Go on.")
    page.wait_until(lambda: "fox" in page.answer())
    page.press(Keys.ESCAPE)
    page.wait_for_answer()
    go_on_alone(speaker, speaking_server)
    assert page.text(".note") == "You stopped this answer."
    assert 0 < len(page.answer()) < 100
    say(speaker, "Again.")
    page.find("[aria-label='Answer again']").click()
    page.wait_until(lambda: page.answer() == "Again.")
    assert len(page.all(".answer")) == 1


def test_a_reload_keeps_what_had_come(page: ChatPage, speaker: Speaker, speaking_server: RunningServer) -> None:
    say(speaker, "brown fox brown fox", " brown fox" * 200)
    page.send("Go on.")
    page.wait_until(lambda: "brown fox brown" in page.answer())
    page.driver.refresh()
    page.wait_until(lambda: "brown fox brown" in page.answer())
    assert "The page was left" in page.text(".answer .note")
    assert not page.answering
    go_on_alone(speaker, speaking_server)
    say(speaker, "Now whole.")
    page.find("[aria-label='Answer again']").click()
    page.wait_until(lambda: page.answer() == "Now whole.")
    page.wait_for_answer()
    page.driver.refresh()
    page.wait_until(lambda: page.answer() == "Now whole.")
    assert not page.text(".answer .note")


def test_attacks_do_nothing(page: ChatPage, speaker: Speaker) -> None:
    say(speaker, ATTACKS)
    script = "document.addEventListener('securitypolicyviolation', (event) => { window.reported = event.blockedURI; })"
    page.driver.execute_script(script)
    area = page.find("#message")
    page.driver.execute_script("arguments[0].value = arguments[1]", area, ATTACKS)
    page.send("")
    page.wait_for_answer()
    assert ATTACKS.strip() in page.text(".bubble")
    assert "mglyph" in page.answer()
    attributes = "return [...document.querySelectorAll('#messages *')].flatMap((e) => e.getAttributeNames())"
    assert not [name for name in page.driver.execute_script(attributes) if name.startswith("on")]
    forbidden = (
        "img, script, iframe, style, link, base, form, object, embed, math, [style], .prose svg:not(.code-head *)"
    )
    assert not page.all(", ".join(f"#messages {tag}" for tag in forbidden.split(", ")))
    links = [link.get_attribute("href") for link in page.all(".prose a")]
    assert "https://evil.example/pixel.png" in links
    assert all(link and link.startswith("https://") for link in links)
    assert all(link.get_attribute("rel") == "noopener noreferrer" for link in page.all(".prose a"))
    for element in page.all(".prose code, .prose b, .prose p"):
        webdriver.ActionChains(page.driver).move_to_element(element).perform()
    assert page.driver.execute_script("return window.pwned ?? window.reported ?? null") is None


MARKDOWN = """# Title

A [link][1], ~~no~~ *yes*.

- one
  - nested

- two

  more of two
1. other

> quote
goes on

| a | b |
|---|--:|
| 1 | 2 |

```js
let x;

let y;
```
Text under it\r\nwith a line\tbreak
====

***

[1]: https://example.com "Title"
"""


def test_growing_markdown_ends_as_the_whole(page: ChatPage) -> None:
    script = """
        const [text, done] = arguments;
        import("/markdown.js").then(({ MarkdownView }) => {
            const html = (view) => view.element.innerHTML;
            const whole = new MarkdownView();
            whole.update(text, false);
            const different = [1, 2, 3, 7].filter((size) => {
                const growing = new MarkdownView();
                let lost = false;
                for (let end = 0; end <= text.length; end += size) {
                    growing.update(text.slice(0, end), true);
                    lost ||= end > 30 && !growing.element.textContent.startsWith("Title");
                }
                growing.update(text, false);
                return lost || html(growing) !== html(whole);
            });
            const deep = new MarkdownView();
            deep.update("> ".repeat(20000), true);
            deep.update("> ".repeat(20000) + "x", false);
            done([different, html(whole), deep.element.textContent.length]);
        });
    """
    different, html, length = page.driver.execute_async_script(script, MARKDOWN)
    assert not different
    assert html.count("<li>") == 4
    assert 'href="https://example.com"' in html
    assert length == 40001


def test_keyboard_alone(page: ChatPage, speaker: Speaker) -> None:
    assert page.focused() == "Message"
    say(speaker, "Yes.")
    page.press("One")
    page.press(Keys.ENTER, shift=True)
    page.press("two", Keys.ENTER)
    page.wait_until(lambda: page.answer() == "Yes.")
    page.wait_for_answer()
    assert page.text(".bubble") == "One\ntwo"
    page.tab_to("Settings", backwards=True)
    page.press(Keys.ENTER)
    page.tab_to("Temperature")
    page.press("9", Keys.TAB)
    assert "from 0 to 2" in page.text("#setting-temperature-problem")
    page.tab_to("Temperature", backwards=True)
    page.press("0")
    assert page.text("#setting-temperature-problem") == ""
    page.tab_to("JSON schema")
    page.press('{"type": "string"}')
    page.press(Keys.ESCAPE)
    page.wait_until(lambda: page.focused() == "Settings")
    page.tab_to("New conversation", backwards=True)
    page.press(Keys.ENTER)
    page.wait_until(lambda: not page.all(".message"))
    assert page.focused() == "Message"
    page.press("Three", Keys.ENTER)
    page.wait_for_answer()
    body = page.bodies()[-1]
    assert body["temperature"] == 0
    assert body["response_format"]["json_schema"]["schema"] == {"type": "string"}


def test_conversations_are_renamed_deleted_and_brought_back(page: ChatPage, speaker: Speaker) -> None:
    for text in ("First", "Second"):
        say(speaker, "Yes.")
        page.find("#new-chat").click()
        page.send(text)
        page.wait_for_answer()
    assert page.texts(".entry") == ["Second", "First"]
    page.tab_to("Rename “First”", backwards=True)
    page.press(Keys.ENTER, "Renamed", Keys.ENTER)
    page.wait_until(lambda: page.texts(".entry") == ["Second", "Renamed"])
    page.tab_to("Delete “Second”", backwards=True)
    page.press(Keys.ENTER)
    page.wait_until(lambda: page.texts(".entry") == ["Renamed"])
    assert not page.all(".message")
    page.find(".notice button").click()
    page.wait_until(lambda: page.texts(".entry") == ["Second", "Renamed"])
    assert page.text(".bubble") == "Second"


def test_faults_are_told_in_plain_words(page: ChatPage, speaker: Speaker) -> None:
    say(speaker, "Yes.")
    page.driver.execute_script("arguments[0].value = 'word '.repeat(3000)", page.find("#message"))
    page.send("")
    page.wait_until(lambda: "no longer fits" in page.text(".callout"))
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    page.driver.execute_cdp_cmd("Network.enable", {})
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    page.send("Hello?")
    page.wait_until(lambda: "does not answer" in page.texts(".callout")[-1])
    page.driver.execute_cdp_cmd("Network.emulateNetworkConditions", {**offline, "offline": False})
    page.find(".callout button").click()
    page.wait_until(lambda: page.answer() == "Yes.")
    assert [message["content"] for message in page.bodies()[-1]["messages"]] == ["Hello?"]


def test_a_phone_shows_all_of_it(page: ChatPage, speaker: Speaker) -> None:
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        say(
            speaker,
            "# Title\n\n" + "wide" * 60 + "\n\n```\n" + "wide " * 60 + "\n```\n\n|a|b|\n|-|-|\n|" + "w " * 99 + "|b|",
        )
        page.send("Something wide, " + "please" * 30)
        page.wait_for_answer()
        assert page.driver.execute_script("return document.documentElement.scrollWidth") == 390
        assert page.driver.execute_script("return document.getElementById('scroller').scrollWidth") <= 390
        page.find("#open-sidebar").click()
        page.wait_until(lambda: page.find(".entry").is_displayed())
        page.find(".entry").click()
        page.wait_until(lambda: not page.find(".entry").is_displayed())
        assert page.focused() == "Message"
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

"""The page in a real browser; skipped where there is none."""

import os
import re
import shutil
from pathlib import Path
from typing import Any, Iterator

import pytest
from serving import KEY, Server

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
STORY = "Keawe was poor, brave, and active; he could read and write. "
DROP = """text => {
  const data = new DataTransfer();
  data.items.add(new File([text], "story.txt"));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


@pytest.fixture
def page(server: Server) -> Iterator[Any]:
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 900, "height": 700})
        problems: list[str] = []
        shown.on("pageerror", lambda e: problems.append(str(e)))
        asked: list[str] = []
        shown.on("request", lambda r: asked.append(r.url))
        shown.goto(server.url)
        yield shown
        browser.close()
    assert not problems
    assert all(url.startswith(server.url) for url in asked)  # nothing from outside


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")
    page.wait_for_function("document.getElementById('send').textContent === 'Send'")


def test_a_chat_on_the_page(page: Any, tmp_path: Path) -> None:
    say(page, "Who?")
    assert "API key" in page.inner_text(".facts.error")
    page.fill("#key", KEY)
    page.evaluate(DROP, STORY * 40)
    page.wait_for_selector("text=read with your next message")
    say(page, "Who?")
    facts = page.inner_text(".facts >> nth=-1")
    assert re.fullmatch(
        r"TTFT .* · \d+ % of the FFN work skipped · \d+ tokens cached", facts
    )
    answers = page.locator(".turn:not(.user)").all_inner_texts()
    assert answers[0] == "" != answers[1]
    page.uncheck("#sparse")
    say(page, "And who else?")
    assert " · dense · " in page.inner_text(".facts >> nth=-1")
    say(page, "/compare")
    columns = page.locator(".columns > div")
    said = columns.locator(".facts").all_inner_texts()
    assert columns.count() == 2 and "work skipped · 0 tokens" in said[0]
    assert "dense · 0 tokens cached" in said[1]
    assert page.locator("#history rect").count() == 4
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=Path(folder) / "page.png")
    say(page, "/reset")
    assert page.inner_text("#log") == ""

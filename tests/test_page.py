"""The page at `/` in headless Chromium, against a real server over a tiny model."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Served, serve

from edge_stream import Sampling
from edge_stream.engine import Engine

CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (Debian: apt install chromium)")

Page = Any

# What a random model may write: words for ever, in lines. With ( )+ it may also end, and did after 9,653 tokens.
TEXT = 'root ::= ([a-z]{1,6} " "){1,6} "\\n\\n" root'

HOSTILE = """\
<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1"> <b>not bold</b>

[a](javascript:window.hacked=1) [b](data:text/html,<script>window.hacked=1</script>) [c](//elsewhere.example/x)
![pixel](https://elsewhere.example/pixel.png) [d](JaVaScRiPt:window.hacked=1) <https://elsewhere.example>
[quote](https://elsewhere.example/"onmouseover="window.hacked=1)

<iframe srcdoc="<script>parent.hacked = 1</script>"></iframe><style>body { display: none }</style>

```html"><img src=x onerror=window.hacked=1>
</code></pre><script>window.hacked = 1</script>
```

| <svg onload=window.hacked=1> | b |
|---|---|
| <a href="javascript:window.hacked=1">x</a> | `<i>` |
"""

MARKDOWN = """\
# Title

Some **bold**, *italic*, ***both***, `a < b`, ~~gone~~
and [a link](https://example.org/a_(b)?c=d "title"), snake_case_name.
See https://example.org/x. <https://example.org> Not \\*this\\*; 2 * 3 * 4.

- one
- two
  1. inner
  2. more

     ```c
     int x;
     ```
- three

> said
> again

| a | b |
|---|--:|
| 1 | `2\\|3` |

---

```python
def f():

    return "**not bold**"
```
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """One Chromium for all tests."""
    with sync_api.sync_playwright() as playwright:
        # as root (in a container) Chromium has no sandbox; the pages are our own
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def engine(tiny: Callable[[str], Path]) -> Iterator[Engine]:
    """Two slots of 256 tokens."""
    with Engine.load(tiny("chat"), n_parallel=2, n_ctx=256, flash_attn="off", n_threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[Served]:
    """A server whose model writes words until it is stopped."""
    with serve(engine, sampling=Sampling(grammar=TEXT, seed=3)) as running:
        yield running


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Page]]:
    """open_page(served, **context options) -> the page in a new browser profile.

    After the test: nothing went wrong in the console, and no request left the server's origin.
    """
    contexts, wrong, foreign = [], [], []
    expected: list[str] = []

    def open_(served: Served, *, errors: tuple[str, ...] = (), **options: Any) -> Page:
        context = browser.new_context(**({"viewport": {"width": 1100, "height": 700}} | options))
        contexts.append(context)
        expected.extend(errors)
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda m: wrong.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda e: wrong.append(str(e)))
        context.on(
            "request",
            lambda r: None if r.url.startswith((served.url + "/", "blob:" + served.url)) else foreign.append(r.url),
        )
        page.goto(served.url)
        return page

    yield open_
    for context in contexts:
        context.close()
    assert [text for text in wrong if not any(re.search(e, text) for e in expected)] == []
    assert foreign == []


def settings(page: Page, **values: Any) -> None:
    """Set what the settings dialog offers."""
    page.click("#open-settings")
    for name, value in values.items():
        page.fill("#system" if name == "system" else f"#settings input[name={name}]", str(value))
    page.click("#settings >> text=Done")


def say(page: Page, text: str) -> None:
    """Send a message and wait until its answer is complete."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    done(page)


def done(page: Page) -> None:
    """Wait until nothing is being written."""
    page.wait_for_selector("#messages:not(.busy)")


def until(page: Page, expression: str, arg: Any = None) -> None:
    """Wait for something in the page (Playwright's own way needs eval, which the page's policy forbids)."""
    deadline = time.monotonic() + 30
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(10)


def texts(page: Page, who: str = "") -> list[str]:
    """What the messages say."""
    return page.locator(f"article{who} .body").all_inner_texts()  # type: ignore[no-any-return]


def stored(page: Page) -> list[dict[str, Any]]:
    """The conversations in the browser."""
    found = page.evaluate("Object.entries(localStorage).filter(([k]) => k.includes('conversation/')).map(([, v]) => v)")
    return [json.loads(value) for value in found]


def open_stored(page: Page, *contents: str) -> None:
    """Put a conversation into the browser and load the page again: user, assistant, user, ..."""
    messages, parent = [], None
    for i, content in enumerate(contents):
        role = ("user", "assistant")[i % 2]
        message = {"id": f"m{i}", "parent": parent, "role": role, "content": content, "state": "stop"}
        # what an answer's facts should not be: nothing of it may break the page
        message["info"] = {"tok_per_s": True, "n_past": "<b>", "history": "constructor", "n_written": [1]}
        messages.append(message)
        parent = f"m{i}"
    conversation = {"id": "stored", "title": "Stored", "messages": messages, "leaf": parent, "updated": 1}
    page.evaluate("v => localStorage.setItem('edge-stream/conversation/stored', v)", json.dumps(conversation))
    page.reload()


def test_sends_streams_and_keeps(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    settings(page, max_tokens=30, system="Be brief.")
    say(page, "One")
    page.fill("#prompt", "a")
    page.press("#prompt", "Shift+Enter")
    page.type("#prompt", "b")
    assert page.input_value("#prompt") == "a\nb"
    say(page, "Two\nlines")
    answers = texts(page, ".assistant")
    assert texts(page, ".user") == ["One", "Two\nlines"] and all(re.match("[a-z]", a) for a in answers)
    assert page.text_content("#g-history").startswith("Continued: ")
    assert page.text_content("#status").startswith("Answer: " + answers[1][:3])
    [kept] = stored(page)
    assert kept["title"] == "One" and kept["system"] == "Be brief."
    # the name in the header is the conversation's; the server was given the system prompt and the settings
    slots = served.client.get("/slots").json()
    assert kept["id"] in [slot.get("conversation") for slot in slots]
    assert all(m["info"]["n_written"] == 30 for m in kept["messages"] if m["role"] == "assistant")
    page.reload()
    assert texts(page, ".assistant") == answers
    say(page, "Three")
    assert page.text_content("#g-history").startswith("Continued: ")
    page.click("#new")
    assert page.locator("article").count() == 0
    say(page, "Another")
    assert page.locator("#conversations li").all_inner_texts() == ["Another", "One"]
    page.click("#conversations >> text=One")
    assert page.locator("article").count() == 6


def test_what_is_recalled_is_shown(engine: Engine, open_page: Callable[..., Page]) -> None:
    fact = "My friend Anna owns a blue <b>kite</b>."
    with serve(engine, sampling=Sampling(grammar=TEXT, seed=3), n_recall=64) as running:
        page = open_page(running)
        settings(page, max_tokens=20)
        hours = [text for i in range(20) for text in (f"The hour of the day is {i}.", "So it is.")]
        open_stored(page, fact, "I see.", *hours)
        assert page.locator(".recalled").count() == 0
        say(page, "What does my friend Anna own?")
        assert page.locator(".recalled").all_inner_texts() == [f"Recalled: 42 messages ago, you said “{fact}”"]
        page.reload()
        assert page.locator(".assistant .recalled").count() == 1


def test_stop_and_continue(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    page.fill("#prompt", "Go on and on")
    page.press("#prompt", "Enter")
    # endless: more than the cache holds, and the gauge shows it while it grows
    until(page, "Number(document.getElementById('g-seen').textContent.replace(',', '')) > 600")
    meter = page.locator("#meter")
    assert meter.get_attribute("aria-valuemax") == "256" and int(meter.get_attribute("aria-valuenow")) > 200
    assert float(page.text_content("#g-speed").replace(",", "")) > 0
    assert page.locator("#send").is_hidden()
    page.press("#prompt", "Escape")
    done(page)
    served.wait_idle()
    [first] = texts(page, ".assistant")
    assert "Stopped." in page.inner_text("article.assistant .foot")
    page.click("text=Continue")
    until(page, "n => document.querySelector('article.assistant .body').innerText.length > n", len(first))
    page.click("#stop")
    done(page)
    [longer] = texts(page, ".assistant")
    assert longer.startswith(first.rstrip()) and len(longer) > len(first)
    [kept] = stored(page)
    assert [m["state"] for m in kept["messages"][1:]] == ["stopped"]


def test_two_conversations_at_once(served: Served, open_page: Callable[..., Page]) -> None:
    """An answer goes on while another conversation is shown; deleting its conversation ends it."""
    page = open_page(served)
    for text in ("First", "Second"):
        page.click("#new")
        page.fill("#prompt", text)
        page.press("#prompt", "Enter")
        page.wait_for_selector("article.assistant .body > p")
    page.press("#prompt", "Escape")
    done(page)
    page.click("#conversations >> text=First")
    assert texts(page, ".user") == ["First"] and page.locator("#stop").is_visible()
    length = len(texts(page, ".assistant")[0])
    until(page, "n => document.querySelector('article.assistant .body').innerText.length > n", length)
    page.click("[aria-label=Delete]")
    served.wait_idle()  # the server was told
    assert texts(page, ".user") == ["Second"]
    page.wait_for_timeout(50)
    assert [c["title"] for c in stored(page)] == ["Second"]


def test_regenerate_and_edit_make_branches(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    settings(page, max_tokens=12)
    say(page, "One")
    say(page, "Two")
    [_, second] = texts(page, ".assistant")
    settings(page, seed=99)
    page.locator("text=Regenerate").last.click()
    done(page)
    assert texts(page, ".assistant")[1] != second
    assert page.text_content("#g-history").startswith("Branched ")
    assert "2/2" in page.locator(".branches").last.inner_text()
    page.locator("[aria-label='Previous version']").last.click()
    assert texts(page, ".assistant")[1] == second
    page.locator("article.user >> text=Edit").first.click()
    page.fill(".edit textarea", "Other")
    page.press(".edit textarea", "Enter")
    done(page)
    assert texts(page, ".user") == ["Other"]
    page.locator("[aria-label='Previous version']").first.click()
    assert texts(page, ".user") == ["One", "Two"]
    # an answer can be edited as well; nothing is asked of the server then
    page.locator("article.assistant >> text=Edit").last.click()
    page.fill(".edit textarea", "I say **this**.")
    page.click(".edit >> text=Save")
    assert texts(page, ".assistant")[1] == "I say this."
    page.locator("article.assistant >> text=Edit").last.click()
    page.press(".edit textarea", "Escape")
    assert texts(page, ".assistant")[1] == "I say this."


def test_rename_delete_export_import(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    open_stored(page, "Question", "Answer")
    page.click("[aria-label=Rename]")
    page.fill("#conversations input", "Renamed")
    page.press("#conversations input", "Enter")
    assert stored(page)[0]["title"] == "Renamed"
    with page.expect_download() as download:
        page.click("#export")
    path = download.value.path()
    exported = json.loads(path.read_text())
    page.click("[aria-label=Delete]")
    assert stored(page) == [] and page.locator("article").count() == 0
    page.click("text=Undo")
    assert texts(page) == ["Question", "Answer"]
    page.set_input_files("#import-file", {"name": "x.json", "mimeType": "", "buffer": json.dumps(exported).encode()})
    page.wait_for_selector("text=1 conversation was imported.")
    assert len({c["id"] for c in stored(page)}) == 2
    exported["conversations"][0]["messages"][1]["parent"] = "nowhere"
    for bad in (b"{", b"{}", json.dumps(exported).encode()):
        page.set_input_files("#import-file", {"name": "x.json", "mimeType": "", "buffer": bad})
        page.wait_for_selector("#notice:has-text('nothing was imported')")
        page.click("#notice [aria-label=Close]")
    assert len(stored(page)) == 2


def test_a_full_storage_costs_nothing_but_keeping(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    settings(page, max_tokens=8)
    page.evaluate("for (let n = 1 << 22; n; n >>= 1) try { localStorage['fill' + n] = 'x'.repeat(n) } catch {}")
    say(page, "Still there?")
    assert texts(page, ".assistant")[0]
    assert "storage is full" in page.inner_text("#notice")


def test_what_a_model_writes_is_inert(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    deep = ">" * 3000 + " " + "*a " * 2000 + "[" * 3000 + "`" * 2001 + "\n" + "- " * 3000
    open_stored(page, "<b>me</b>", HOSTILE, "Deep", deep)
    assert page.evaluate("window.hacked") is None
    inside = page.evaluate("[...document.querySelectorAll('.body *')].map(e => e.tagName)")
    assert not {"SCRIPT", "IMG", "IFRAME", "STYLE", "SVG", "B", "I", "OBJECT", "FORM"} & {t.upper() for t in inside}
    attributes = page.evaluate("[...document.querySelectorAll('.body *')].flatMap(e => e.getAttributeNames())")
    assert not [name for name in attributes if name.startswith("on") or name in ("src", "style", "srcdoc")]
    links = page.evaluate("[...document.querySelectorAll('.body a')].map(a => [a.protocol, a.rel, a.target])")
    assert links and all(link == ["https:", "noopener noreferrer", "_blank"] for link in links)
    assert texts(page, ".user")[0] == "<b>me</b>"
    assert "<script>window.hacked = 1</script>" in texts(page, ".assistant")[0]


def test_markdown(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    open_stored(page, "Show me", MARKDOWN)
    html = page.evaluate("document.querySelector('.assistant .body').innerHTML")
    plain = re.sub(r' (?:dir|class|tabindex|aria-label|role|title|type|data-info|target|rel)="[^"]*"', "", html)
    assert plain == (
        "<h3>Title</h3>"
        "<p>Some <strong>bold</strong>, <em>italic</em>, <strong><em>both</em></strong>, <code>a &lt; b</code>, "
        '<del>gone</del>\nand <a href="https://example.org/a_(b)?c=d">a link</a>, snake_case_name.\n'
        'See <a href="https://example.org/x">https://example.org/x</a>. '
        '<a href="https://example.org/">https://example.org</a> Not *this*; 2 * 3 * 4.</p>'
        '<ul><li>one</li><li>two<ol start="1"><li>inner</li><li>more'
        "<div><div><span>c</span><button>Copy</button></div><pre><code>int x;</code></pre></div></li></ol></li>"
        "<li>three</li></ul>"
        "<blockquote><p>said\nagain</p></blockquote>"
        "<div><table><thead><tr><th>a</th><th>b</th></tr></thead>"
        "<tbody><tr><td>1</td><td><code>2|3</code></td></tr></tbody></table></div>"
        "<hr>"
        "<div><div><span>python</span><button>Copy</button></div>"
        '<pre><code>def f():\n\n    return "**not bold**"</code></pre></div>'
    )
    # however a text arrives, it looks the same in the end
    same = page.evaluate(
        """async ([text]) => {
            const { MarkdownView } = await import("./markdown.js");
            return [1, 3, 7, 50].map((step) => {
                const root = document.createElement("div");
                const view = new MarkdownView(root);
                for (let i = step; i < text.length + step; i += step) view.update(text.slice(0, i));
                return root.innerHTML;
            });
        }""",
        [MARKDOWN],
    )
    assert same == [html] * 4
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.locator("[aria-label='Copy code']").last.click()
    page.wait_for_selector("text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f():\n\n    return "**not bold**"'


def test_errors_are_sentences_with_a_way_on(engine: Engine, open_page: Callable[..., Page]) -> None:
    with serve(engine, sampling=Sampling(grammar=TEXT, seed=3), api_keys=("secret",)) as served:
        page = open_page(served, errors=(r"status of (401|503|400)", "ERR_FAILED"))
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "wrong")
        page.press("#key-value", "Enter")
        page.wait_for_selector("text=does not know this key")
        page.fill("#key-value", "secret")
        page.press("#key-value", "Enter")
        page.wait_for_selector("#model:not(:empty)")
        settings(page, max_tokens=8)
        busy = {"error": {"code": 503, "message": "too many requests are waiting", "type": "unavailable_error"}}
        page.route(
            "**/v1/chat/completions",
            lambda r: r.fulfill(status=503, json=busy, headers={"Retry-After": "5"}),
            times=1,
        )
        say(page, "Hello")
        assert page.inner_text("#problem").startswith("Too many requests are waiting (try again in 5 s).")
        page.route("**/v1/chat/completions", lambda r: r.abort(), times=1)
        page.click("#problem >> text=Retry")
        page.wait_for_selector("text=The server cannot be reached")
        half = 'data: {"choices":[{"delta":{"content":"half"},"finish_reason":null}]}\n\n'
        page.route("**/v1/chat/completions", lambda r: r.fulfill(content_type="text/event-stream", body=half), times=1)
        page.click("#problem >> text=Retry")
        page.wait_for_selector("text=The connection ended before the answer was complete.")
        assert texts(page) == ["Hello", "half"]
        page.click("#problem >> text=Retry")
        done(page)
        assert page.inner_text("#problem") == "" and re.match("[a-z]", texts(page, ".assistant")[0])
        settings(page, temperature=101)  # the browser says no, and the dialog stays
        assert page.locator("#settings").is_visible()


def test_scrolling_up_stays_up(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    page.fill("#prompt", "Write")
    page.press("#prompt", "Enter")
    until(page, "document.getElementById('scroller').scrollTop > 300")
    go_on = threading.Event()  # a browser that gets little of the machine would meet the answer's end while it scrolls
    served.scheduler.call(lambda: go_on.wait(60))
    from_end = "(s => s.scrollHeight - s.clientHeight - s.scrollTop)(document.getElementById('scroller'))"
    page.mouse.move(600, 300)
    page.mouse.wheel(0, -250)
    page.wait_for_selector("#to-end:visible")
    position, top = "document.getElementById('scroller').scrollTop", None
    while top != (top := page.evaluate(position)):  # the wheel's scrolling is animated
        page.wait_for_timeout(150)
    seen = page.evaluate("document.body.innerText.length")
    go_on.set()
    until(page, "n => document.body.innerText.length > n + 1000", seen)
    assert page.evaluate(position) == top
    page.click("#to-end")
    until(page, f"{from_end} < 60")
    page.click("#stop")
    done(page)
    assert page.evaluate(from_end) < 2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_can_be_read_by_everybody(served: Served, open_page: Callable[..., Page], scheme: str) -> None:
    """axe finds nothing: contrast, names, roles, order of headings; with messages, a menu and dialogs."""
    from axe_playwright_python.sync_playwright import Axe

    page = open_page(served, color_scheme=scheme)
    open_stored(page, "Show me", MARKDOWN, "And?")
    page.wait_for_selector("#model:not(:empty)")

    def check() -> None:
        found = Axe().run(page).response["violations"]
        assert [(v["id"], n["html"][:200]) for v in found for n in v["nodes"]] == []

    check()
    page.click("#open-settings")
    check()
    page.keyboard.press("Escape")
    page.click("#theme")  # light
    page.click("#theme")  # dark, whatever the system says
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(20, 23, 22)"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_keyboard(served: Served, open_page: Callable[..., Page]) -> None:
    """The skip link is first and leads to the message field; every focus can be seen."""
    page = open_page(served)
    open_stored(page, "Question", "Answer")
    page.wait_for_selector("#model:not(:empty)")
    page.locator(".skip").focus()
    assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.ariaLabel ?? document.activeElement.innerText"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none", names
    for name in ("Settings", "New conversation", "Stored", "Delete", "Messages", "Edit answer", "Regenerate"):
        assert name in [n.strip() for n in names]
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_phone(served: Served, open_page: Callable[..., Page]) -> None:
    page = open_page(served, viewport={"width": 320, "height": 560}, has_touch=True)
    wide = "| a |" + " long heading |" * 9 + "\n|" + "---|" * 10 + "\n\n```\n" + "x" * 300 + "\n```\n" + "y" * 300
    open_stored(page, "z" * 200, MARKDOWN + wide)
    settings(page, max_tokens=8)

    def check() -> None:
        size = "[document.documentElement.scrollWidth, document.documentElement.scrollHeight, scrollX, scrollY]"
        assert page.evaluate(size) == [320, 560, 0, 0]  # only the messages scroll
        assert 0 < page.evaluate("document.getElementById('composer').getBoundingClientRect().bottom") <= 560
        assert page.evaluate("document.getElementById('scroller').scrollWidth") <= 320
        outside = """[...document.querySelectorAll('button, textarea, input, article, #gauge *')].filter((e) => {
            const r = e.getBoundingClientRect();
            return e.checkVisibility({visibilityProperty: true}) && (r.left < 0 || r.right > 320);
        }).map((e) => e.outerHTML.slice(0, 99))"""
        assert page.evaluate(outside) == []

    say(page, "Hello")
    check()
    assert page.locator("#nav").is_hidden()
    page.tap("#menu")
    until(page, "document.getElementById('nav').getBoundingClientRect().left === 0")
    check()
    page.keyboard.press("Escape")
    page.wait_for_selector("#nav", state="hidden")
    page.tap("#open-settings")
    check()

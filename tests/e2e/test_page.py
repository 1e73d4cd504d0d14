"""The page at `/` in a headless Chromium, over the real server and the bundled models."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")
import httpx
from playwright import sync_api
from playwright.sync_api import expect

from foretell.serve import page as page_module
from foretell.serve.build import build
from helpers_serve import running, until

pytestmark = pytest.mark.e2e
CHROMIUM = next(
    filter(
        None,
        [
            os.environ.get("FORETELL_CHROMIUM"),
            *map(shutil.which, ("chromium", "chromium-browser", "google-chrome")),
        ],
    ),
    None,
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
TOUCH = 44  # pixels that a finger needs


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    service, app = build({"policy": "fixed", "threads": 1})
    with running(service, app) as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on the PATH (chromium, google-chrome) nor in FORETELL_CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield made
        made.close()


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any, server: str) -> Iterator[Open]:
    """Opens the page; at the end there was no error on its console and no request elsewhere."""
    contexts, wrong = [], []

    def go(url: str = server, expected: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "console",
            lambda m: (
                wrong.append(m.text)
                if m.type in ("error", "warning") and not (expected and expected in m.text)
                else None
            ),
        )
        page.on(
            "request",
            lambda r: None if r.url.startswith(url) else wrong.append(f"outside: {r.url}"),
        )
        page.goto(url)
        return page

    yield go
    for context in contexts:
        context.close()
    assert wrong == []


def connected(page: Any) -> Any:
    expect(page.locator("#drafter option")).not_to_have_count(0)
    return page


def settle(
    page: Any, prompt: str = "The old man", tokens: int = 40, temperature: str = "0"
) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Max tokens").fill(str(tokens))
    page.get_by_label("Temperature").fill(temperature)


def stats(server: str) -> dict[str, Any]:
    return httpx.get(f"{server}/v1/foretell/stats").json()


# The playground


def test_a_prompt_becomes_a_coloured_stream(visit: Open, server: str) -> None:
    page = connected(visit())
    settle(page)
    page.get_by_label("Prompt").press("Control+Enter")
    expect(page.get_by_role("status").first).to_contain_text("40 tokens")
    answer = page.locator("#answer")
    body = {"prompt": "The old man", "max_tokens": 40, "temperature": 0}
    whole = httpx.post(f"{server}/v1/completions", json={**body, "foretell": True}).json()
    choice = whole["choices"][0]
    assert answer.text_content() == choice["text"]
    drafted = choice["foretell"]["drafted"]
    assert page.locator("#answer .drafted").count() == sum(drafted) > 0
    assert page.locator("#answer .own").count() == len(drafted) - sum(drafted)
    assert answer.get_attribute("aria-busy") == "false"
    # readable without colour: drafted tokens are underlined, the model's own are not
    line = "e => getComputedStyle(e).textDecorationLine"
    assert page.locator("#answer .drafted").first.evaluate(line) == "underline"
    assert page.locator("#answer .own").first.evaluate(line) == "none"
    assert page.locator("#f-tokens").text_content() == "40"
    length = whole["speculation"]["acceptance_length"]
    assert float(page.locator("#f-length").text_content()) == pytest.approx(length, abs=0.006)
    expect(page.locator("#chart-speed .line").first).to_have_attribute("d", re.compile(r"^M.*L"))
    expect(page.locator("#chart-batch")).to_have_attribute("aria-label", re.compile("Batch size: "))


def test_chat(visit: Open) -> None:
    page = connected(visit())
    settle(page, "Say something.", 20)
    page.get_by_role("radio", name="Chat").check()
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("tokens,")
    assert page.locator("#answer span").count() > 0


def test_the_drafter_is_switched(visit: Open, server: str) -> None:
    page = connected(visit())
    offer = httpx.get(f"{server}/v1/foretell/methods").json()
    names = page.locator("#drafter option").all_text_contents()
    assert names == [f"{offer['default']} (default)", "prompt-lookup", "suffix", "off"]
    settle(page, "one two three one two three one two", 30)
    texts = []
    for choice, some in ((offer["default"], True), ("off", False), ("prompt-lookup", True)):
        option = "" if choice == offer["default"] else choice
        page.get_by_label("Drafter").select_option(option)
        page.get_by_role("button", name="Generate").click()
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        expect(page.locator("#status")).to_contain_text("30 tokens")
        assert (page.locator("#answer .drafted").count() > 0) is some, choice
        texts.append(page.locator("#answer").text_content())
        if not some:
            assert "one token a step" in page.locator("#drafter-note").text_content()
            assert page.locator("#f-length").text_content() == "1.00"
    assert len(set(texts)) == 1, "the drafter changed the text"


def test_stop(visit: Open, server: str) -> None:
    page = connected(visit())
    settle(page, tokens=1900)
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), None):
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#answer span").nth(5)).to_be_attached()
        stop() if stop else page.keyboard.press("Escape")
        expect(page.locator("#status")).to_have_text("Stopped.")
        until(lambda: stats(server)["running"] == 0)
        assert page.locator("#answer span").count() < 1900
        expect(page.get_by_role("button", name="Generate")).to_be_enabled()


@pytest.mark.parametrize("temperature", ["0", "0.8"])
def test_off_and_on_say_the_same(visit: Open, temperature: str) -> None:
    page = connected(visit())
    settle(page, tokens=60, temperature=temperature)
    page.get_by_role("button", name="Compare off and on").click()
    expect(page.locator("#verdict")).to_contain_text("Identical: all")
    assert page.locator("#off").text_content() == page.locator("#on").text_content() != ""
    assert page.locator("#off .drafted").count() == 0
    assert page.locator("#on .drafted").count() > 0
    for name in ("off", "on"):
        assert re.match(r"[\d.]+ tokens per second", page.locator(f"#{name}-speed").text_content())
    assert "times the speed of off" in page.locator("#verdict").text_content()


def fake(tokens: list[tuple[int, str]], promise: str = "exact") -> str:
    """An event stream that says these tokens."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"text": t, "finish_reason": None, "foretell": {"token": i, "drafted": True}}]}
        for i, t in tokens
    ]
    last = {"choices": [], "speculation": {"promise": promise, "acceptance_length": 2.0}}
    lines = [f"data: {json.dumps(c)}\n\n" for c in [*chunks, last]]
    return "".join([*lines, "data: [DONE]\n\n"])


def test_a_difference_is_told(visit: Open) -> None:
    page = connected(visit())
    answers = [fake([(1, "a"), (2, "b")]), fake([(1, "a"), (3, "b")], "lossless")]
    kind = {"content-type": "text/event-stream"}
    page.route("**/v1/completions", lambda r: r.fulfill(body=answers.pop(0), headers=kind))
    page.get_by_role("button", name="Compare off and on").click()
    expect(page.locator("#verdict")).to_contain_text("Different from token 2 on")
    expect(page.locator("#verdict")).to_contain_text("lossless, not exact")


def test_what_a_model_says_is_never_markup(visit: Open) -> None:
    page = connected(visit())
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    body = fake([(1, text)])
    kind = {"content-type": "text/event-stream"}
    page.route("**/v1/completions", lambda r: r.fulfill(body=body, headers=kind))
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#answer")).to_have_text(text)
    assert page.locator("#answer img, #answer b").count() == 0


def test_refusals_are_sentences(visit: Open) -> None:
    page = connected(visit(expected="400"))
    settle(page, "word " * 5000)
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("shorten it")
    page.get_by_label("Prompt").fill("")
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_contain_text("The prompt is empty")


def test_a_server_that_breaks_off(visit: Open) -> None:
    page = connected(visit())
    kind = {"content-type": "text/event-stream"}
    body = fake([(1, "one")]).replace("data: [DONE]\n\n", "")
    page.route("**/v1/completions", lambda r: r.fulfill(body=body, headers=kind))
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_have_text("The server broke off.")
    expect(page.locator("#answer")).to_have_text("one")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()


def test_a_key_is_asked_for_and_kept_in_the_tab(visit: Open, server: str) -> None:
    from foretell.engine.llm import LLM
    from foretell.serve.app import make_app
    from foretell.serve.service import Service

    service = Service(LLM.load(policy="fixed"))
    with running(service, make_app(service, names=["m"], api_keys=["secret"])) as url:
        page = visit(url, expected="401")
        expect(page.locator("#model")).to_have_text("an API key is needed")
        key = page.get_by_label("API key")
        expect(key).to_be_visible()  # opened by itself
        key.fill("wrong")
        key.press("Tab")
        expect(page.get_by_role("alert")).to_contain_text("not known")
        key.fill("secret")
        key.press("Tab")
        expect(page.locator("#model")).to_have_text("m")
        expect(page.get_by_role("alert")).to_be_hidden()
        assert page.evaluate("sessionStorage.getItem('foretell-key')") == "secret"
        assert page.evaluate("localStorage.length") == 0
        assert page.evaluate("document.cookie") == ""
        page.reload()
        expect(page.locator("#model")).to_have_text("m")


# For everybody


@pytest.mark.parametrize("width", [320, 768])
def test_phones(visit: Open, width: int) -> None:
    size = {"width": width, "height": 700}
    page = connected(visit(viewport=size, has_touch=True, is_mobile=True))
    settle(page, tokens=30)
    page.get_by_role("button", name="Compare off and on").tap()
    expect(page.locator("#verdict")).to_contain_text("Identical")
    widest = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    assert widest[0] <= width
    assert widest[1] == width, "something made the page wider than the phone"
    for box in page.locator("button, select, input[type=number], summary, .modes label").all():
        assert box.bounding_box()["height"] >= TOUCH - 0.5, box.evaluate("e => e.outerHTML")


def luminance(rgb: str) -> float:
    parts = [float(v) / 255 for v in re.findall(r"[\d.]+", rgb)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


COLOURS = """elements => elements.filter(e => e.offsetParent).map(e => {
  let paper = e;
  const clear = () => getComputedStyle(paper).backgroundColor === "rgba(0, 0, 0, 0)";
  while (clear()) paper = paper.parentElement;
  return [getComputedStyle(e).color, getComputedStyle(paper).backgroundColor, e.outerHTML];
})"""
READ = ".drafted, .own, .hint, .status, h1, h2, dt, dd, label, button:enabled, figcaption, a"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit: Open, scheme: str) -> None:
    page = connected(visit(color_scheme=scheme))
    settle(page, tokens=30)
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#status")).to_contain_text("30 tokens")
    found = page.eval_on_selector_all(READ, COLOURS)
    assert len(found) > 40
    for ink, paper, what in found:
        light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, paper, what[:100])
    page_itself = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(page_itself) < 0.2) is (scheme == "dark")


def test_a_keyboard_reaches_everything(visit: Open) -> None:
    page = connected(visit())
    page.locator("body").evaluate("() => document.activeElement.blur()")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    order = ["mode", "prompt", "run", "ab", "drafter", "temperature", "tokens", "seed", "answer"]
    places = [reached.index(name) for name in order]
    assert places == sorted(places), reached
    names = ("Prompt", "Drafter", "Temperature", "Max tokens", "Seed")
    for name in names:
        assert page.get_by_label(name, exact=True).count() == 1, name
    roles = [("main", None), ("heading", "foretell"), ("button", "Stop")]
    for role, name in roles:
        assert page.get_by_role(role, name=name).count() == 1, role
    assert page.locator("svg[role=img][aria-label]").count() == 3
    assert page.locator("html").get_attribute("lang") == "en"


# The files


def test_files_and_headers(server: str) -> None:
    with httpx.Client(base_url=server) as client:
        for path in ("/", "/page/page.js", "/page/page.css", "/page/icon.svg"):
            answer = client.get(path)
            assert answer.status_code == 200
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "*" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            tag = {"if-none-match": answer.headers["etag"]}
            assert client.get(path, headers=tag).status_code == 304
            assert client.head(path).status_code == 200
        for path in ("/page/", "/page/nothing", "/page/..%2fservice.py", "/page/%2e%2e/page.py"):
            assert client.get(path).status_code == 404


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    folder = Path(page_module.__file__).with_name("page")
    html = (folder / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", html)
    for file in folder.iterdir():
        assert file.name in page_module.FILES
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|\beval\b|innerHTML", text), file.name

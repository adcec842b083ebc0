"""The page in headless Chromium: the real server with a script in the model's place, and once with a model."""

import asyncio
import os
import re
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest
from aiohttp import web

from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.request import Result, ToolCall
from nanochat_jax.infer.scheduler import QueueFull, Scheduler
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.weights import init_params
from nanochat_jax.serve import server
from nanochat_jax.serve.chat_request import Sampling
from nanochat_jax.tokenizer import Tokenizer

playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright_api.expect

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
INFO = {"name": "sft d4, step 60", "source": "sft", "tag": "d4", "step": 60, "context": 2048}
HOLD = object()  # in a reply: wait until the script's `go_on` is set or the reply is cancelled

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH")


class Script:
    """Stands in for the scheduler: each request is given the next of `replies`, or refused if that is an exception."""

    num_active = num_waiting = 0

    def __init__(self):
        self.replies, self.requests, self.cancelled, self.go_on = [], [], 0, threading.Event()

    def submit(self, request):
        self.requests.append(request)
        reply = self.replies.pop(0) if self.replies else ["Yes."]
        if isinstance(reply, Exception):
            raise reply
        return ScriptedHandle(self, reply)

    def submit_all(self, requests):
        return [self.submit(request) for request in requests]

    @property
    def prompts(self):
        return [TOKENIZER.decode(request.tokens) for request in self.requests]


class ScriptedHandle:
    def __init__(self, script, events):
        self.script, self.events, self.is_cancelled, self.is_done = script, events, False, False

    def cancel(self):
        if not self.is_done and not self.is_cancelled:
            self.is_cancelled = True
            self.script.cancelled += 1

    async def __aiter__(self):
        for event in self.events:
            while event is HOLD and not self.is_cancelled and not self.script.go_on.is_set():
                await asyncio.sleep(0.01)
            if self.is_cancelled:
                break
            if isinstance(event, Exception):
                raise event
            if event is not HOLD:
                yield event
                await asyncio.sleep(0.002)
        self.is_done = True
        yield Result([1], [True], "cancelled" if self.is_cancelled else "stop", "", 3)


class Served:
    """The server in a thread of its own; `stop` and `start` again keep the port."""

    def __init__(self, scheduler, **options):
        self.scheduler, self.port = scheduler, 0
        self.options = {"max_len": 2**17, "num_slots": 2, "defaults": Sampling()} | options
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.start()

    def start(self):
        async def start():
            app = server.create_app(self.scheduler, TOKENIZER, INFO, **self.options)
            self.runner = web.AppRunner(app, **server.runner_options() | {"shutdown_timeout": 0.1})
            await self.runner.setup()
            sock = server.bind("127.0.0.1", self.port)
            self.port = sock.getsockname()[1]
            await web.SockSite(self.runner, sock).start()

        self._wait(start())

    def stop(self):
        self._wait(self.runner.cleanup())

    def close(self):
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def _wait(self, work):
        asyncio.run_coroutine_threadsafe(work, self.loop).result(30)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/"


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture
def served():
    served = Served(Script())
    yield served
    served.close()


@pytest.fixture
def script(served):
    return served.scheduler


@pytest.fixture
def open_page(browser, served):
    """Makes pages of one browser profile; at the end nothing may have gone wrong in them, nor left for elsewhere."""
    problems, context = [], browser.new_context(viewport={"width": 1200, "height": 800})
    context.grant_permissions(["clipboard-read", "clipboard-write"])

    def answer(dialog):
        if dialog.message.startswith("Delete all conversations"):
            return dialog.accept()
        problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def watch(page):
        page.on("pageerror", lambda error: problems.append(f"error: {error}"))
        page.on("dialog", answer)
        page.on("console", lambda message: re.search(r"Content Security|\[DOM\]", message.text)
                and problems.append(message.text))
        page.on("request", lambda request: request.url.startswith(served.url) or problems.append(request.url))

    context.on("page", watch)

    def open_page(**emulate):
        page = context.new_page()
        page.set_default_timeout(8000)
        if emulate:
            page.emulate_media(**emulate)
        page.goto(served.url)
        expect(page.locator("#model")).to_have_text(INFO["name"])
        return page

    open_page.problems = problems
    yield open_page
    context.close()
    assert problems == []


@pytest.fixture
def page(open_page):
    return open_page()


def send(page, text):
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def replies(page):
    return page.locator(".reply")


def show(page, script, markdown, text="Go on"):
    """The reply that the Markdown (or list of events) becomes."""
    script.replies.append([markdown] if isinstance(markdown, str) else markdown)
    send(page, text)
    expect(page.locator("#send")).to_be_visible()
    return replies(page).last


def test_text_appears_while_it_is_written(page, script):
    script.replies.append(["The sky ", "is ", HOLD, "blue."])
    send(page, "Why is the sky blue?")
    expect(page.locator(".user")).to_have_text("Why is the sky blue?")
    expect(replies(page)).to_have_text("The sky is")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.get_by_role("button", name="Regenerate")).to_have_count(0)
    script.go_on.set()
    expect(replies(page)).to_have_text("The sky is blue.")
    expect(page.locator("#send")).to_be_visible()
    assert script.prompts == ["<|bos|><|user_start|>Why is the sky blue?<|user_end|><|assistant_start|>"]


def test_shift_enter_starts_a_new_line(page, script):
    page.locator("#input").fill("one")
    page.locator("#input").press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.locator(".user")).to_have_text("one\ntwo", use_inner_text=True)


def test_a_message_that_is_too_long_is_told_before_it_is_sent(page, script):
    send(page, "x" * 8001)
    expect(page.locator("#too-long")).to_have_text("8001 characters: a message has at most 8000.")
    expect(page.locator("#input")).to_have_value("x" * 8001)
    expect(page.locator("#send")).to_be_disabled()
    send(page, "🙂" * 8000)
    expect(replies(page)).to_have_text("Yes.")
    assert len(script.requests) == 1


def test_a_conversation_over_the_servers_limit_goes_on_without_its_beginning(page, script):
    for count in range(5):
        expect(show(page, script, "Yes.", f"{count}" * 7500)).to_have_text("Yes.")
        expect(replies(page)).to_have_count(count + 1)
    expect(page.get_by_text("The first 2 messages no longer fit")).to_be_visible()


@pytest.mark.parametrize("reply", [["x" * 9000], ["y" * 33000], [ToolCall("1", "1")] * 501], ids=["long", "longest", "parts"])
def test_a_conversation_goes_on_after_a_reply_of_any_length(page, script, reply):
    show(page, script, reply)
    send(page, "And then?")
    expect(replies(page).last).to_have_text("Yes.")
    expect(page.get_by_text("The first 2 messages no longer fit")).to_have_count(int(reply[0] == "y" * 33000))
    assert ("x" * 9000 in script.prompts[-1]) == (reply == ["x" * 9000])


@pytest.mark.parametrize("how", ["button", "Escape"])
def test_stop_ends_the_generation_and_keeps_what_came(page, script, how):
    script.replies.append(["Once upon", HOLD, " a time"])
    send(page, "A story")
    expect(replies(page)).to_have_text("Once upon")
    if how == "button":
        page.locator("#stop").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(replies(page)).to_have_text("Once upon")
    wait_until(lambda: script.cancelled == 1)
    send(page, "Go on")
    expect(replies(page).last).to_have_text("Yes.")
    assert "<|assistant_start|>Once upon<|assistant_end|>" in script.prompts[-1]


def test_regenerate_asks_the_same_again(page, script):
    script.replies += [["First."], ["Second."]]
    send(page, "Hello")
    expect(replies(page)).to_have_text("First.")
    page.get_by_role("button", name="Regenerate").click()
    expect(replies(page)).to_have_text("Second.")
    expect(replies(page)).to_have_count(1)
    assert script.prompts[0] == script.prompts[1]


def test_editing_starts_again_from_that_message(page, script):
    script.replies += [["One."], ["Two."], ["Three."]]
    send(page, "first")
    expect(replies(page).last).to_have_text("One.")
    send(page, "second")
    expect(replies(page).last).to_have_text("Two.")
    page.locator(".message").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    expect(page.locator("#input")).to_have_value("first")
    expect(page.locator(".message.later")).to_have_count(3)
    send(page, "other")
    expect(replies(page).last).to_have_text("Three.")
    expect(page.locator(".user")).to_have_text(["other"])
    assert script.prompts[-1] == "<|bos|><|user_start|>other<|user_end|><|assistant_start|>"


def test_up_edits_the_last_message_and_escape_gives_it_up(page, script):
    send(page, "first")
    expect(replies(page)).to_have_text("Yes.")
    page.locator("#input").press("ArrowUp")
    expect(page.locator("#input")).to_have_value("first")
    page.keyboard.press("Escape")
    expect(page.locator("#input")).to_have_value("")
    expect(page.locator(".user")).to_have_text(["first"])


def test_what_was_typed_is_there_again_after_an_edit_or_another_conversation(page, script):
    box = page.locator("#input")
    show(page, script, "Yes.", "cats")
    for leave in (lambda: page.keyboard.press("Escape"), lambda: send(page, "/topk 7"), lambda: send(page, "cats"),
                  lambda: page.get_by_role("button", name="Regenerate").click()):
        box.fill("draft")
        page.get_by_role("button", name="Edit").last.click()
        expect(box).to_have_value("cats")
        leave()
        expect(page.locator("#editing")).to_be_hidden()
        expect(box).to_have_value("draft")
        expect(page.locator("#send")).to_be_visible()
    page.locator("#new").click()
    box.fill("about dogs")
    open_chat = page.locator("#conversations li > button").first
    open_chat.click()
    expect(box).to_have_value("draft")
    page.get_by_role("button", name="Edit").click()
    box.fill("cats, please")
    page.locator("#new").click()
    expect(box).to_have_value("about dogs")
    open_chat.click()
    expect(box).to_have_value("cats, please")
    expect(page.locator("#editing")).to_be_visible()
    page.keyboard.press("Escape")
    expect(box).to_have_value("draft")
    page.locator("#new").click()
    send(page, "dogs")
    expect(page.locator("#send")).to_be_visible()
    page.locator("#new").click()
    expect(box).to_have_value("")
    box.fill("draft")
    page.get_by_role("button", name="Write a short poem.").click()
    expect(replies(page)).to_have_text("Yes.")
    expect(box).to_have_value("draft")


def test_a_command_ends_an_edit_and_nothing_is_cut(page, script):
    show(page, script, "One.", "first")
    page.get_by_role("button", name="Edit").click()
    send(page, "/temperature 0.5")
    expect(page.locator(".note")).to_have_text("temperature is now 0.5.")
    show(page, script, "Two.", "second")
    expect(page.locator(".user")).to_have_text(["first", "second"])


def test_a_reload_keeps_the_conversation_and_the_model_is_sent_it(page, script):
    script.replies.append([ToolCall("2+2", "4"), "It is 4."])
    send(page, "What is 2+2?")
    expect(replies(page)).to_contain_text("It is 4.")
    page.reload()
    expect(page.locator(".user")).to_have_text("What is 2+2?")
    expect(page.locator(".tool")).to_have_text("2+2 = 4")
    send(page, "Sure?")
    expect(replies(page).last).to_have_text("Yes.")
    assert "<|python_start|>2+2<|python_end|><|output_start|>4<|output_end|>It is 4." in script.prompts[-1]


def test_a_page_closed_while_a_reply_is_written_keeps_what_came(page, script):
    script.replies.append(["a", HOLD])
    send(page, "Hello")
    expect(replies(page)).to_have_text("a")
    page.reload()
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.locator(".user")).to_have_text("Hello")
    wait_until(lambda: script.cancelled == 1)


def test_conversations_are_kept_apart(page, script):
    send(page, "about cats")
    expect(replies(page)).to_have_text("Yes.")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("#welcome")).to_be_visible()
    send(page, "about dogs")
    expect(replies(page)).to_have_text("Yes.")
    assert "cats" not in script.prompts[-1]
    titles = page.locator("#conversations li > button:first-child")
    expect(titles).to_have_text(["about dogs", "about cats"])
    titles.last.click()
    expect(page.locator(".user")).to_have_text("about cats")
    page.get_by_role("button", name="Delete this conversation").last.click()
    expect(titles).to_have_text(["about dogs"])
    expect(page.locator("#welcome")).to_be_visible()
    page.reload()
    expect(titles).to_have_text(["about dogs"])


def test_a_deleted_conversation_can_be_had_back(page, script):
    send(page, "about cats")
    expect(replies(page)).to_have_text("Yes.")
    page.get_by_role("button", name="Delete this conversation").click()
    expect(page.locator("#welcome")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".user")).to_have_text("about cats")
    page.reload()
    expect(page.locator(".user")).to_have_text("about cats")


def test_all_conversations_are_deleted_at_once(page, script):
    for text in ("about cats", "about dogs"):
        page.locator("#new").click()
        send(page, text)
        expect(replies(page)).to_have_text("Yes.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Delete all conversations").click()
    expect(page.locator("#conversations")).to_have_text("None yet.")
    assert page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith('nanochat.chat'))") == []


def test_a_reply_goes_on_in_its_own_conversation_while_another_is_shown(page, script):
    script.replies += [["slow ", HOLD, "answer"], ["quick answer"]]
    send(page, "slow question")
    expect(replies(page)).to_have_text("slow")
    page.locator("#new").click()
    send(page, "quick question")
    expect(replies(page)).to_have_text("quick answer")
    script.go_on.set()
    page.get_by_role("button", name="slow question", exact=True).click()
    expect(replies(page)).to_have_text("slow answer")


def test_another_tab_sees_a_new_conversation(open_page, script):
    one, other = open_page(), open_page()
    send(one, "said in one tab")
    expect(other.get_by_role("button", name="said in one tab", exact=True)).to_be_visible()


def test_damaged_storage_is_left_out(page, script):
    page.evaluate("""() => {
      localStorage.setItem("nanochat.chat.a", "{");
      localStorage.setItem("nanochat.chat.b", JSON.stringify({ id: "b", title: "b", turns: [{ role: "assistant" }] }));
      localStorage.setItem("nanochat.chat.c", JSON.stringify({ id: "c", title: "whole", turns: [{ role: "user",
        text: "whole" }] }));
      localStorage.setItem("nanochat.settings", "[[");
    }""")
    page.reload()
    expect(page.locator("#conversations li > button:first-child")).to_have_text(["whole"])
    send(page, "Hello")
    expect(replies(page)).to_have_text("Yes.")


def test_full_storage_is_told_and_the_chat_goes_on(page, script):
    page.evaluate("""() => {
      for (let size = 2 ** 22; size >= 1; size /= 2) {
        try { for (let at = 0; ; at++) localStorage.setItem(`x${size}.${at}`, "x".repeat(size)); } catch { continue; }
      }
    }""")
    send(page, "Hello")
    expect(replies(page)).to_have_text("Yes.")
    expect(page.get_by_text("This browser keeps no more")).to_be_visible()


def test_slash_commands_set_what_is_sent(page, script):
    send(page, "/temperature 0.25")
    expect(page.locator(".note").last).to_have_text("temperature is now 0.25.")
    send(page, "/topk 7")
    send(page, "/topk 201")
    expect(page.locator(".note").last).to_have_text("topk must be a whole number from 0 to 200, not 201.")
    send(page, "/help")
    expect(page.locator(".note").last).to_contain_text("/clear")
    send(page, "/nothing")
    expect(page.locator(".note").last).to_contain_text("no command /nothing")
    send(page, "Hello")
    expect(replies(page)).to_have_text("Yes.")
    assert (script.requests[-1].temperature, script.requests[-1].top_k) == (0.25, 7)
    assert "temperature" not in script.prompts[-1]
    send(page, "/clear")
    expect(page.locator("#welcome")).to_be_visible()


def test_settings_are_sent_and_survive_a_reload(page, script):
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#model-info")).to_contain_text("2048 tokens")
    expect(page.locator("#set-temperature")).to_have_attribute("placeholder", "0.8")
    for name, value in (("temperature", "1.5"), ("topk", "3"), ("length", "99")):
        page.locator(f"#set-{name}").fill(value)
        page.locator(f"#set-{name}").blur()
    page.locator("#set-temperature").fill("9")
    page.locator("#set-temperature").blur()
    page.keyboard.press("Escape")
    page.reload()
    send(page, "Hello")
    expect(replies(page)).to_have_text("Yes.")
    request = script.requests[-1]
    assert (request.temperature, request.top_k, request.max_tokens) == (1.5, 3, 99)
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("button", name="Back to the server's defaults").click()
    page.get_by_role("button", name="Close").click()
    send(page, "Hello")
    expect(replies(page)).to_have_text(["Yes.", "Yes."])
    assert script.requests[-1] == replace(request, **{name: getattr(script.requests[-1], name) for name in
                                                      ("tokens", "seed")}, temperature=0.8, top_k=50, max_tokens=512)


def test_an_emptied_setting_is_the_servers_default_again(page, script):
    page.get_by_role("button", name="Settings").click()
    field, told = page.locator("#set-length"), page.locator("#now-length")
    for value, said in (("99", "Your choice."), ("", "The server's default.")):
        field.fill(value)
        field.blur()
        expect(told).to_have_text(said)
        assert field.evaluate("(node) => node.validity.valid")
    field.press_sequentially("-")  # no number, and not empty
    field.blur()
    assert not field.evaluate("(node) => node.validity.valid")
    page.keyboard.press("Escape")
    show(page, script, "Yes.")
    assert script.requests[-1].max_tokens == 512


@pytest.mark.parametrize("context, longest", [(256, "256"), (8192, "4096")])
def test_no_more_tokens_are_offered_than_the_models_context(page, script, monkeypatch, context, longest):
    monkeypatch.setitem(INFO, "context", context)
    page.reload()
    page.get_by_role("button", name="Settings").click()
    expect(page.locator("#model-info")).to_contain_text(f"{context} tokens")
    expect(page.locator("#set-length")).to_have_attribute("max", longest)
    expect(page.locator("#set-length")).to_have_attribute("placeholder", str(min(512, context)))
    expect(page.locator("#settings")).to_contain_text(f"The most tokens of a reply, up to {longest}.")
    page.keyboard.press("Escape")
    send(page, f"/length {int(longest) + 1}")
    expect(page.locator(".note")).to_have_text(f"length must be a whole number from 1 to {longest}, not {int(longest) + 1}.")
    send(page, "/help")
    expect(page.locator(".note").last).to_contain_text(f"/length [1 to {longest}]")


def test_an_api_key_is_asked_for_and_sent_as_a_bearer_token(page):
    page.route("**/chat/completions", lambda route: route.fulfill(status=401, json={"detail": "no key"}), times=1)
    send(page, "Hello")
    expect(page.locator(".error")).to_contain_text("This server asks for an API key: enter it in the settings.")
    page.get_by_role("button", name="Settings").click()
    page.locator("#set-key").fill("secret")
    page.locator("#set-key").press("Enter")
    expect(page.locator("#settings")).to_be_hidden()
    with page.expect_request("**/chat/completions") as request:
        send(page, "Hello")
    assert request.value.headers["authorization"] == "Bearer secret"


def test_a_busy_server_is_told_in_words_and_asked_again(page, script):
    script.replies += [QueueFull("64 requests wait already"), ["Now."]]
    send(page, "Hello")
    expect(page.locator(".error")).to_contain_text("The server cannot take more right now. 64 requests wait already")
    page.get_by_role("button", name="Try again").click()
    expect(replies(page)).to_have_text("Now.")
    expect(page.locator(".error")).to_have_count(0)
    assert script.prompts[0] == script.prompts[1]


def test_a_server_that_is_gone_is_told_until_it_is_back(page, served):
    page.set_viewport_size({"width": 375, "height": 700})  # where the banner takes two lines
    show(page, served.scheduler, "line\n\n" * 40)
    served.stop()
    send(page, "Hello")
    expect(page.locator(".error")).to_contain_text("The message could not be sent.")
    expect(page.get_by_text("The server cannot be reached.")).to_have_count(1)
    expect(page.locator("#gone")).to_be_visible()
    expect(page.get_by_role("button", name="Try again")).to_be_in_viewport()
    served.start()
    expect(page.locator("#gone")).to_be_hidden()
    page.get_by_role("button", name="Try again").click()
    expect(replies(page).last).to_have_text("Yes.")


def test_a_reply_that_breaks_off_keeps_what_came(page, script):
    script.replies.append(["Half a ", RuntimeError("boom")])
    send(page, "Hello")
    expect(page.locator(".error")).to_contain_text("The generation failed")
    expect(replies(page)).to_have_text("Half a")


def test_an_empty_reply_is_told(page, script):
    show(page, script, [])
    expect(page.get_by_text("The model had nothing to say.")).to_be_visible()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()


def test_markdown_becomes_elements(page, script):
    reply = show(page, script, "\n".join([
        "# Title", "**bold**, *italic*, `code`, ~~gone~~ and 2*3*4", "", "1. one", "2. two", "   - inner", "",
        "> quoted", "", "| a | b |", "|:--|--:|", "| 1 | **2** |", "", "---", "[site](https://example.org/x)",
    ]))
    for selector, text in {
        "h3": "Title", "strong >> nth=0": "bold", "em": "italic", "p > code": "code", "s": "gone", "ol > li >> nth=0":
        "one", "ol > li ul > li": "inner", "blockquote p": "quoted", "th >> nth=1": "b", "td.right strong": "2",
        "a": "site (example.org)",
    }.items():
        expect(reply.locator(selector)).to_have_text(text)
    expect(reply).to_contain_text("2*3*4")
    expect(reply.locator("hr")).to_have_count(1)


def test_code_is_coloured_and_copied_as_it_was_written(page, script):
    code = 'def f(x):\n    # <b>no</b>\n    return "s" + str(12)'
    reply = show(page, script, f"Look:\n```python\n{code}\n```\nDone.")
    colours = {"keyword": "def", "comment": "# <b>no</b>", "string": '"s"', "number": "12", "call": "f"}
    for kind, text in colours.items():
        expect(reply.locator(f".hl-{kind}").first).to_have_text(text)
    assert reply.locator("pre").inner_text() == code
    reply.get_by_role("button", name="Copy").click()
    expect(reply.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == code


def test_tool_calls_show_expression_and_result(page, script):
    reply = show(page, script, [ToolCall("345+678", "1023"), "It is 1023, not ", ToolCall("1/0", None), "."])
    expect(reply.locator(".tool")).to_have_text(["345+678 = 1023", "1/0 = no result"])
    expect(reply).to_have_text("345+678 = 1023It is 1023, not 1/0 = no result.")
    show(page, script, ["Look: ", ToolCall("1/0", None)])
    page.locator(".message").last.get_by_role("button", name="Copy").click()
    expect(page.get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "Look: 1/0 = no result"


HOSTILE = [
    "<script>window.hacked = 1</script>", "<img src=x onerror='window.hacked = 1'>", "<svg onload=alert(1)>",
    "<iframe src='javascript:alert(1)'></iframe>", "<style>body { display: none }</style>",
    "<a href='javascript:alert(1)'>x</a>", "[x](javascript:alert(1))", "[x](JaVaScRiPt:alert(1))",
    "[x](&#106;avascript:alert(1))", "[x](java\tscript:alert(1))", "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:msgbox)", "[x](//evil.example)", "[x](https://bank.example@evil.example)", "<javascript:alert(1)>",
    "![x](http://evil.example/pixel.png)", "![x](javascript:alert(1))",
    "[![x](http://evil.example/p)](javascript:alert(1))",
    "[x](https://ok.example\" onmouseover=\"alert(1))", "```\"><script>alert(1)</script>\nx\n```",
    "```constructor\nx\n```", "| <img src=x onerror=alert(1)> |\n|--|\n| <script>alert(1)</script> |",
    "`<img src=x onerror=alert(1)>`", "\ue000\ue001\uf8ff", ">" * 3000, "- " * 1500, "[" * 3000, "*" * 3000 + "a", "\\(" * 1500,
    "$a" * 1500,
    "$$\n\\[\n" * 700,
    "`" * 3001 + "a", "**a" * 1500, "<form action=http://evil.example><button>x</button></form>",
    "<meta http-equiv=refresh content='0;url=http://evil.example'>", "<base href=http://evil.example>",
]


def test_hostile_markdown_does_nothing(page, script, open_page):
    for markdown in HOSTILE:
        started = time.perf_counter()
        reply = show(page, script, markdown)
        assert time.perf_counter() - started < 5, markdown[:40]
        assert reply.locator("script, img, iframe, style, form, meta, base, object, embed, [onerror], [onload]"
                             ", [onmouseover], svg[onload]").count() == 0, markdown
        for link in reply.locator("a").all():
            assert re.match(r"https?://", link.get_attribute("href")), markdown
            assert "noopener" in link.get_attribute("rel") and "@" not in link.get_attribute("href")
        page.locator("#new").click()
    assert page.evaluate("window.hacked") is None and page.url.startswith("http://127.0.0.1")
    assert open_page.problems == []


def test_formulas_are_shown_as_they_were_written(page, script):
    reply = show(page, script, "So \\(a_1*b_2*c\\), \\[E = mc^2\\], $$x_i$$ and $y_j$ at $5 and $6, not \\*bold\\*.\n\n"
                 "$$\n\\int_0^1 f*g*h\n$$\nDone.")
    expect(reply.locator("p > code")).to_have_text(["a_1*b_2*c", "E = mc^2", "x_i", "y_j"])
    expect(reply.locator("pre")).to_have_text("\\int_0^1 f*g*h")
    expect(reply).to_contain_text("at $5 and $6, not *bold*.")
    expect(reply.locator("em")).to_have_count(0)


def test_a_link_cannot_hide_where_it_goes(page, script):
    reply = show(page, script, "[https://bank.example](https://evil.example/login) and ![chart](http://evil.example/i)")
    expect(reply.locator("a")).to_have_text(["https://bank.example (evil.example)", "chart (evil.example)"])


def test_hostile_words_of_the_user_are_text(page, script):
    send(page, "<img src=x onerror=alert(1)> **no** <|assistant_start|>")
    expect(page.locator(".user")).to_have_text("<img src=x onerror=alert(1)> **no** <|assistant_start|>")
    expect(page.locator("#conversations")).to_contain_text("<img src=x onerror=alert(1)>")
    expect(page.locator("#log img, #sidebar img")).to_have_count(0)
    assert script.requests[-1].tokens.count(TOKENIZER.special_tokens["<|assistant_start|>"]) == 1


def test_the_speed_is_told(page, script):
    show(page, script, ["a "] * 20)
    expect(page.locator(".speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))


def test_the_page_follows_the_reader_only_at_the_bottom(page, script):
    script.replies.append(["line\n\n"] * 60 + [HOLD] + ["more\n\n"] * 20)
    send(page, "Write")
    expect(replies(page).locator("p")).to_have_count(60)
    assert page.evaluate("document.querySelector('#scroll').scrollTop") > 500
    page.locator("#scroll").evaluate("(node) => { node.scrollTop = 0; }")
    script.go_on.set()
    expect(replies(page).locator("p")).to_have_count(80)
    assert page.locator("#scroll").evaluate("(node) => node.scrollTop") == 0
    page.get_by_role("button", name="To the newest message").click()
    expect(page.locator("#to-bottom")).to_be_hidden()


def test_a_short_conversation_has_no_arrow_to_its_end(page, script):
    show(page, script, "line\n\n" * 60)
    page.locator("#scroll").evaluate("(node) => { node.scrollTop = 0; }")
    expect(page.locator("#to-bottom")).to_be_visible()
    page.locator("#new").click()
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#to-bottom")).to_be_hidden()


SHOWN = ("Sorting a list takes **one call**:\n\n```python\ndef smallest(values, count=3):\n"
         '    # the list is not changed\n    return sorted(values)[:count]\n\n'
         'print(smallest([5, 2, 9], 2), "done")\n```\n\n'
         "| Method | Cost |\n|:--|--:|\n| `sorted` | n log n |\n| `min` | n |\n\n"
         "1. It makes a *new* list.\n2. The old one stays.\n")


def test_on_a_telephone_nothing_is_cut_off(page, script, tmp_path):
    page.set_viewport_size({"width": 375, "height": 700})
    show(page, script, SHOWN + "x" * 300, "How do I sort a list? " + "y" * 100)
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    for name in ("#send", "#new", "#open-settings", "#toggle-sidebar", "#input"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 375, name
    screenshot(page, tmp_path, "mobile.png")
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(page.locator("#sidebar")).to_be_visible()
    screenshot(page, tmp_path, "mobile-conversations.png")
    page.locator("#conversations li > button").first.click()
    expect(page.locator("#sidebar")).to_be_hidden()
    page.get_by_role("button", name="Settings").click()
    box = page.locator("#settings").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 375
    screenshot(page, tmp_path, "mobile-settings.png")


def test_on_the_narrowest_telephone_no_name_is_broken_and_help_can_be_read(page, script, tmp_path):
    page.set_viewport_size({"width": 320, "height": 640})
    assert page.locator("h1").evaluate("(node) => node.getClientRects().length === 1 && node.scrollHeight < 40")
    send(page, "/help")
    line = page.locator(".note div").filter(has_text="/temperature")
    assert "  " not in line.inner_text() and line.inner_text().startswith("/temperature [0 to 2] show or set")
    assert page.evaluate("document.documentElement.scrollWidth") <= 320
    screenshot(page, tmp_path, "narrowest-help.png")
    page.set_viewport_size({"width": 1200, "height": 640})
    assert "[0 to 2]    show" in line.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system_and_can_be_read(open_page, script, tmp_path, scheme):
    page = open_page(color_scheme=scheme)
    script.replies.append([ToolCall("345+678", "1023"), "345 + 678 = 1023"])
    send(page, "What is 345 + 678?")
    expect(page.locator(".tool")).to_be_visible()
    show(page, script, SHOWN, "How do I sort a list?")
    screenshot(page, tmp_path, f"{scheme}.png")
    for selector in ("body", ".user", ".tool", ".ended, .speed, #hint", ".hl-comment", ".hl-string", ".hl-keyword"):
        ratio = page.locator(selector).first.evaluate(CONTRAST)
        assert ratio >= 4.5, f"{selector}: {ratio:.2f}"
    is_dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 25, 24)"
    assert is_dark == (scheme == "dark")
    other = {"light": "dark", "dark": "light"}[scheme]
    page.get_by_role("button", name="Settings").click()
    page.locator("#set-theme").select_option(other)
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(25, 25, 24)") == (other == "dark")


# The contrast of an element's text with what is behind it, as WCAG 2 defines it.
CONTRAST = """(node) => {
  const luminance = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((value) => value / 255)
      .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  let behind = node;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const pair = [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor].map(luminance);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}"""


def test_the_keyboard_reaches_everything(page, script):
    show(page, script, "Hello.")
    page.locator("#input").blur()
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#input")).to_have_value("")
    page.locator("#input").fill("draft")
    names = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        names.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText"))
    assert {"Conversations", "Settings", "New conversation", "Edit", "Copy", "Regenerate", "Send", "Go on",
            "Delete this conversation: Go on"} <= names


def test_the_keyboard_is_not_lost_when_its_button_goes(page, script):
    for question in ("cats", "dogs", "birds"):
        page.locator("#new").click()
        show(page, script, "Yes.", question)
    script.replies.append(["Once", HOLD])
    send(page, "A story")
    page.locator("#stop").press("Enter")
    expect(page.get_by_text("Stopped.")).to_be_visible()
    expect(page.locator("#input")).to_be_focused()
    page.get_by_role("button", name="Regenerate").press("Enter")
    expect(page.locator("#input")).to_be_focused()
    for deleted, then in (("dogs", "cats"), ("cats", "birds")):
        page.get_by_role("button", name=f"Delete this conversation: {deleted}").press("Enter")
        expect(page.get_by_role("button", name=then, exact=True)).to_be_focused()
    page.get_by_role("button", name="Delete this conversation").press("Enter")
    expect(page.locator("#input")).to_be_focused()


def test_the_drawer_takes_the_keyboard_and_gives_it_back(page, script):
    for question in ("cats", "dogs"):
        page.locator("#new").click()
        show(page, script, "Yes.", question)
    page.set_viewport_size({"width": 375, "height": 700})
    toggle = page.get_by_role("button", name="Conversations", exact=True)
    for leave in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Close").press("Enter"),
                  lambda: page.mouse.click(370, 300)):
        toggle.press("Enter")
        expect(page.get_by_role("button", name="Close")).to_be_focused()
        for _ in range(9):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.closest('#page')") is None
        leave()
        expect(page.locator("#sidebar")).to_be_hidden()
        expect(toggle).to_be_focused()
    toggle.click()
    page.get_by_role("button", name="Delete this conversation: dogs").press("Enter")
    expect(page.get_by_role("button", name="cats", exact=True)).to_be_focused()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("#sidebar")).to_be_hidden()
    expect(page.locator(".user")).to_have_text("dogs")
    expect(page.locator("#input")).to_be_focused()


def test_the_offer_to_undo_covers_nothing(page, script):
    for question in ("cats", "dogs"):
        page.locator("#new").click()
        show(page, script, "line\n\n" * 40, question)
    page.get_by_role("button", name="Delete this conversation: cats").click()
    expect(page.get_by_role("button", name="Undo")).to_be_visible()
    assert page.locator("#toast").evaluate("""(toast) => {
      const { x, y, width, height } = toast.getBoundingClientRect();
      const there = document.elementsFromPoint(x + width / 2, y + height / 2);
      return there.every((node) => node.contains(toast) || toast.contains(node));
    }""")


def test_a_model_answers_through_the_real_engine(browser):
    config = GPTConfig.modern(1, aspect_ratio=32, head_dim=32, sequence_len=64, vocab_size=TOKENIZER.vocab_size)
    engine = Engine(config, init_params(config, jax.random.key(0)), TOKENIZER, num_slots=2)
    with Scheduler(engine) as scheduler:
        served = Served(scheduler, max_len=engine.max_len, defaults=Sampling(max_tokens=24, temperature=1.0))
        page = browser.new_page()
        page.goto(served.url)
        send(page, "Hello")
        expect(page.get_by_role("button", name="Regenerate")).to_be_visible(timeout=60000)
        assert replies(page).inner_text().strip()
        page.close()
        served.close()


def screenshot(page, folder: Path, name):
    """For people: kept where NANOCHAT_SCREENSHOTS says."""
    page.screenshot(path=Path(os.environ.get("NANOCHAT_SCREENSHOTS", folder)) / name)


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)

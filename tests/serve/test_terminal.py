"""Chat in a terminal: what it prints, what it remembers, and how it ends."""

import gc
import io
import sys
import weakref

import jax
import pytest
from chain_model import (
    ASSISTANT_START,
    BOS,
    CHAIN,
    END,
    OUTPUT,
    OUTPUT_END,
    PYTHON,
    PYTHON_END,
    TOKENIZER,
    USER_END,
    USER_START,
    chain_params,
)

from nanochat_jax import pretrained
from nanochat_jax.checkpoint import Loaded
from nanochat_jax.errors import UsageError
from nanochat_jax.infer.engine import Engine, EngineLoop
from nanochat_jax.paths import Paths
from nanochat_jax.serve import terminal
from scripts import chat_cli
from scripts.chat_cli import Config

CHAT = ((ASSISTANT_START, "Hé: ", PYTHON, "1+2", PYTHON_END), (OUTPUT_END, "!", END))
REPLY = [*"Hé: ".encode(), PYTHON, *b"1+2", PYTHON_END, OUTPUT, *b"3", OUTPUT_END, *b"!", END]


@pytest.fixture
def talk(monkeypatch, tmp_path, capsys):
    """Run the script on lines typed by a user; returns exit code, output and prompts."""

    def run(*lines, texts=CHAT, stdin=None, **options):
        params = chain_params(*texts)
        prompts, generation = [], Engine.generation
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
        monkeypatch.setattr(chat_cli, "start", lambda paths, config: None)
        loaded = Loaded(CHAIN, params, TOKENIZER, {}, tmp_path, 1, "sft")
        monkeypatch.setattr(pretrained, "load_model", lambda *_, **__: loaded)

        def recorded(self, request):
            made = generation(self, request)
            prompts.append(list(made.prompt))
            return made

        monkeypatch.setattr(Engine, "generation", recorded)
        remaining = iter(lines)

        def read(prompt):
            line = next(remaining, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        if stdin is None:
            monkeypatch.setattr("builtins.input", read)
        else:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), "utf-8"))
        code = chat_cli.main(Config(**({"temperature": 0.0} | options)))
        return code, capsys.readouterr().out, prompts

    return run


def question(text):
    return [USER_START, *text.encode(), USER_END, ASSISTANT_START]


def test_one_prompt_prints_the_reply_alone(talk):
    code, out, prompts = talk(prompt="Hello <|bos|>")
    assert (code, out) == (None, "Hé: [1+2 = 3] !\n")
    assert prompts == [[BOS, *question("Hello <|bos|>")]]


@pytest.mark.parametrize(
    "clear,leave", [("clear", "quit"), ("/clear", "/quit"), ("/Clear", "/exit")]
)
def test_history_holds_the_reply_tokens_until_cleared(talk, clear, leave):
    _, out, prompts = talk("one", "  ", "two", clear, "three", leave, "four")
    assert prompts == [
        [BOS, *question("one")],
        [BOS, *question("one"), *REPLY, *question("two")],
        [BOS, *question("three")],
    ]
    assert out.count("Hé: [1+2 = 3] !") == 3


def test_bytes_that_are_no_text_do_not_end_a_chat(talk):
    _, out, prompts = talk(stdin=b"h\xff\xe9i\nyes\nquit\nmore\n")
    assert [prompt[-len(question("yes")) :] for prompt in prompts[1:]] == [question("yes")]
    assert prompts[0] == [BOS, *question("h\ufffd\ufffdi")]


def test_a_reply_that_is_cut_in_a_tool_call_is_remembered_up_to_it(talk):
    _, _, prompts = talk("one", "two", max_tokens=7)
    said = "Hé: ".encode()
    assert prompts[1] == [BOS, *question("one"), *said, END, *question("two")]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(talk):
    _, out, prompts = talk("a" * 24, "b" * 24, "c" * 24, max_tokens=30)
    assert prompts[1] == [BOS, *question("b" * 24)]
    assert "dropped the oldest 1 turns" in out
    assert all(len(prompt) + 30 <= CHAIN.sequence_len for prompt in prompts)


def test_a_message_too_long_is_said_and_not_remembered(talk):
    _, out, prompts = talk("x" * 200, "y")
    assert "prompt of 204 tokens does not fit in the context of 96" in out
    assert prompts == [[BOS, *question("y")]]
    with pytest.raises(UsageError, match="prompt of 204 tokens does not fit"):
        talk(prompt="x" * 200)


def test_a_reply_cannot_steer_the_terminal(talk):
    _, out, _ = talk(texts=((ASSISTANT_START, "a\x1b[2J\x9bb\n\tc\rd", END),), prompt="hi")
    assert "a\ufffd[2J\ufffdb\n\tc\ufffdd" in out and not {"\x1b", "\x9b", "\r"} & set(out)


def test_interrupting_a_reply_keeps_the_chat(talk, monkeypatch):
    steps, step = [], EngineLoop.step

    def interrupted(loop):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        step(loop)

    monkeypatch.setattr(EngineLoop, "step", interrupted)
    _, out, prompts = talk(
        "a", KeyboardInterrupt(), "b", texts=((ASSISTANT_START, "0123456789", END),), max_tokens=30
    )
    assert "Assistant: 01234\n" in out
    assert prompts[1] == [BOS, *question("a"), *b"01234", END, *question("b")]
    assert "Assistant: 0123456789\n" in out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_parameters_are_in_memory_once(monkeypatch, tmp_path, dtype):
    loaded = [Loaded(CHAIN, chain_params(*CHAT), TOKENIZER, {}, tmp_path, 1, "sft")]
    masters = [weakref.ref(leaf) for leaf in jax.tree.leaves(loaded[0].params["blocks"])]
    monkeypatch.setattr(pretrained, "load_model", lambda *_, **__: loaded.pop())
    engine, model = pretrained.load_engine(Paths(tmp_path), "sft", Config(dtype=dtype), num_slots=1)
    gc.collect()
    assert model.step == 1 and jax.tree.leaves(engine.params["blocks"])
    assert not any(master() for master in masters)


def test_an_input_that_is_closed_is_an_empty_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    terminal.make_stdin_readable()
    assert sys.stdin.read() == ""


def test_an_interrupted_single_reply_has_its_exit_code(talk, monkeypatch):
    def interrupted(loop):
        raise KeyboardInterrupt

    monkeypatch.setattr(EngineLoop, "step", interrupted)
    assert talk(prompt="a")[0] == 130

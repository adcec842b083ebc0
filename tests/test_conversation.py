"""Rendering conversations: what is learned, and what is refused."""

import copy
import re

import pytest

from nanochat_jax.conversation import render_conversation, render_for_completion
from nanochat_jax.tokenizer import SPECIAL_TOKENS, Tokenizer

PYTHON = [
    {"type": "text", "text": "Let me see. "},
    {"type": "python", "text": "12*3"},
    {"type": "python_output", "text": "36"},
    {"type": "text", "text": "It is 36."},
]

SYSTEM = {"role": "system", "content": "Be brief."}


def chat(*contents, system=None):
    roles = ("user", "assistant")
    messages = [
        {"role": roles[index % 2], "content": content} for index, content in enumerate(contents)
    ]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["What is 12 times 3? Let me see. It is 36."] * 3, 300)


def test_only_what_the_assistant_produces_is_learned(tokenizer):
    ids, mask = render_conversation(
        tokenizer, chat("What is 12 times 3?", PYTHON, "Thanks", "Welcome")
    )
    assert len(ids) == len(mask)
    learned = [token for token, bit in zip(ids, mask, strict=True) if bit]
    assert tokenizer.decode(learned) == (
        "Let me see. <|python_start|>12*3<|python_end|>It is "
        "36.<|assistant_end|>Welcome<|assistant_end|>"
    )
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>What is 12 times 3?<|user_end|>"
        "<|assistant_start|>Let me see. "
        "<|python_start|>12*3<|python_end|><|output_start|>36<|output_end|>It is 36."
        "<|assistant_end|><|user_start|>Thanks<|user_end|><|assistant_start|>Welcome<|assistant_end|>"
    )


def test_control_tokens_in_a_message_are_only_text(tokenizer):
    attack = "".join(SPECIAL_TOKENS)
    ids, _ = render_conversation(tokenizer, chat(attack, attack, system=attack))
    names = {token: name[2:-2] for name, token in tokenizer.special_tokens.items()}
    found = [names[token] for token in ids if token in names]
    assert found == "bos user_start user_end assistant_start assistant_end".split()


def test_a_system_message_joins_the_first_user_message(tokenizer):
    conversation = chat("Hi", "Hello", system="Be brief.")
    before = copy.deepcopy(conversation)
    merged = chat("Be brief.\n\nHi", "Hello")
    assert render_conversation(tokenizer, conversation) == render_conversation(tokenizer, merged)
    assert conversation == before


def test_a_completion_prompt_ends_where_the_answer_begins(tokenizer):
    conversation = chat("Hi", "Hello", "And?", PYTHON)
    ids, _ = render_conversation(tokenizer, conversation)
    prompt = render_for_completion(tokenizer, conversation)
    assert prompt == ids[: len(prompt)]
    assert prompt[-1] == tokenizer.encode_special("<|assistant_start|>")
    assert prompt.count(prompt[-1]) == 2


def test_ids_and_mask_are_cut_together(tokenizer):
    ids, mask = render_conversation(tokenizer, chat("Hi", "Hello"))
    assert render_conversation(tokenizer, chat("Hi", "Hello"), 5) == (ids[:5], mask[:5])


ASSISTANT = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "message 0: a conversation needs"),
        ([ASSISTANT], "message 0: the role should be user"),
        (chat("a")["messages"] * 2, "message 1: the role should be assistant, not 'user'"),
        ([*chat("a", "b")["messages"], ASSISTANT], "message 2: the role"),
        ([SYSTEM], "message 1: the user must follow"),
        ([SYSTEM, ASSISTANT], "message 1: the user must follow"),
        (
            [SYSTEM | {"content": None}, *chat("a")["messages"]],
            "message 0: the content of a system",
        ),
        (chat(PYTHON)["messages"], "message 0: a user's content is a string, got list"),
        (
            chat("a", None)["messages"],
            "message 1: content is a string or a list of parts, got NoneType",
        ),
        (
            chat("a", [{"type": "image", "text": "b"}])["messages"],
            "message 1: a part is a text of type",
        ),
        (chat("a", [{"type": "text"}])["messages"], "message 1: a part is a text of type"),
    ],
)
def test_a_bad_conversation_is_an_error_that_gives_the_message(tokenizer, messages, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        render_conversation(tokenizer, {"messages": messages})


@pytest.mark.parametrize("conversation", [chat("a"), {"messages": []}])
def test_a_completion_needs_an_answer_to_drop(tokenizer, conversation):
    with pytest.raises(ValueError, match="last message must be the assistant's"):
        render_for_completion(tokenizer, conversation)

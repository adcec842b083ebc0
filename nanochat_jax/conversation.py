"""Rendering of conversations as tokens, with a mask of the tokens to train on.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`. User and assistant take
turns, the user first; a system message may come before. The content is a string or, for the
assistant, a list of parts `{"type": "text" | "python" | "python_output", "text": ...}`: text, calls
of the calculator, and their results. The mask is 1 for what the assistant must produce itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat_jax.tokenizer import Tokenizer

Conversation = Mapping[str, Any]

# Tokens around a part of an assistant's message, and its mask.
PARTS = {
    "text": (None, None, 1),
    "python": ("<|python_start|>", "<|python_end|>", 1),
    "python_output": ("<|output_start|>", "<|output_end|>", 0),
}


def render_conversation(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> tuple[list[int], list[int]]:
    """(ids, mask) of a conversation, truncated to `max_tokens`.

    Raises ValueError, with the index of the message, for a conversation of another form.
    """
    ids, mask = [tokenizer.bos_id], [0]
    for role, content in turns_of(conversation["messages"]):
        more_ids, more_mask = render_message(tokenizer, role, content)
        ids += more_ids
        mask += more_mask
    return ids[:max_tokens], mask[:max_tokens]


def render_message(tokenizer: Tokenizer, role: str, content: Any) -> tuple[list[int], list[int]]:
    """(ids, mask) of one message, with its control tokens."""
    if role == "user":
        ids = tokenizer.encode(content, prepend="<|user_start|>", append="<|user_end|>")
        return ids, [0] * len(ids)
    ids, mask = [tokenizer.encode_special("<|assistant_start|>")], [0]
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        start, end, trained = PARTS[part["type"]]
        tokens = tokenizer.encode(part["text"], prepend=start, append=end)
        ids += tokens
        mask += [trained] * len(tokens)
    return [*ids, tokenizer.encode_special("<|assistant_end|>")], [*mask, 1]


def render_for_completion(
    tokenizer: Tokenizer, conversation: Conversation, max_tokens: int = 2048
) -> list[int]:
    """The prompt for the last message: the messages before it, then `<|assistant_start|>`.

    Raises ValueError if the last message is not the assistant's.
    """
    messages = conversation["messages"]
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"message {len(messages) - 1}: the last message must be the assistant's; it is dropped"
        )
    ids, _ = render_conversation(tokenizer, {"messages": messages[:-1]}, max_tokens)
    return [*ids, tokenizer.encode_special("<|assistant_start|>")]


def turns_of(messages: Any) -> list[tuple[str, Any]]:
    """(role, content) of each turn, with the system message merged into the first user message.

    Raises ValueError, with the index of the message, unless `messages` has the form above.
    """
    if not isinstance(messages, (list, tuple)):
        raise ValueError(f"messages must be an array, got {type(messages).__name__}")
    if not messages:
        raise ValueError("message 0: a conversation needs at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ValueError(f"message {index} needs a role and a content")
    prefix, first = "", 0
    if messages[0]["role"] == "system":
        if len(messages) < 2 or messages[1]["role"] != "user":
            raise ValueError("message 1: the user must follow the system message")
        if not isinstance(messages[0]["content"], str):
            raise ValueError("message 0: the content of a system message is a string")
        prefix, first = messages[0]["content"] + "\n\n", 1
    turns = []
    for index, message in enumerate(messages[first:], start=first):
        role, content = message["role"], message["content"]
        expected = ("user", "assistant")[(index - first) % 2]
        if role != expected:
            raise ValueError(
                f"message {index}: the role should be {expected}, not {str(role)[:40]!r}"
            )
        if role == "user" and not isinstance(content, str):
            raise ValueError(
                f"message {index}: a user's content is a string, got {type(content).__name__}"
            )
        if role == "assistant" and not isinstance(content, (str, list, tuple)):
            raise ValueError(
                f"message {index}: content is a string or a list of parts, got "
                f"{type(content).__name__}"
            )
        for part in () if isinstance(content, str) else content:
            if not (
                isinstance(part, Mapping)
                and str(part.get("type")) in PARTS
                and isinstance(part.get("text"), str)
            ):
                raise ValueError(f"message {index}: a part is a text of type {', '.join(PARTS)}")
        turns.append((role, prefix + content if index == first else content))
    return turns


def text_of(content: str | Sequence[Mapping[str, str]]) -> str:
    """The visible text of an assistant's message: without calls of the calculator and results."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def visualize_tokenization(
    tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[int], with_token_id: bool = False
) -> str:
    """The tokens separated by bars, for a terminal: green if trained on, otherwise red."""
    red, green, gray, reset = "\033[91m", "\033[92m", "\033[90m", "\033[0m"
    tokens = []
    for token, trained in zip(ids, mask, strict=True):
        tokens.append(f"{green if trained else red}{tokenizer.decode([token])}{reset}")
        if with_token_id:
            tokens[-1] += f"{gray}({token}){reset}"
    return "|".join(tokens)

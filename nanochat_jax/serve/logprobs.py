"""Log-probabilities of tokens in the forms of OpenAI's two APIs.

They are the model's, before temperature, top-k and top-p. All of them come from one pass over the
finished reply (`Replies.scores`), so that a prompt, a reply and the alternatives to its tokens
agree; the last bits can differ from those that the tokens were drawn from.
"""

import codecs
import math
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from nanochat_jax.infer.token_scores import TokenScores
from nanochat_jax.tokenizer import Tokenizer


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Of a message of chat completions: every generated token, calculations included."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Of a choice of completions; the first token of a prompt has no log-probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    # the chosen token is always among them; null if the request has `logprobs: 0`
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]  # position of each token's first character in `text`


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: TokenScores, top: int
) -> ChatLogprobs:
    """Of a reply's tokens, which are the last ones that were scored."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.decode_bytes([token])
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

    first = len(scores.logprobs) - len(tokens)
    content = []
    for at, token in enumerate(tokens, start=first):
        likely = _likely(scores, at)
        alternatives = [entry(*pair) for pair in list(likely.items())[:top]]
        logprob = likely.get(token, float(scores.logprobs[at]))
        content.append(
            TokenLogprob.model_validate(entry(token, logprob) | {"top_logprobs": alternatives})
        )
    return ChatLogprobs(content=content)


def text_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], scores: TokenScores, *, first: int, top: int
) -> TextLogprobs:
    """Of `tokens[first:]`. `scores` are those of `tokens`, or of all but the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    shown, logprobs, alternatives, offsets, length = [], [], [], [], 0
    for at, token in enumerate(tokens[first:], start=first):
        data = tokenizer.decode_bytes([token])
        likely = _likely(scores, at)
        if token not in likely and at < len(scores.logprobs):
            likely[token] = float(scores.logprobs[at])
        logprob = likely.get(token, math.nan)
        shown.append(_written(data))
        logprobs.append(None if math.isnan(logprob) else logprob)
        texts: dict[str, float] = {}
        for other, value in likely.items():
            # Several tokens can have one text: the most likely is listed.
            text = _written(tokenizer.decode_bytes([other]))
            texts[text] = max(value, texts.get(text, value))
        alternatives.append(texts if at else None)
        offsets.append(length)
        length += len(decoder.decode(data))
    return TextLogprobs(
        tokens=shown,
        token_logprobs=logprobs,
        top_logprobs=alternatives if top else None,
        text_offset=offsets,
    )


def _likely(scores: TokenScores, at: int) -> dict[int, float]:
    """The most likely tokens at a position and their log-probabilities, most likely first."""
    ids, logprobs = scores.top_ids[at].tolist(), scores.top_logprobs[at].tolist()
    return {token: logprob for token, logprob in zip(ids, logprobs) if token >= 0}


def _written(data: bytes) -> str:
    """A token's text; a part of a character as OpenAI writes it, like `bytes:\\xe2\\x82`."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

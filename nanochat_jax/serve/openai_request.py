"""The request of OpenAI's chat completions: its types, and the prompt and sampling it asks for.

An unsupported field is refused, never ignored, unless its value cannot change the reply: null, a
default such as `presence_penalty: 0`, or any value of a field such as `user`.

If the last message is the assistant's, the reply continues it. `add_generation_prompt: true` or
`continue_final_message: false` starts another message instead. Earlier tool calls and their results
are rendered as the model's calculations.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from nanochat_jax.infer.request import Request, Sampling
from nanochat_jax.infer.token_scores import MOST_TOP
from nanochat_jax.serve.chat_request import (
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TOKENS,
    MAX_TOTAL_CHARS,
    BadRequest,
    Ending,
    MaxTokens,
    SamplingFields,
    Strict,
    TopK,
    Whole,
    check,
    text_or_parts,
)

MAX_CHOICES = 8  # replies to one request


def _unicode(value: Any) -> Any:
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError as error:
        message = "Input should not have a lone surrogate"
        raise PydanticCustomError("surrogate", message) from error
    return value


Unicode = BeforeValidator(_unicode)
Text = Annotated[str, Field(max_length=MAX_TOTAL_CHARS), Unicode]
Stop = Annotated[str, Field(min_length=1, max_length=200), Unicode]
Stops = Annotated[list[Stop], Field(max_length=4)]


def one_or_more(stops: Any) -> BeforeValidator:
    """Accept one stop string in place of a list."""
    return BeforeValidator(
        lambda stop: [stop] if isinstance(stop, str) else stop, json_schema_input_type=Stop | stops
    )


Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole]


def _or_minus_one(number: Any, meaning: int) -> BeforeValidator:
    """Accept -1, other servers' "no limit", as `meaning`."""
    return BeforeValidator(
        lambda value: meaning if value == -1 else value, json_schema_input_type=Literal[-1] | number
    )


AnyMaxTokens = Annotated[MaxTokens, _or_minus_one(MaxTokens, MAX_TOKENS)]
AnyTopK = Annotated[TopK, _or_minus_one(TopK, 0)]


class Known(Strict):
    """An object that refuses unknown fields. Null means absent.

    `NEUTRAL` names fields that have no effect, with the values that are accepted; None accepts any.
    """

    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...] | None]] = {}
    model_config = ConfigDict(
        extra="forbid", json_schema_extra=lambda schema, model: _describe_neutral(schema, model)
    )

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known: dict[str, Any] = {}
        unknown: dict[str, Any] = {}
        for name, value in data.items():
            if value is None or _is_neutral(value, cls.NEUTRAL.get(name, ())):
                continue
            if name in cls.model_fields:
                known[name] = value
            elif not unknown:  # only the first is reported
                unknown[name] = value
        return known | unknown


def _is_neutral(value: Any, values: tuple[Any, ...] | None) -> bool:
    return values is None or any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in values
    )


def _describe_neutral(schema: dict[str, Any], model: Any) -> None:
    neutral = {
        name: {} if values is None else {"enum": [None, *values]}
        for name, values in model.NEUTRAL.items()
    }
    schema["properties"] = {**schema["properties"], **neutral}
    schema["additionalProperties"] = {"type": "null"}


class TextPart(Known):
    NEUTRAL = {"annotations": None, "cache_control": None}

    type: Literal["text"]
    text: Text


TextParts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Annotated[Text, Tag("str")] | Annotated[TextParts, Tag("list")], text_or_parts]


class Function(Known):
    name: Annotated[Text, Field(min_length=1, max_length=200)]
    arguments: Annotated[Text, Field(max_length=MAX_MESSAGE_CHARS)]


class Call(Known):
    NEUTRAL = {"id": None, "index": None}

    type: Literal["function"]
    function: Function


class Message(Known):
    NEUTRAL = {"name": None, "tool_call_id": None}

    role: Literal["system", "developer", "user", "tool"]
    content: Content

    def parts(self) -> list[dict[str, str]]:
        """Parts of conversation.py. A tool's result is rendered like the calculator's."""
        part_type = "python_output" if self.role == "tool" else "text"
        return [{"type": part_type, "text": _text(self.content)}]


class AssistantMessage(Known):
    NEUTRAL = {"name": None, "annotations": None, "reasoning": None, "reasoning_content": None}

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[Call], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None

    def parts(self) -> list[dict[str, str]]:
        """Parts of conversation.py. A tool call is rendered like a calculation."""
        text = _text(self.content or "")
        calls = [call.function for call in self.tool_calls or ()]
        return [
            *([{"type": "text", "text": text}] if text else []),
            *({"type": "python", "text": f"{call.name}({call.arguments})"} for call in calls),
        ]


def _ends_with_result(turn: Mapping[str, Any]) -> bool:
    return any(part["type"] == "python_output" for part in turn["content"][-1:])


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# Fields that have no effect, with the values that are accepted; None accepts any.
NEUTRAL_FIELDS: Mapping[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(
        (
            "cache_prompt metadata parallel_tool_calls prediction priority prompt_cache_key "
            "prompt_cache_retention request_id safety_identifier service_tier store user"
        ).split()
    ),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template_kwargs": ({},),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "typical_p": (1,),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}


class StreamOptions(Known):
    NEUTRAL = {"include_obfuscation": None, "continuous_usage_stats": (False,)}

    include_usage: bool | None = None


class CompletionRequest(SamplingFields, Known):
    NEUTRAL = NEUTRAL_FIELDS
    SAMPLING = (*SamplingFields.SAMPLING, "top_p", "seed", "stop")

    model: str | None = None
    messages: Annotated[
        list[Annotated[Message | AssistantMessage, Field(discriminator="role")]],
        Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    ]
    max_tokens: AnyMaxTokens | None = None
    max_completion_tokens: AnyMaxTokens | None = None  # the newer name of max_tokens
    top_k: AnyTopK | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), Whole] | None = None
    seed: Seed | None = None
    stop: Annotated[Stops, one_or_more(Stops)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP), Whole] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The messages as turns that conversation.py renders.

        A system message is merged into the next user message, as in training. Tool results and the
        assistant's text after them belong to the turn that called the tool.
        """
        messages = [(message.role, message.parts()) for message in self.messages]
        length = sum(len(part["text"]) for _, parts in messages for part in parts)
        if length > MAX_TOTAL_CHARS:
            detail = f"the conversation has {length} characters; the limit is {MAX_TOTAL_CHARS}"
            raise BadRequest(400, detail, param="messages", code="context_length_exceeded")
        turns: list[dict[str, Any]] = []
        system: list[str] = []
        for role, parts in messages:
            last = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
            if role in ("system", "developer"):
                system.append(parts[0]["text"])
            elif role == "user":
                turns.append({"role": "user", "content": "\n\n".join([*system, parts[0]["text"]])})
                system = []
            elif last is not None and (role == "tool" or _ends_with_result(last)):
                last["content"] += parts
            else:
                turns.append({"role": "assistant", "content": parts})
        return [*turns, {"role": "user", "content": "\n\n".join(system)}] if system else turns

    def ending(self, last_role: str) -> Ending:
        """How the prompt ends. By default, an assistant's last message is continued."""
        continues = self.continue_final_message
        if continues is None:
            continues = last_role == "assistant" and not self.add_generation_prompt
        if continues:
            return "continue"
        return "none" if self.add_generation_prompt is False else "reply"

    def sampling(self, defaults: Sampling) -> Sampling:
        sampling = super().sampling(defaults)
        if self.max_completion_tokens is None:
            return sampling
        return dataclasses.replace(sampling, max_tokens=self.max_completion_tokens)

    def requests(self, prompt: tuple[int, ...], sampling: Sampling) -> list[Request]:
        return [sampling.request(prompt, seed=seed) for seed in seeds(self.seed, self.n or 1)]


def seeds(first: int | None, count: int) -> list[int]:
    """Seeds of `count` replies; random ones without a `first`."""
    first = secrets.randbelow(2**31) if first is None else first
    return [(first + index) % 2**64 for index in range(count)]


def parse(body: Any, model: str) -> CompletionRequest:
    """Check a decoded JSON body. Raises `BadRequest`: 404 for another model, 400 or 422 else."""
    request = check(CompletionRequest, body)
    if request.add_generation_prompt and request.continue_final_message:
        detail = "continue_final_message and add_generation_prompt cannot both be true"
        raise BadRequest(400, detail, param="continue_final_message")
    if request.model is not None:
        check_model(request.model, model)
    return request


def check_model(name: str, model: str) -> None:
    if name != model:
        detail = f"there is no model {name[:80]!r} here: ask for {model!r}"
        raise BadRequest(404, detail, param="model", code="model_not_found")

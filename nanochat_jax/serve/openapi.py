"""The description of both APIs that GET /openapi.json gives: OpenAPI 3.1."""

from typing import Any

from nanochat_jax.serve.chat_request import (
    MAX_MESSAGE_CHARS,
    MAX_MESSAGES,
    MAX_REPLY_TOKENS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
    MAX_TOTAL_CHARS,
)
from nanochat_jax.serve.openai_api import MAX_STOP_CHARS, MAX_STOPS

Schema = dict[str, Any]


def describe(model: str, *, max_choices: int, keyed: bool) -> Schema:
    """The description as JSON; `keyed` if clients must give a key."""
    detail = _object({"detail": {"type": "string"}}, "detail")
    bearer: Schema = {"security": [{"bearer": []}]} if keyed else {}
    errors = {name: _ref(name) for name in ("400", "403", "408", "413", "422", "500", "503", *(["401"] if keyed else []))}
    v1_errors = {"400": _openai("wrong or not supported"), "404": _openai("there is no such model"),
                 "403": _openai("the server has another name: see --allowed-hosts"),
                 "408": _openai("the body did not arrive in time"), "413": _openai("the body is too large"),
                 "500": _openai("the generation failed"), "503": _openai("the queue is full: see Retry-After"),
                 "504": _openai("the reply took too long"), **({"401": _openai("the key is wrong")} if keyed else {})}
    keyed_error = {"401": v1_errors["401"]} if keyed else {}
    answers = {
        "400": "over a limit", "401": "the key is wrong", "403": "the server has another name",
        "408": "the body did not arrive in time",
        "413": "the body is too large", "422": "a wrong type", "500": "the server failed",
        "503": "the queue is full: see Retry-After",
    }  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat_jax", "version": "1", "description": "A small ChatGPT, served."},
        "paths": {
            "/chat/completions": {"post": {
                "operationId": "chat", "summary": "A reply as server-sent events", **bearer,
                "requestBody": _json_body(_chat_request()),
                "responses": {"200": {"description": "events", "content": {"text/event-stream": {}}}, **errors},
            }},
            "/v1/chat/completions": {"post": {
                "operationId": "openai_chat", "summary": "OpenAI's chat completions", **bearer,
                "requestBody": _json_body(_openai_request(model, max_choices)),
                "responses": {"200": {"description": "a completion, or its chunks as events", "content": {
                    "application/json": {"schema": _completion()}, "text/event-stream": {}}}, **v1_errors},
            }},
            "/v1/models": {"get": {
                "operationId": "list_models", "summary": "The one model", **bearer, "responses": {
                    "200": _json("a list", _object({"object": {"const": "list"}, "data": {
                        "type": "array", "items": _model_card()}}, "object", "data")), **keyed_error},
            }},
            "/v1/models/{model}": {"get": {
                "operationId": "show_model", "summary": "The model, if that is its id", **bearer,
                "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}],
                "responses": {"200": _json("the model", _model_card()), "404": v1_errors["404"], **keyed_error},
            }},
            "/health": {"get": {"operationId": "health", "summary": "Whether it is up", "responses": {
                "200": _json("health", _object({
                    "status": {"enum": ["ok", "failed"]}, "ready": {"type": "boolean"}, "num_gpus": {"type": "integer"},
                    "available_workers": {"type": "integer"}, "model": {"type": "object"},
                    "defaults": {"type": "object"}, "api_key": {"type": "boolean"}}, "status", "ready"))}}},
            "/stats": {"get": {"operationId": "stats", "summary": "How many slots are busy", **bearer, "responses": {
                "200": _json("slots", _object({name: {"type": "integer"} for name in (
                    "total_workers", "available_workers", "busy_workers", "queued_requests")}, "total_workers")),
                **({"401": _ref("401")} if keyed else {})}}},
            "/metrics": {"get": {"operationId": "metrics", "summary": "Prometheus' numbers", **bearer, "responses": {
                "200": {"description": "text", "content": {"text/plain": {}}},
                **({"401": _ref("401")} if keyed else {})}}},
        },
        "components": {
            "responses": {status: _json(text, detail) for status, text in answers.items()},
            **({"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}} if keyed else {}),
        },
    }  # fmt: skip


def _object(properties: Schema, *required: str) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _json(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def _json_body(schema: Schema) -> Schema:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _ref(status: str) -> Schema:
    return {"$ref": f"#/components/responses/{status}"}


def _openai(description: str) -> Schema:
    text = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text}
    return _json(description, _object({"error": _object(fields, *fields)}, "error"))


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def _integer(least: int, most: int) -> Schema:
    return _or_null({"type": "integer", "minimum": least, "maximum": most})


_TEMPERATURE = _or_null({"type": "number", "minimum": 0, "maximum": MAX_TEMPERATURE})
_TEXT = {"type": "string", "minLength": 1, "maxLength": MAX_MESSAGE_CHARS}


def _chat_request() -> Schema:
    part = _object({"type": {"enum": ["text", "python", "python_output"]}, "text": _TEXT}, "type", "text")
    user = _object({"role": {"const": "user"}, "content": _TEXT}, "role", "content")
    assistant = _object({"role": {"const": "assistant"}, "content": {
        "anyOf": [_TEXT, {"type": "array", "items": part, "minItems": 1}]}}, "role", "content")  # fmt: skip
    return _object({
        "messages": {"type": "array", "items": {"anyOf": [user, assistant]}, "minItems": 1, "maxItems": MAX_MESSAGES},
        "temperature": _TEMPERATURE, "top_k": _integer(0, MAX_TOP_K), "max_tokens": _integer(1, MAX_REPLY_TOKENS),
    }, "messages")  # fmt: skip


def _openai_request(model: str, max_choices: int) -> Schema:
    text = {"type": "string", "maxLength": MAX_TOTAL_CHARS}
    part = _object({"type": {"const": "text"}, "text": text}, "type", "text")

    def message(*roles: str) -> Schema:
        content = {"anyOf": [text, {"type": "array", "items": part, "minItems": 1}]}
        return _object({"role": {"enum": roles}, "content": content}, "role", "content")

    turn = message("user", "assistant")
    stop = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
    return _object({
        "model": _or_null({"const": model}),
        "messages": {"anyOf": [
            {"type": "array", "items": turn, "minItems": 1},
            {"type": "array", "prefixItems": [message("system", "developer"), message("user")], "items": turn,
             "minItems": 2},
        ]},
        "temperature": _TEMPERATURE, "top_p": _or_null({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        "top_k": _integer(0, MAX_TOP_K), "n": _integer(1, max_choices), "seed": _integer(-(2**63), 2**63 - 1),
        "max_tokens": {**_integer(1, MAX_REPLY_TOKENS), "deprecated": True},
        "max_completion_tokens": _integer(1, MAX_REPLY_TOKENS),
        "stop": {"anyOf": [stop, {"type": "array", "items": stop, "maxItems": MAX_STOPS}, {"type": "null"}]},
        "stream": _or_null({"type": "boolean"}),
        "stream_options": _or_null(_object({"include_usage": _or_null({"type": "boolean"})})),
    }, "messages")  # fmt: skip


def _completion() -> Schema:
    message = _object({"role": {"const": "assistant"}, "content": {"type": "string"}}, "role", "content")
    choice = _object({"index": {"type": "integer"}, "message": message,
                      "finish_reason": {"enum": ["stop", "length"]}}, "index", "message", "finish_reason")  # fmt: skip
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    return _object({
        "id": {"type": "string"}, "object": {"const": "chat.completion"}, "created": {"type": "integer"},
        "model": {"type": "string"}, "choices": {"type": "array", "items": choice},
        "usage": _object({name: {"type": "integer"} for name in counts}, *counts),
    }, "id", "object", "created", "model", "choices", "usage")  # fmt: skip


def _model_card() -> Schema:
    return _object({"id": {"type": "string"}, "object": {"const": "model"}, "created": {"type": "integer"},
                    "owned_by": {"type": "string"}, "max_model_len": {"type": "integer"}},
                   "id", "object", "created", "owned_by")  # fmt: skip

"""The description of both APIs that GET /openapi.json gives: OpenAPI 3.1. Requests are described
by what checks them.
"""

from typing import Any

from pydantic.json_schema import models_json_schema

from nanochat_jax.serve.chat_request import ChatRequest
from nanochat_jax.serve.openai_api import CompletionRequest

Schema = dict[str, Any]

ERRORS = {
    "400": "over a limit, not supported, or not decodable",
    "401": "the key is wrong",
    "403": "the server has another name: --allowed-hosts",
    "404": "there is no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "422": "a wrong type",
    "500": "the server failed",
    "503": "the queue is full: see Retry-After",
    "504": "the reply took too long",
}
TEXT, WHOLE, TRUTH = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}


def describe(model: str, *, keyed: bool) -> Schema:
    """The description as JSON; `keyed` if clients must give a key."""
    bodies, definitions = models_json_schema(
        [(ChatRequest, "validation"), (CompletionRequest, "validation")],
        ref_template="#/components/schemas/{model}",
    )
    detail = _object(detail=TEXT)
    text_or_null = {"type": ["string", "null"]}
    error = _object(error=_object(message=TEXT, type=TEXT, param=text_or_null, code=text_or_null))
    card = _object(
        id={"const": model},
        object={"const": "model"},
        created=WHOLE,
        owned_by=TEXT,
        max_model_len=WHOLE,
    )
    choice = _object(
        index=WHOLE,
        message=_object(role={"const": "assistant"}, content=TEXT),
        finish_reason={"enum": ["stop", "length"]},
    )
    completion = _object(
        id=TEXT,
        object={"const": "chat.completion"},
        created=WHOLE,
        model={"const": model},
        choices={"type": "array", "items": choice},
        usage=_object(prompt_tokens=WHOLE, completion_tokens=WHOLE, total_tokens=WHOLE),
    )
    health = _object(
        status={"enum": ["ok", "failed"]},
        ready=TRUTH,
        num_gpus=WHOLE,
        available_workers=WHOLE,
        model={"type": "object"},
        defaults={"type": "object"},
        api_key=TRUTH,
    )
    stats = _object(
        total_workers=WHOLE, available_workers=WHOLE, busy_workers=WHOLE, queued_requests=WHOLE
    )

    def operation(
        name: str,
        summary: str,
        answer: Schema,
        *errors: str,
        schema: Schema = detail,
        open: bool = False,
        **more: Any,
    ) -> Schema:
        guarded = keyed and not open
        told = {
            status: _json(schema, ERRORS[status])
            for status in (*errors, *(["401"] if guarded else []))
        }
        return {
            "operationId": name,
            "summary": summary,
            "responses": {"200": {"description": "done", **answer}, **told},
            **({"security": [{"bearer": []}]} if guarded else {}),
            **more,
        }

    def body(of: type) -> Schema:
        return {
            "required": True,
            "content": {"application/json": {"schema": bodies[of, "validation"]}},
        }

    events: Schema = {"text/event-stream": {}}
    reading = ("400", "403", "408", "413", "500", "503")
    name_in_path = {"name": "model", "in": "path", "required": True, "schema": TEXT}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "nanochat_jax",
            "version": "1",
            "description": "A small ChatGPT, served.",
        },
        "paths": {
            "/chat/completions": {
                "post": operation(
                    "chat",
                    "A reply as server-sent events; a body with other fields is for OpenAI's API",
                    {"content": events},
                    *reading,
                    "422",
                    schema={"anyOf": [detail, error]},
                    requestBody=body(ChatRequest),
                )
            },
            "/v1/chat/completions": {
                "post": operation(
                    "openai_chat",
                    "OpenAI's chat completions: a completion, or its chunks as events",
                    {"content": {**events, **_json(completion)["content"]}},
                    *reading,
                    "404",
                    "504",
                    schema=error,
                    requestBody=body(CompletionRequest),
                )
            },
            "/v1/models": {
                "get": operation(
                    "list_models",
                    "The one model",
                    _json(_object(object={"const": "list"}, data={"type": "array", "items": card})),
                    schema=error,
                )
            },
            "/v1/models/{model}": {
                "get": operation(
                    "show_model",
                    "The model, if that is its id",
                    _json(card),
                    "404",
                    schema=error,
                    parameters=[name_in_path],
                )
            },
            "/health": {"get": operation("health", "Whether it is up", _json(health), open=True)},
            "/stats": {"get": operation("stats", "How many slots are busy", _json(stats))},
            "/metrics": {
                "get": operation("metrics", "Prometheus' numbers", {"content": {"text/plain": {}}})
            },
        },
        "components": {
            "schemas": definitions["$defs"],
            **(
                {"securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}}}
                if keyed
                else {}
            ),
        },
    }


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties)}


def _json(schema: Schema, description: str = "done") -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}

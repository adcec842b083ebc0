"""GET /openapi.json: a description of all APIs in OpenAPI 3.1, from the models of their bodies."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from nanochat_jax.serve.chat_request import ChatRequest
from nanochat_jax.serve.openai_api import Completion, ModelCard, ModelList
from nanochat_jax.serve.openai_request import CompletionRequest
from nanochat_jax.serve.text_completions import TextCompletion, TextCompletionRequest

Schema = dict[str, Any]
# "starting": programs are still compiled; requests are served, but may wait for theirs.
Status = Literal["starting", "ok", "failed"]


class Compilation(BaseModel):
    compiled: int
    left: int


class Health(BaseModel):
    status: Status
    ready: bool
    programs: Compilation
    num_gpus: int
    available_workers: int
    model: dict[str, Any]
    defaults: dict[str, Any]
    api_key: bool


class Worker(BaseModel):
    gpu_id: int
    device: str


class Stats(BaseModel):
    total_workers: int
    available_workers: int
    busy_workers: int
    queued_requests: int
    workers: list[Worker]


class Detail(BaseModel):
    detail: str


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    error: Error


@dataclass(frozen=True)
class Operation:
    path: str
    name: str
    summary: str
    answers: tuple[type[BaseModel] | str, ...]  # a model of JSON, or another content type
    statuses: str = ""  # of errors
    errors: tuple[type[BaseModel], ...] = (Detail,)
    body: type[BaseModel] | None = None
    open: bool = False  # needs no key


STATUSES = {
    "400": "a wrong value, an unsupported field, or a body that cannot be decoded",
    "401": "the key is wrong",
    "403": "the host name is not accepted",
    "404": "there is no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "422": "a wrong type",
    "500": "the server failed",
    "503": "the queue is full: see Retry-After",
    "504": "the reply took too long",
}
EVENTS = "text/event-stream"
BODY_STATUSES = "400 403 408 413 500 503"
OPERATIONS = (
    Operation(
        "/chat/completions",
        "chat",
        "A reply as server-sent events; a body with other fields is for OpenAI's API",
        (EVENTS,),
        f"{BODY_STATUSES} 422",
        (Detail, OpenAIError),
        ChatRequest,
    ),
    Operation(
        "/v1/chat/completions",
        "openai_chat",
        "OpenAI's chat completions: a completion, or its chunks as events",
        (EVENTS, Completion),
        f"{BODY_STATUSES} 404 504",
        (OpenAIError,),
        CompletionRequest,
    ),
    Operation(
        "/v1/completions",
        "openai_complete",
        "OpenAI's completions of text, with log-probabilities of the prompt",
        (TextCompletion,),
        f"{BODY_STATUSES} 404 504",
        (OpenAIError,),
        TextCompletionRequest,
    ),
    Operation("/v1/models", "list_models", "The one model", (ModelList,), "", (OpenAIError,)),
    Operation(
        "/v1/models/{model}",
        "show_model",
        "The model, if that is its id",
        (ModelCard,),
        "404",
        (OpenAIError,),
    ),
    Operation("/health", "health", "Whether the server works", (Health,), open=True),
    Operation("/stats", "stats", "How many slots are in use", (Stats,)),
    Operation("/metrics", "metrics", "Prometheus metrics", ("text/plain",)),
)


def describe(*, keyed: bool) -> Schema:
    """The description as JSON; `keyed` if clients must send a key."""
    models: dict[type[BaseModel], Literal["validation", "serialization"]] = {}
    for operation in OPERATIONS:
        answers = [answer for answer in operation.answers if not isinstance(answer, str)]
        models |= dict.fromkeys([*answers, *operation.errors], "serialization")
        if operation.body is not None:
            models[operation.body] = "validation"
    schemas, definitions = models_json_schema(
        list(models.items()), ref_template="#/components/schemas/{model}"
    )
    refs: dict[Any, Schema] = {model: schema for (model, _), schema in schemas.items()}
    components: Schema = {"schemas": definitions["$defs"]}
    if keyed:
        components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "nanochat_jax", "version": "1", "description": "A small ChatGPT."},
        "paths": {
            operation.path: {
                "post" if operation.body else "get": _describe(operation, refs, keyed=keyed)
            }
            for operation in OPERATIONS
        },
        "components": components,
    }


def _describe(operation: Operation, refs: dict[Any, Schema], *, keyed: bool) -> Schema:
    guarded = keyed and not operation.open
    content = {
        answer if isinstance(answer, str) else "application/json": (
            {} if isinstance(answer, str) else {"schema": refs[answer]}
        )
        for answer in operation.answers
    }
    responses = {"200": {"description": "done", "content": content}}
    error = {"schema": {"anyOf": [refs[model] for model in operation.errors]}}
    for status in operation.statuses.split() + ["401"] * guarded:
        responses[status] = {
            "description": STATUSES[status],
            "content": {"application/json": error},
        }
    described: Schema = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": responses,
    }
    if guarded:
        described["security"] = [{"bearer": []}]
    if operation.body is not None:
        body = {"application/json": {"schema": refs[operation.body]}}
        described["requestBody"] = {"required": True, "content": body}
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described

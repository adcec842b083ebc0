"""Prometheus metrics of the server, for GET /metrics."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from nanochat_jax.infer.request import Result
from nanochat_jax.infer.scheduler import Scheduler

CONTENT_TYPE = CONTENT_TYPE_LATEST
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
REPLY_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One application's metrics, in their own registry.

    Tokens come in bursts, one per dispatch of the engine, so the gap between two is mostly 0.
    `inter_token_seconds` is instead a reply's time after its first token, divided by the number of
    its other tokens: one observation per reply.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.registry = CollectorRegistry()
        named: dict[str, Any] = {"namespace": "nanochat", "registry": self.registry}
        self.http_requests = Counter(
            "http_requests", "Responses by route and status", ["route", "status"], **named
        )
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of finished replies", **named)
        self.cached_tokens = Counter(
            "cached_prompt_tokens", "Prompt tokens that were in the cache already", **named
        )
        self.generated_tokens = Counter(
            "generated_tokens", "Generated tokens, tool results included", **named
        )
        self.replies = Counter("replies", "Replies by reason of their end", ["reason"], **named)
        self.ttft = Histogram(
            "time_to_first_token_seconds",
            "From the request to the first text or tool call",
            buckets=TTFT_BUCKETS,
            **named,
        )
        self.inter_token = Histogram(
            "inter_token_seconds",
            "Mean time between tokens of a reply",
            buckets=TOKEN_BUCKETS,
            **named,
        )
        self.duration = Histogram(
            "reply_seconds",
            "From the request to the end of its reply",
            buckets=REPLY_BUCKETS,
            **named,
        )
        Gauge("slots", "Replies that can be generated at the same time", **named).set(
            scheduler.engine.num_slots
        )
        Gauge("active_requests", "Slots in use", **named).set_function(lambda: scheduler.num_active)
        Gauge("waiting_requests", "Requests in the queue", **named).set_function(
            lambda: scheduler.num_waiting
        )

    def finished(self, result: Result, first: float | None, seconds: float) -> None:
        """Count a reply: seconds to its first token (None without tokens) and to its end."""
        self.replies.labels(result.finish_reason).inc()
        self.prompt_tokens.inc(result.prompt_tokens)
        self.cached_tokens.inc(result.cached_tokens)
        self.generated_tokens.inc(len(result.tokens))
        self.duration.observe(seconds)
        if first is not None:
            self.ttft.observe(first)
            if len(result.tokens) > 1:
                self.inter_token.observe((seconds - first) / (len(result.tokens) - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)

"""Counters for Prometheus, named as llama-server names them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from tritgguf.serving.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_PREFIX = "llamacpp:"


def exposition(service: Service) -> bytes:
    """Return all counters in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(_Counters(service))
    return generate_latest(registry)


class _Counters(Collector):
    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield the counters."""
        service, thread, pool = self._service, self._service.engine_thread, self._service.model.engine.pool
        totals = service.totals
        running, pages = len(service.model.engine.running), len(pool.references)
        # prometheus_client appends _total to the names of counters.
        for name, value, meaning in (
            ("prompt_tokens", totals.prompt_tokens, "Prompt tokens evaluated."),
            ("prompt_tokens_cached", totals.cached_tokens, "Prompt tokens taken over from earlier requests."),
            ("prompt_seconds", totals.prompt_seconds, "Seconds of evaluating prompts."),
            ("tokens_predicted", totals.generated_tokens, "Tokens generated."),
            ("tokens_predicted_seconds", totals.decode_seconds, "Seconds of generating."),
            ("n_decode", thread.passes, "Forward passes."),
        ):
            yield CounterMetricFamily(_PREFIX + name, meaning, value=value)
        for name, value, meaning in (
            ("prompt_tokens_seconds", _rate(totals.prompt_tokens, totals.prompt_seconds), "Prompt tokens per second."),
            (
                "predicted_tokens_seconds",
                _rate(totals.generated_tokens, totals.decode_seconds),
                "Generated tokens per second of an answer.",
            ),
            ("requests_processing", running, "Answers that run."),
            ("requests_deferred", thread.waiting, "Answers that wait."),
            ("n_busy_slots_per_decode", _rate(thread.busy, thread.passes), "Answers in a forward pass, on average."),
            ("kv_cache_usage_ratio", 1 - pool.free_pages / pages, "Share of the pages of keys and values in use."),
        ):
            yield GaugeMetricFamily(_PREFIX + name, meaning, value=value)


def _rate(count: float, divisor: float) -> float:
    return count / divisor if divisor else 0.0

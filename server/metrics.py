"""The metrics page: latencies as they happen; engines, key stores and usage when Prometheus asks.

`metrics_experts` and `metrics_keys` name those of experts and keys. Labels are bounded: endpoints, layers, experts and
words from fixed lists; never ids, tenants or text.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.counters import Observers
from server.metrics_experts import UsageCollector
from server.metrics_families import PREFIX, counter, gauge, single_gauge
from server.metrics_keys import KeyCollector
from server.metrics_replicas import ReplicaCollector
from server.metrics_vllm import VllmNames
from server.registry import Registry
from server.settings import MetricsSettings

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FINE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DEFAULTS = MetricsSettings()


class Metrics:
    """The metrics of one application. Observers may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._duration = self._histogram(
            "request_duration_seconds", "From arrival to the last token.", SECONDS
        )
        self._first = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", SECONDS
        )
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens.", FINE_SECONDS)
        self._queued = self._histogram("queue_time_seconds", "From arrival to admission.", SECONDS)
        self._rejected = Counter(
            f"{PREFIX}requests_rejected",
            "Requests answered with an error, by its code.",
            ["reason"],
            registry=self.registry,
        )

        self._learned = Counter(
            f"{PREFIX}learned_tokens",
            "Tokens that requests were let teach with.",
            ["model"],
            registry=self.registry,
        )
        self._refused = Counter(
            f"{PREFIX}learned_tokens_refused",
            "Tokens that would have taught, by why they were not let.",
            ["model", "reason"],
            registry=self.registry,
        )

        self._startup = Gauge(
            f"{PREFIX}startup_seconds", "What the start took, by phase.", ["phase"], registry=self.registry
        )

    def observers(self) -> Observers:
        """What the engine reports latencies to."""
        return Observers(
            queued=lambda endpoint, seconds: self._queued.labels(endpoint).observe(seconds),
            first_token=lambda endpoint, seconds: self._first.labels(endpoint).observe(seconds),
            inter_token=lambda endpoint, seconds: self._between.labels(endpoint).observe(seconds),
            finished=lambda endpoint, seconds: self._duration.labels(endpoint).observe(seconds),
        )

    def count_rejected(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def count_learned(self, endpoint: str, tokens: int) -> None:
        self._learned.labels(endpoint).inc(tokens)

    def count_refused(self, endpoint: str, reason: Literal["budget"], tokens: int) -> None:
        self._refused.labels(endpoint, reason).inc(tokens)

    def note_startup(self, phase: Literal["import", "load", "listen"], seconds: float) -> None:
        self._startup.labels(phase).set(seconds)

    def watch(self, registry: Registry, version: str, settings: MetricsSettings = DEFAULTS) -> None:
        """Read these endpoints at every scrape from now on."""
        engines = EngineCollector(registry)
        self.registry.register(engines)
        if settings.compat == "vllm":
            self.registry.register(
                VllmNames((engines, self._duration, self._first, self._between, self._queued))
            )
        self.registry.register(UsageCollector(registry, settings.expert_detail))
        self.registry.register(KeyCollector(registry))
        self.registry.register(ReplicaCollector(registry))
        self.registry.register(BuildCollector(version))

    def page(self) -> bytes:
        """The text that Prometheus reads. Takes milliseconds: not for the event loop."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, ["model"], buckets=buckets, registry=self.registry)


@dataclass(frozen=True, slots=True)
class BuildCollector(Collector):
    """What is running."""

    version: str

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(f"{PREFIX}build_info", "Always 1.", labels=["version"])
        family.add_metric([self.version], 1)
        yield family


@dataclass(frozen=True, slots=True)
class EngineCollector(Collector):
    """Counters and queues of the engines."""

    served: Registry

    def collect(self) -> Iterator[Metric]:
        running = gauge("requests_running", "Requests that hold a slot.", "model")
        waiting = gauge("requests_waiting", "Requests that wait for a slot.", "model")
        prompt = counter("prompt_tokens", "Prompt tokens computed.", "model")
        generated = counter("generation_tokens", "Tokens generated.", "model")
        finished = counter("request_finished", "Requests ended, by why.", "model", "reason")
        queries = counter(
            "prefix_cache_query_tokens", "Prompt tokens that were looked up in the prefix cache.", "model"
        )
        hits = counter(
            "prefix_cache_hit_tokens", "Prompt tokens taken from the prefix cache, not computed.", "model"
        )
        renewals = counter(
            "within_request_waits", "Waits of a prompt for what it taught.", "model", "outcome"
        )
        for name, endpoint in self.served.endpoints.items():
            runner, counters = endpoint.runner, endpoint.runner.engine.counters
            running.add_metric([name], sum(s.endpoint == name for s in runner.running()))
            waiting.add_metric([name], sum(s.endpoint == name for s in runner.waiting()))
            prompt.add_metric([name], counters.prompt_tokens[name])
            queries.add_metric([name], counters.prefix_queries[name])
            hits.add_metric([name], counters.prefix_hits[name])
            generated.add_metric([name], counters.generated_tokens[name])
            for (of, reason), count in counters.finished.copy().items():
                if of == name:
                    finished.add_metric([name, reason], count)
            for (of, outcome), count in counters.renewals.copy().items():
                if of == name:
                    renewals.add_metric([name, outcome], count)
        yield from (running, waiting, prompt, generated, finished, queries, hits, renewals)
        yield from self._engines()

    def _engines(self) -> Iterator[Metric]:
        engines = [runner.engine for runner in self.served.runners]
        yield single_gauge(
            "kv_cache_usage_ratio",
            "Share of the reserved memory for keys and values.",
            sum(e.cache.reserved_tokens for e in engines)
            / max(1, sum(e.cache.capacity_tokens for e in engines)),
        )
        yield single_gauge(
            "prefix_cache_tokens",
            "Tokens whose keys and values are kept for prompts that begin alike.",
            sum(e.prefixes.tokens for e in engines),
        )
        evicted = counter("prefix_cache_evicted_tokens", "Tokens that the prefix cache gave up to make room.")
        evicted.add_metric([], sum(e.prefixes.evicted_tokens for e in engines))
        yield evicted
        steps = counter("engine_steps", "Batches computed, by outcome.", "outcome")
        steps.add_metric(["ok"], sum(e.counters.steps for e in engines))
        steps.add_metric(["failed"], sum(e.counters.failed_steps for e in engines))
        yield steps
        lessons = counter("lessons_failed", "Chunks of prompts whose lesson raised.")
        lessons.add_metric([], sum(e.counters.lessons_failed for e in engines))
        yield lessons

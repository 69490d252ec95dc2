"""Every metric of the server, by name. Engines, key stores and usage are read when Prometheus asks.

Labels are bounded: endpoints, layers, experts and words from fixed lists; never ids, tenants or text.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from keystore.projection import load_balance
from keystore.records import ScopeId
from model.blocks.base import ExpertUsage
from server.engine.engine import Observers
from server.keyspace import DriftReadings, idle_experts, retired_experts
from server.registry import Plasticity, Registry

PREFIX = "libration_"
EXPERT_DETAIL_LIMIT = 1024  # layers x experts, above which per-expert series are left to /usage
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
FINE_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


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

    def watch(self, registry: Registry, version: str) -> None:
        """Read these endpoints at every scrape from now on."""
        self.registry.register(EngineCollector(registry))
        self.registry.register(UsageCollector(registry))
        self.registry.register(KeyCollector(registry))
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
        running = _gauge("requests_running", "Requests that hold a slot.", "model")
        waiting = _gauge("requests_waiting", "Requests that wait for a slot.", "model")
        prompt = _counter("prompt_tokens", "Prompt tokens computed.", "model")
        generated = _counter("generation_tokens", "Tokens generated.", "model")
        finished = _counter("request_finished", "Requests ended, by why.", "model", "reason")
        renewals = _counter(
            "within_request_waits", "Waits of a prompt for what it taught.", "model", "outcome"
        )
        for name, endpoint in self.served.endpoints.items():
            runner, counters = endpoint.runner, endpoint.runner.engine.counters
            running.add_metric([name], sum(s.endpoint == name for s in runner.running()))
            waiting.add_metric([name], sum(s.endpoint == name for s in runner.waiting()))
            prompt.add_metric([name], counters.prompt_tokens[name])
            generated.add_metric([name], counters.generated_tokens[name])
            for (of, reason), count in counters.finished.copy().items():
                if of == name:
                    finished.add_metric([name, reason], count)
            for (of, outcome), count in counters.renewals.copy().items():
                if of == name:
                    renewals.add_metric([name, outcome], count)
        yield from (running, waiting, prompt, generated, finished, renewals)
        yield from self._engines()

    def _engines(self) -> Iterator[Metric]:
        engines = [runner.engine for runner in self.served.runners]
        yield _single_gauge(
            "kv_cache_usage_ratio",
            "Share of the reserved memory for keys and values.",
            sum(e.cache.reserved_tokens for e in engines)
            / max(1, sum(e.cache.capacity_tokens for e in engines)),
        )
        steps = _counter("engine_steps", "Batches computed, by outcome.", "outcome")
        steps.add_metric(["ok"], sum(e.counters.steps for e in engines))
        steps.add_metric(["failed"], sum(e.counters.failed_steps for e in engines))
        yield steps
        lessons = _counter("lessons_failed", "Chunks of prompts whose lesson raised.")
        lessons.add_metric([], sum(e.counters.lessons_failed for e in engines))
        yield lessons


@dataclass(frozen=True, slots=True)
class UsageCollector(Collector):
    """Which experts work how much, from the matrix that /v1/keys/{endpoint}/usage shows."""

    served: Registry

    def collect(self) -> Iterator[Metric]:
        families = (
            _counter("expert_tokens", "Tokens an expert worked on.", "model", "layer", "expert", "phase"),
            _counter("layer_routed_tokens", "Tokens routed by a layer.", "model", "layer", "phase"),
            _gauge("expert_load_imbalance_ratio", "Largest load over the mean load.", "model", "layer"),
            _gauge("expert_load_jain_index", "1: even load; 1/experts: all on one.", "model", "layer"),
            _gauge("routing_entropy_ratio", "Entropy of the load over its maximum.", "model", "layer"),
            _gauge("experts_idle", "Experts under a tenth of a fair share.", "model", "layer"),
        )
        for name, endpoint in self.served.endpoints.items():
            if endpoint.usage is not None:
                _add_usage(families, name, endpoint.usage, endpoint.plasticity)
        yield from families


class KeyCollector(Collector):
    """Where the keys are, and how learning goes."""

    def __init__(self, registry: Registry):
        self._served = registry
        self._drift = DriftReadings()

    def collect(self) -> Iterator[Metric]:
        enabled = _gauge("plasticity_enabled", "1 while requests teach by default.", "model")
        for name, endpoint in self._served.endpoints.items():
            enabled.add_metric([name], int(_learns(endpoint.plasticity)))
        yield enabled
        plastic = {n: e.plasticity for n, e in self._served.endpoints.items() if e.plasticity is not None}
        yield from _learning(plastic)
        yield from _canary(plastic)
        yield from _value_offsets(plastic)
        yield from self._positions(plastic)

    def _positions(self, plastic: dict[str, Plasticity]) -> Iterable[Metric]:
        version = _gauge("key_version", "Newest key version of any tenant or of all.", "model")
        drift = _gauge(
            "key_drift_ratio", "Distance from the anchor over the trust radius.", "model", "layer", "stat"
        )
        distance = _gauge("key_min_distance", "Between the two closest keys of a layer.", "model", "layer")
        for name, plasticity in plastic.items():
            store = plasticity.store
            scopes = [s for s in store.scopes() if s.kind in ("tenant", "global")] or [ScopeId("anchor")]
            views = [store.view(scope) for scope in scopes]
            version.add_metric([name], max(view.version for view in views))
            readings = [self._drift.of(store, view) for view in views]
            for layer in readings[0]:
                at = [reading[layer] for reading in readings]
                drift.add_metric([name, str(layer), "max"], max(each.drift_max for each in at))
                drift.add_metric([name, str(layer), "mean"], sum(each.drift_mean for each in at) / len(at))
                distance.add_metric([name, str(layer)], min(each.min_distance for each in at))
        return version, drift, distance


def _learning(plastic: dict[str, Plasticity]) -> Iterable[Metric]:
    updates = _counter("key_updates", "Windows consolidated, by outcome.", "model", "outcome")
    dropped = _counter("routing_events_dropped", "Windows never learned, by reason.", "model", "reason")
    duration = _gauge("key_update_duration_seconds", "Duration of the newest consolidation.", "model")
    lag = _gauge("consolidation_lag_seconds", "Age of the oldest window not yet learned.", "model")
    degraded = _gauge("store_degraded", "1 from a failed consolidation to the next good one.", "model")
    recall = _gauge("key_index_recall_ratio", "Sampled recall of a large layer's index.", "model", "layer")
    builds = _counter("key_index_rebuilds", "Indexes of large layers built.", "model", "layer", "outcome")
    for name, plasticity in plastic.items():
        counters = plasticity.store.counters()
        for outcome, count in counters.updates.items():
            updates.add_metric([name, outcome], count)
        for reason, count in counters.dropped.items():
            dropped.add_metric([name, reason], count)
        duration.add_metric([name], counters.last_update_s)
        lag.add_metric([name], counters.oldest_waiting_s)
        degraded.add_metric([name], int(plasticity.store.degraded))
        for layer, ratio in counters.index_recall.items():
            recall.add_metric([name, str(layer)], ratio)
        for (layer, outcome), count in counters.index_builds.items():
            builds.add_metric([name, str(layer), outcome], count)
    return updates, dropped, duration, lag, degraded, recall, builds


def _canary(plastic: dict[str, Plasticity]) -> Iterable[Metric]:
    """Nothing of an endpoint before its first probe. The worst of the newest readings of all scopes."""
    loss = _gauge("canary_loss_nats", "Loss of the canary text; worst of all scopes.", "model", "keys")
    overlap = _gauge("canary_overlap_ratio", "Routing kept of the anchors'; worst of all scopes.", "model")
    rollbacks = _counter("rollbacks", "Scopes sent back to an older version.", "model", "reason")
    for name, plasticity in plastic.items():
        readings = plasticity.store.canary_readings().values()
        if readings:
            loss.add_metric([name, "anchors"], max(each.anchors_loss_nats for each in readings))
            loss.add_metric([name, "worst"], max(each.loss_nats for each in readings))
            overlap.add_metric([name], min(each.overlap for each in readings))
        for reason, count in plasticity.store.counters().rollbacks.items():
            rollbacks.add_metric([name, reason], count)
    return loss, overlap, rollbacks


def _value_offsets(plastic: dict[str, Plasticity]) -> Iterable[Metric]:
    """Nothing of an endpoint that does not offer them."""
    sessions = _gauge("value_offsets_sessions", "Sessions that hold value offsets.", "model")
    held = _gauge("value_offsets_bytes", "Memory of all sessions' value offsets.", "model")
    windows = _counter("value_offsets_windows", "Windows that moved offsets or not.", "model", "outcome")
    for name, plasticity in plastic.items():
        if plasticity.value_offsets is None:
            continue
        count, size_bytes = plasticity.value_offsets.held()
        sessions.add_metric([name], count)
        held.add_metric([name], size_bytes)
        for outcome, moved in plasticity.value_offsets.windows.copy().items():
            windows.add_metric([name, outcome], moved)
    return sessions, held, windows


def _add_usage(
    families: tuple[Metric, ...], name: str, usage: ExpertUsage, plasticity: Plasticity | None
) -> None:
    expert_tokens, layer_tokens, imbalance, jain, entropy, idle = families
    counts = {layer: usage.of_layer(layer) for layer in usage.layers}  # (phases, experts) each
    in_detail = sum(each.shape[1] for each in counts.values()) <= EXPERT_DETAIL_LIMIT
    for layer, by_phase in counts.items():
        for phase, row in zip(usage.PHASES, by_phase, strict=True):
            labels = {"model": name, "layer": str(layer), "phase": phase}
            routed = int(row.sum()) // usage.num_experts_per_tok
            layer_tokens.add_sample(f"{layer_tokens.name}_total", labels, routed)
            for expert, tokens in enumerate(row.tolist() if in_detail else ()):
                expert_tokens.add_sample(
                    f"{expert_tokens.name}_total", labels | {"expert": str(expert)}, tokens
                )
        load: NDArray[np.int64] = by_phase.sum(axis=0)
        if plasticity is not None:
            load = np.delete(load, retired_experts(plasticity.store, layer))
        balance = load_balance(load.astype(np.float32))
        labels = {"model": name, "layer": str(layer)}
        imbalance.add_sample(imbalance.name, labels, balance.imbalance)
        jain.add_sample(jain.name, labels, balance.jain_index)
        entropy.add_sample(entropy.name, labels, balance.entropy_ratio)
        idle.add_sample(idle.name, labels, idle_experts(load))


def _learns(plasticity: Plasticity | None) -> bool:
    return plasticity is not None and plasticity.default == "learn" and not plasticity.store.is_frozen()


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=labels)


def _single_gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = _gauge(name, text)
    family.add_metric([], value)
    return family

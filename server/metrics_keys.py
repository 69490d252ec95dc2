"""Metrics of the routing keys: where they are, how learning goes, what the guard measured."""

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from keystore.errors import StoreUnavailable
from keystore.records import ScopeId
from keystore.snapshot import KeySnapshot
from keystore.store import KeyStore
from server.keyspace import DriftReadings
from server.metrics_families import PREFIX, buckets, counter, gauge
from server.registry import Plasticity, Registry


class KeyCollector(Collector):
    """Where the keys are, and how learning goes."""

    def __init__(self, registry: Registry):
        self._served = registry
        self._drift = DriftReadings()

    def collect(self) -> Iterator[Metric]:
        enabled = gauge("plasticity_enabled", "1 while requests teach by default.", "model")
        for name, endpoint in self._served.endpoints.items():
            enabled.add_metric([name], int(_learns(endpoint.plasticity)))
        yield enabled
        plastic = {n: e.plasticity for n, e in self._served.endpoints.items() if e.plasticity is not None}
        yield from _learning(plastic)
        yield from _canary(plastic)
        yield from _value_offsets(plastic)
        yield from self._positions(plastic)

    def _positions(self, plastic: dict[str, Plasticity]) -> Iterable[Metric]:
        version = gauge("key_version", "Newest key version of any tenant or of all.", "model")
        drift = gauge(
            "key_drift_ratio", "Distance from the anchor over the trust radius.", "model", "layer", "stat"
        )
        distance = gauge("key_min_distance", "Between the two closest keys of a layer.", "model", "layer")
        for name, plasticity in plastic.items():
            store = plasticity.store
            views = _views_at_hand(store) or [store.view(ScopeId("anchor"))]
            version.add_metric([name], max(view.version for view in views))
            readings = [self._drift.of(store, view) for view in views]
            for layer in readings[0]:
                at = [reading[layer] for reading in readings]
                drift.add_metric([name, str(layer), "max"], max(each.drift_max for each in at))
                drift.add_metric([name, str(layer), "mean"], sum(each.drift_mean for each in at) / len(at))
                distance.add_metric([name, str(layer)], min(each.min_distance for each in at))
        return version, drift, distance


def _views_at_hand(store: KeyStore) -> list[KeySnapshot]:
    """Every tenant's keys, and everybody's; without those that only a store has which is away."""
    views: list[KeySnapshot] = []
    for scope in store.scopes():
        if scope.kind != "session":
            with contextlib.suppress(StoreUnavailable):
                views.append(store.view(scope))
    return views


def _learning(plastic: dict[str, Plasticity]) -> Iterable[Metric]:
    updates = counter("key_updates", "Windows consolidated, by outcome.", "model", "outcome")
    dropped = counter("routing_events_dropped", "Windows never learned, by reason.", "model", "reason")
    duration = gauge("key_update_duration_seconds", "Duration of the newest consolidation.", "model")
    behind = gauge("credit_waiting_tokens", "Prompt tokens whose credit is still to be computed.", "model")
    lag = gauge("consolidation_lag_seconds", "Age of the oldest window not yet learned.", "model")
    degraded = gauge("store_degraded", "1 from a failed consolidation to the next good one.", "model")
    recall = gauge("key_index_recall_ratio", "Sampled recall of a large layer's index.", "model", "layer")
    builds = counter("key_index_rebuilds", "Indexes of large layers built.", "model", "layer", "outcome")
    operations = HistogramMetricFamily(
        f"{PREFIX}store_operation_duration_seconds",
        "What waited for the storage behind the keys.",
        labels=["model", "op"],
    )
    for name, plasticity in plastic.items():
        counters = plasticity.store.counters()
        for op, took in counters.operations.items():
            operations.add_metric([name, op], buckets(took.counts), took.sum_s)
        for outcome, count in counters.updates.items():
            updates.add_metric([name, outcome], count)
        for reason, count in counters.dropped.items():
            dropped.add_metric([name, reason], count)
        duration.add_metric([name], counters.last_update_s)
        behind.add_metric([name], plasticity.teacher.credit_waiting_tokens)
        lag.add_metric([name], counters.oldest_waiting_s)
        degraded.add_metric([name], int(plasticity.store.degraded))
        for layer, ratio in counters.index_recall.items():
            recall.add_metric([name, str(layer)], ratio)
        for (layer, outcome), count in counters.index_builds.items():
            builds.add_metric([name, str(layer), outcome], count)
    return updates, dropped, duration, behind, lag, degraded, recall, builds, operations


def _canary(plastic: dict[str, Plasticity]) -> Iterable[Metric]:
    """Nothing of an endpoint before its first probe. The worst of the newest readings of all scopes."""
    loss = gauge("canary_loss_nats", "Loss of the canary text; worst of all scopes.", "model", "keys")
    overlap = gauge("canary_overlap_ratio", "Routing kept of the anchors'; worst of all scopes.", "model")
    rollbacks = counter("rollbacks", "Scopes sent back to an older version.", "model", "reason")
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
    sessions = gauge("value_offsets_sessions", "Sessions that hold value offsets.", "model")
    held = gauge("value_offsets_bytes", "Memory of all sessions' value offsets.", "model")
    windows = counter("value_offsets_windows", "Windows that moved offsets or not.", "model", "outcome")
    for name, plasticity in plastic.items():
        if plasticity.value_offsets is None:
            continue
        count, size_bytes = plasticity.value_offsets.held()
        sessions.add_metric([name], count)
        held.add_metric([name], size_bytes)
        for outcome, moved in plasticity.value_offsets.windows.copy().items():
            windows.add_metric([name, outcome], moved)
    return sessions, held, windows


def _learns(plasticity: Plasticity | None) -> bool:
    return plasticity is not None and plasticity.default == "learn" and not plasticity.store.is_frozen()

"""Metrics of key stores that several servers share: how this one keeps up with the others."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.metrics_families import PREFIX, buckets, counter, gauge
from server.registry import Registry


@dataclass(frozen=True, slots=True)
class ReplicaCollector(Collector):
    """Nothing of an endpoint whose keys this server has alone."""

    served: Registry

    def collect(self) -> Iterator[Metric]:
        connected = gauge("replica_connected", "1 while the shared store is followed.", "model")
        scopes = gauge("replica_outbox_scopes", "Scopes whose statistics wait to be sent.", "model")
        pending = gauge("replica_pending_entries", "Statistics in Redis that no worker has learned.", "model")
        resent = counter("replica_resent", "Statistics sent again after an unclear failure.", "model")
        resyncs = counter("replica_resyncs", "Gaps in the stream of versions.", "model")
        regressions = counter("replica_regressions", "Times that the shared store went back.", "model")
        refused = counter(
            "replica_refused_versions", "Versions not adopted: out of bounds, damaged.", "model"
        )
        delay = HistogramMetricFamily(
            f"{PREFIX}replica_propagation_seconds", "From a commit until it is served here.", labels=["model"]
        )
        for name, endpoint in self.served.endpoints.items():
            reading = None if endpoint.plasticity is None else endpoint.plasticity.store.replication()
            if reading is None:
                continue
            connected.add_metric([name], int(reading.connected))
            scopes.add_metric([name], reading.outbox_scopes)
            pending.add_metric([name], reading.pending_entries)
            resent.add_metric([name], reading.resent)
            resyncs.add_metric([name], reading.resyncs)
            regressions.add_metric([name], reading.regressions)
            refused.add_metric([name], reading.refused)
            delay.add_metric([name], buckets(reading.delay_counts), reading.delay_sum_s)
        yield from (connected, scopes, pending, resent, resyncs, regressions, refused, delay)

"""The metrics of a worker, by name. Labels are endpoints, shards and words from fixed lists."""

from collections.abc import Iterator
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from server.metrics_families import counter, gauge, single_gauge
from server.worker.models import WorkedModels


@dataclass(frozen=True, slots=True)
class WorkerCollector(Collector):
    """Everything, read when Prometheus asks."""

    models: WorkedModels

    def collect(self) -> Iterator[Metric]:
        entries = counter("worker_entries", "Statistics taken in, by outcome.", "model", "outcome")
        tokens = counter("worker_learned_tokens", "Tokens that became part of a version.", "model")
        versions = counter("worker_versions", "Versions committed.", "model")
        conflicts = counter("worker_conflicts", "Batches begun anew after a change by hand.", "model")
        fenced = counter("worker_fenced", "Leases that were over when they were used.", "model")
        failures = counter("worker_failures", "Batches that failed and are tried again.", "model")
        batch = gauge("worker_batch_seconds", "Duration of the newest commit, learning included.", "model")
        shards = gauge("worker_shards", "Shards that are learned here.", "model")
        pending = gauge("worker_pending_entries", "Statistics that wait in these shards.", "model")
        for model in self.models.running.values():
            name, counters = [model.card.endpoint], model.counters
            for outcome, count in counters.entries().items():
                entries.add_metric([*name, outcome], count)
            tokens.add_metric(name, counters.tokens)
            versions.add_metric(name, counters.versions)
            conflicts.add_metric(name, counters.conflicts)
            fenced.add_metric(name, counters.fenced)
            failures.add_metric(name, counters.failures)
            batch.add_metric(name, counters.last_batch_s)
            shards.add_metric(name, len(model.held))
            pending.add_metric(name, sum(model.pending.values()))
        yield from (entries, tokens, versions, conflicts, fenced, failures, batch, shards, pending)
        yield single_gauge("worker_degraded", "1 while Redis does not answer.", int(not self.models.in_touch))

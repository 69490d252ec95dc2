"""The most important figures under vLLM's names, for dashboards and gateways that know only those.

The figures are those of Libration's own families; knows nothing of where they come from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.metrics_families import PREFIX

VLLM = "vllm:"
NAMES: Mapping[str, str] = {
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_cache_usage_ratio": "kv_cache_usage_perc",  # a share from 0 to 1 there, too
    "prompt_tokens": "prompt_tokens",
    "prefix_cache_query_tokens": "prefix_cache_queries",  # in tokens there, too
    "prefix_cache_hit_tokens": "prefix_cache_hits",
    "generation_tokens": "generation_tokens",
    "request_finished": "request_success",
    "request_duration_seconds": "e2e_request_latency_seconds",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "queue_time_seconds": "request_queue_time_seconds",
}
LABELS: Mapping[str, str] = {"model": "model_name", "reason": "finished_reason"}
SUCCESSES = ("stop", "length")  # the only ends that `request_success` counts


@dataclass(frozen=True, slots=True)
class VllmNames(Collector):
    """What some collectors show, again under other names; what vLLM has no name for is left out."""

    collectors: Sequence[Collector]

    def collect(self) -> Iterator[Metric]:
        for family in (each for collector in self.collectors for each in collector.collect()):
            theirs = NAMES.get(family.name.removeprefix(PREFIX))
            if theirs is None:
                continue
            renamed = Metric(VLLM + theirs, family.documentation, family.type)
            renamed.samples = [
                _renamed(sample, family.name, renamed.name)
                for sample in family.samples
                if sample.labels.get("reason", SUCCESSES[0]) in SUCCESSES
            ]
            yield renamed


def _renamed(sample: Sample, before: str, after: str) -> Sample:
    labels = {LABELS.get(name, name): value for name, value in sample.labels.items()}
    return sample._replace(name=after + sample.name.removeprefix(before), labels=labels)

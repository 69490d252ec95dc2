"""Metrics of the experts: which of them work, and how evenly."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from keystore.projection import load_balance
from model.blocks.base import ExpertUsage
from server.keyspace import idle_experts, retired_experts
from server.metrics_families import counter, gauge
from server.registry import Plasticity, Registry
from server.settings import ExpertDetail

EXPERT_DETAIL_LIMIT = 1024  # layers x experts, above which "auto" leaves per-expert series to /usage


@dataclass(frozen=True, slots=True)
class UsageCollector(Collector):
    """Which experts work how much, from the matrix that /v1/keys/{endpoint}/usage shows."""

    served: Registry
    detail: ExpertDetail

    def collect(self) -> Iterator[Metric]:
        families = (
            counter("expert_tokens", "Tokens an expert worked on.", "model", "layer", "expert", "phase"),
            counter("layer_routed_tokens", "Tokens routed by a layer.", "model", "layer", "phase"),
            gauge("expert_load_imbalance_ratio", "Largest load over the mean load.", "model", "layer"),
            gauge("expert_load_jain_index", "1: even load; 1/experts: all on one.", "model", "layer"),
            gauge("routing_entropy_ratio", "Entropy of the load over its maximum.", "model", "layer"),
            gauge("experts_idle", "Experts under a tenth of a fair share.", "model", "layer"),
        )
        for name, endpoint in self.served.endpoints.items():
            if endpoint.usage is not None:
                experts = sum(endpoint.usage.of_layer(layer).shape[1] for layer in endpoint.usage.layers)
                in_detail = self.detail == "always" or experts <= EXPERT_DETAIL_LIMIT
                in_detail = in_detail and self.detail != "never"
                _add_usage(families, name, endpoint.usage, endpoint.plasticity, in_detail=in_detail)
        yield from families


def _add_usage(
    families: tuple[Metric, ...],
    name: str,
    usage: ExpertUsage,
    plasticity: Plasticity | None,
    *,
    in_detail: bool,
) -> None:
    expert_tokens, layer_tokens, imbalance, jain, entropy, idle = families
    counts = {layer: usage.of_layer(layer) for layer in usage.layers}  # (phases, experts) each
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

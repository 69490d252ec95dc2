"""One window applied to one scope's version: gravity over all its layers, bounds checked. Commits nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from keystore.errors import InvalidConfig, InvalidStatistics
from keystore.gravity import check_bounds, consolidate_layer, initial_usage
from keystore.index_builder import IndexBuilder
from keystore.records import Float32Array, GravityConfig, RoutingStats, ScopeId
from keystore.snapshot import KeySnapshot, build_indexes, checksum_of, read_only


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a scope stands: its latest version, and usage and tokens including windows that moved no key
    since.
    """

    snapshot: KeySnapshot
    usage: Mapping[int, Float32Array]
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """The law and the anchors it is measured from."""

    origin: KeySnapshot
    gravity: GravityConfig
    num_experts_per_tok: int

    def check_fits(self, stats: RoutingStats) -> None:
        """Raises InvalidStatistics when layers, shapes or bonding are not this store's."""
        if stats.tokens < 0 or not stats.layers.keys() <= self.origin.usage.keys():
            raise InvalidStatistics(
                f"statistics of {stats.tokens} tokens in layers {sorted(stats.layers)};"
                f" allowed: 0 or more tokens, plastic layers {list(self.origin.usage)}"
            )
        for layer, sums in stats.layers.items():
            shape = self.origin.keys_of(layer).shape
            if sums.weighted_queries.shape != shape or sums.events.shape != shape[:1]:
                raise InvalidStatistics(
                    f"layer {layer} has sums {sums.weighted_queries.shape}; allowed: {shape}"
                )
            if self.gravity.bonding_rate and sums.coactivation is None:
                raise InvalidStatistics(f"layer {layer} has no coactivation; bonding_rate needs it")

    def advance(self, before: Progress, stats: RoutingStats, version: int, created_at: float) -> Progress:
        """`before` after one window; the very same snapshot when no key moved. Raises OutOfBounds."""
        base, keys, usage = before.snapshot, dict(before.snapshot.keys), dict(before.usage)
        for layer in sorted(stats.layers):
            keys[layer], usage[layer] = self._consolidate(
                layer, keys[layer], usage[layer], stats, before.tokens
            )
        tokens = before.tokens + stats.tokens
        if all(keys[layer] is base.keys_of(layer) for layer in keys):
            return Progress(base, usage, tokens)
        forked = "" if base.scope == stats.scope else f", forked from {base.scope} version {base.version}"
        indexes, usage = build_indexes(keys, base.indexes), read_only(usage)
        snapshot = replace(
            base,
            scope=stats.scope,
            version=version,
            parent=base.version,
            reason=f"learned from {stats.tokens} tokens{forked}",
            created_at=created_at,
            tokens=tokens,
            indexes=indexes,
            usage=usage,
            checksum=checksum_of(keys, usage),
        )
        return Progress(snapshot, usage, tokens)

    def _consolidate(
        self, layer: int, keys: Float32Array, usage: Float32Array, stats: RoutingStats, learned_tokens: int
    ) -> tuple[Float32Array, Float32Array]:
        anchors = self.origin.keys_of(layer)
        update = consolidate_layer(
            anchors,
            keys,
            usage,
            stats.layers[layer],
            self.gravity,
            num_experts_per_tok=self.num_experts_per_tok,
            window_tokens=stats.tokens,
            learned_tokens=learned_tokens,
        )
        check_bounds(anchors, update.keys, self.gravity.trust_radius)
        return update.keys, update.usage


def create_origin(
    model_id: str,
    anchors: Mapping[int, Float32Array],
    gravity: GravityConfig,
    plastic_layers: Collection[int],
    index_builder: IndexBuilder,
    now: float,
) -> KeySnapshot:
    """Version 0: a copy of the anchors. Raises InvalidConfig when one is not finite or not (M, D)."""
    keys = {layer: np.array(rows, dtype=np.float32, order="C") for layer, rows in anchors.items()}
    for layer, rows in keys.items():
        if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
            raise InvalidConfig(f"anchors of layer {layer}", rows.shape, "finite float32 of shape (M, D)")
    indexes = index_builder.create(keys)
    usage = read_only({layer: initial_usage(len(keys[layer]), gravity) for layer in plastic_layers})
    return KeySnapshot(
        model_id=model_id,
        scope=ScopeId("anchor"),
        version=0,
        parent=None,
        reason="the anchors",
        created_at=now,
        tokens=0,
        indexes=indexes,
        usage=usage,
        checksum=checksum_of(keys, usage),
    )

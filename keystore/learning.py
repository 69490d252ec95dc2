"""One window applied to one scope's version: gravity over all its layers, bounds checked. Commits nothing."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from keystore.errors import InvalidConfig, InvalidStatistics
from keystore.gravity import BoolArray, check_bounds, consolidate_layer, initial_usage
from keystore.index_builder import IndexBuilder
from keystore.pool import ExpertPool
from keystore.records import Float32Array, GravityConfig, Int64Array, ScopeId
from keystore.settling import SettlingState, advance_settling, settle
from keystore.snapshot import LEARNED, KeySnapshot, build_indexes, checksum_of, read_only
from keystore.statistics import LayerStats, RoutingStats
from keystore.visible_index import rows_of


@dataclass(frozen=True, slots=True, eq=False)
class Progress:
    """Where a scope stands: its latest version, and usage and tokens including windows that moved no key
    since.
    """

    snapshot: KeySnapshot
    usage: Mapping[int, Float32Array]
    tokens: int
    settling: Mapping[int, SettlingState] = field(  # of the layers where experts look for an address
        default_factory=dict[int, SettlingState]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Learner:
    """The law, and the anchors it is measured from: those of the current generation of the expert pool."""

    pool: ExpertPool
    gravity: GravityConfig
    num_experts_per_tok: int

    def check_fits(self, stats: RoutingStats) -> None:
        """Raises InvalidStatistics when layers, shapes or bonding are not this store's."""
        if stats.tokens < 0 or not stats.layers.keys() <= set(self.pool.plastic_layers):
            raise InvalidStatistics(
                f"statistics of {stats.tokens} tokens in layers {sorted(stats.layers)};"
                f" allowed: 0 or more tokens, plastic layers {list(self.pool.plastic_layers)}"
            )
        for layer, sums in stats.layers.items():
            num_experts, dim = self.pool.keys[layer].shape
            fewest, experts = self.pool.born_experts(layer), len(sums.events)
            fits = sums.weighted_queries.shape == (experts, dim) and fewest <= experts <= num_experts
            if not fits:
                raise InvalidStatistics(
                    f"layer {layer} has sums {sums.weighted_queries.shape} of {experts} experts;"
                    f" allowed: {fewest} to {num_experts} experts of {dim}, as the pool was or is"
                )
            if sums.utility is not None and sums.utility.moments.shape != (dim, dim):
                raise InvalidStatistics(
                    f"layer {layer} has moments of {sums.utility.moments.shape}; allowed: {dim}"
                )
            if self.gravity.bonding_rate and sums.coactivation is None:
                raise InvalidStatistics(f"layer {layer} has no coactivation; bonding_rate needs it")

    def advance(self, before: Progress, stats: RoutingStats, version: int, created_at: float) -> Progress:
        """`before` after one window; the very same snapshot when no key moved. Raises OutOfBounds."""
        base, keys, usage = before.snapshot, dict(before.snapshot.keys), dict(before.usage)
        settling = dict(before.settling)
        for layer in sorted(stats.layers):
            keys[layer], usage[layer] = self._consolidate(
                layer, base, keys[layer], usage[layer], stats, before.tokens
            )
            if len(self.pool.settles_in(stats.scope, layer)) and stats.layers[layer].utility is not None:
                keys[layer], settling[layer] = self._settle(layer, keys[layer], settling.get(layer), stats)
        tokens = before.tokens + stats.tokens
        if all(keys[layer] is base.keys_of(layer) for layer in keys):
            return Progress(base, usage, tokens, settling)
        forked = "" if base.scope == stats.scope else f", forked from {base.scope} version {base.version}"
        indexes, usage = build_indexes(keys, base.indexes), read_only(usage)
        snapshot = replace(
            base,
            scope=stats.scope,
            version=version,
            parent=base.version,
            reason=f"{LEARNED} {stats.tokens} tokens{forked}",
            created_at=created_at,
            tokens=tokens,
            indexes=indexes,
            usage=usage,
            checksum=checksum_of(keys, usage, base.visible),
        )
        return Progress(snapshot, usage, tokens, settling)

    def _settle(
        self, layer: int, keys: Float32Array, state: SettlingState | None, stats: RoutingStats
    ) -> tuple[Float32Array, SettlingState]:
        """Settling experts at the address that the tokens so far speak for, at the length of a born expert's key."""
        ids = self.pool.settles_in(stats.scope, layer)
        known = SettlingState.empty(ids, keys.shape[1]) if state is None else state.of(ids)
        after = advance_settling(known, stats.layers[layer], self.gravity, stats.tokens)
        born = self.pool.keys[layer][: self.pool.born_experts(layer)]
        settled, _ = settle(keys, after, self.gravity, float(np.linalg.norm(born, axis=1).mean()))
        return settled, after

    def _consolidate(
        self,
        layer: int,
        base: KeySnapshot,
        keys: Float32Array,
        usage: Float32Array,
        stats: RoutingStats,
        learned_tokens: int,
    ) -> tuple[Float32Array, Float32Array]:
        """The law among the experts that the scope sees, as if there were no others."""
        gravity, anchors = self.gravity.for_scope(stats.scope), self.pool.keys[layer]
        radius = self.pool.radius(stats.scope, layer, gravity.trust_radius)
        shown = base.visible_ids(layer)
        ids = np.arange(len(keys)) if shown is None else shown
        update = consolidate_layer(
            rows_of(anchors, ids),
            rows_of(keys, ids),
            rows_of(usage, ids),
            sums_of(stats.layers[layer], ids, len(keys)),
            gravity,
            num_experts_per_tok=self.num_experts_per_tok,
            window_tokens=stats.tokens,
            learned_tokens=learned_tokens,
            radius=radius[ids] if isinstance(radius, np.ndarray) else None,
            movable=self._movable(stats, layer, ids),
        )
        if len(update.moved_ids):
            keys = _with_rows(keys, ids, update.keys)
        check_bounds(anchors, keys, radius)
        return keys, _with_rows(usage, ids, update.usage)

    def _movable(self, stats: RoutingStats, layer: int, ids: Int64Array) -> BoolArray | None:
        """Who may be pulled; None: everybody.

        While experts settle in a scope nothing else moves there, and they by regression where there are utilities
        (the literal rule has none). In a session of that scope everything moves but they.
        """
        scope = stats.scope
        settling = np.isin(ids, self.pool.settling_ids(scope, layer))
        if any(group.scope == scope for group in self.pool.settling(scope)):
            return settling & (stats.layers[layer].utility is None)
        return ~settling if settling.any() else None


def sums_of(sums: LayerStats, ids: Int64Array, num_experts: int) -> LayerStats:
    """The statistics of some experts. A window from before the newest experts were added has none of those."""
    if len(ids) == len(sums.events) == num_experts:
        return sums
    missing, pairs = num_experts - len(sums.events), sums.coactivation
    return replace(
        sums,
        events=np.pad(sums.events, (0, missing))[ids],
        credited=np.pad(sums.credited, (0, missing))[ids],
        weighted_queries=np.pad(sums.weighted_queries, ((0, missing), (0, 0)))[ids],
        weights=np.pad(sums.weights, (0, missing))[ids],
        coactivation=None if pairs is None else np.pad(pairs, (0, missing))[np.ix_(ids, ids)],
    )


def _with_rows(array: Float32Array, ids: Int64Array, rows: Float32Array) -> Float32Array:
    """A copy of `array` with other rows `ids`; the rows themselves when they are all of it."""
    if len(ids) == len(array):
        return rows
    changed = array.copy()
    changed[ids] = rows
    return changed


def create_origin(
    model_id: str,
    anchors: Mapping[int, Float32Array],
    gravity: GravityConfig,
    plastic_layers: Collection[int],
    index_builder: IndexBuilder,
    now: float,
) -> KeySnapshot:
    """Version 0: a copy of the anchors.

    Raises InvalidConfig when one is not finite or not (M, D), or a plastic layer has none.
    """
    if not set(plastic_layers) <= anchors.keys():
        raise InvalidConfig("plastic_layers", sorted(plastic_layers), f"some of {sorted(anchors)}")
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

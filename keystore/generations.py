"""Every generation of the expert pool, and how what was learned in one goes on in another.

A version is verified in the generation it was made under and used in the current one: it is lifted. Rows of new
experts are appended, promoted experts get their anchor, hidden ones are at home, everything else stays bit for
bit. Knows no storage and no versions' numbers.
"""

# M experts of a layer, D dimensions

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np

from keystore.backends.base import PoolEvent
from keystore.errors import ModelMismatch
from keystore.gravity import initial_usage
from keystore.pool import ExpertPool, promoted_between
from keystore.records import Float32Array, GravityConfig, Int64Array, ScopeId
from keystore.snapshot import KeySnapshot, checksum_of, read_only, rebuild_indexes

OLD_POOLS_KEPT = 4


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """Keys (M, D) of every layer and usage (M,) of the plastic ones, as a scope has them."""

    keys: Mapping[int, Float32Array]
    usage: Mapping[int, Float32Array]
    visible: Mapping[int, Int64Array]  # by layer that hides experts from the scope


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A pool with its version 0: one for every scope in which experts settle, one for all others."""

    pool: ExpertPool
    origins: Mapping[ScopeId | None, KeySnapshot]

    @classmethod
    def first(cls, origin: KeySnapshot) -> "Generation":
        """Generation 0, of the anchors that a store was born with."""
        return cls(ExpertPool.born(origin.keys, origin.usage), {None: origin})

    @property
    def anchors(self) -> KeySnapshot:
        """Version 0 without any experts that settle."""
        return self.origins[None]

    def origin_of(self, scope: ScopeId) -> KeySnapshot:
        """Version 0 of a scope; a session has its tenant's."""
        standing = scope.parent or scope
        return replace(self.origins.get(standing, self.anchors), scope=standing)

    def after(self, event: PoolEvent, gravity: GravityConfig) -> "Generation":
        """The next generation. Raises StoreCorrupted for an event that does not follow from this one."""
        pool = self.pool.after(event)
        everyone = ScopeId("anchor")
        settling = {group.scope for group in pool.groups.values() if group.state == "settling"}
        origins = {
            scope: _origin(self.origin_of(scope or everyone), pool, scope or everyone, gravity)
            for scope in (None, *settling)
        }
        return Generation(pool, MappingProxyType(origins))

    def lift(self, content: Content, then: ExpertPool, scope: ScopeId) -> Content:
        """What `content` of generation `then` is here, seen by `scope`, hidden rows at home.

        Layers without a difference share memory with `content` or with the anchors.
        """
        home = self.origin_of(scope)
        keys, usage, visible = dict(content.keys), dict(content.usage), home.visible
        for layer in usage:
            before, shown = content.visible.get(layer), visible.get(layer)
            if self.pool.keys[layer] is then.keys[layer] and before is shown is None:
                continue
            known = np.arange(len(keys[layer])) if before is None else before
            kept = known if shown is None else np.intersect1d(known, shown)
            own = np.setdiff1d(kept, promoted_between(then, self.pool, layer))
            keys[layer] = _placed(self.pool.keys[layer], keys[layer], own)
            usage[layer] = _placed(home.usage[layer], usage[layer], kept)
        return Content(keys, usage, visible)

    def lift_snapshot(self, snapshot: KeySnapshot, then: ExpertPool, scope: ScopeId) -> KeySnapshot:
        """`snapshot` of generation `then` as `scope` has it here, under the same number."""
        lifted = self.lift(Content(snapshot.keys, snapshot.usage, snapshot.visible), then, scope)
        return self.adopt(snapshot, lifted, base=snapshot)

    def adopt(self, described: KeySnapshot, content: Content, base: KeySnapshot) -> KeySnapshot:
        """`described` with other content of this generation; layers that `base` has too keep its index."""
        usage = read_only(content.usage)
        return replace(
            described,
            indexes=rebuild_indexes(content.keys, base.indexes, content.visible),
            usage=usage,
            checksum=checksum_of(content.keys, usage, content.visible),
            generation=self.pool.generation,
        )


class Generations:
    """The log of pool events and what it amounts to. `now` is swapped by reference: readers need no lock."""

    def __init__(self, origin: KeySnapshot, events: Sequence[PoolEvent], gravity: GravityConfig) -> None:
        self._gravity, self._events = gravity, list(events)
        self._born = ExpertPool.born(origin.keys, origin.usage)
        self._old_pool = lru_cache(OLD_POOLS_KEPT)(self._fold)
        now = Generation.first(origin)
        for event in events:
            now = now.after(event, gravity)
        self.now = now

    def after(self, event: PoolEvent) -> Generation:
        """What `event` would make of the current generation."""
        return self.now.after(event, self._gravity)

    def turn(self, event: PoolEvent, following: Generation) -> None:
        """Make `after(event)` the current generation."""
        self._events.append(event)
        self.now = following

    def pool_of(self, generation: int) -> ExpertPool:
        """The pool of any generation there was. Raises ModelMismatch for one that is still to come."""
        now = self.now.pool
        if generation == now.generation:
            return now
        if generation > now.generation:
            raise ModelMismatch(
                f"generation {generation} of the expert pool; this store is at {now.generation}"
            )
        return self._old_pool(generation)

    def _fold(self, generation: int) -> ExpertPool:
        pool = self._born
        for event in self._events[:generation]:
            pool = pool.after(event)
        return pool


def same_bits(first: Float32Array, second: Float32Array) -> bool:
    """Whether two arrays hold the same bit patterns."""
    return np.array_equal(first.view(np.uint32), second.view(np.uint32))


def _origin(base: KeySnapshot, pool: ExpertPool, scope: ScopeId, gravity: GravityConfig) -> KeySnapshot:
    usage = read_only({layer: initial_usage(len(pool.keys[layer]), gravity) for layer in base.usage})
    visible = pool.visible(scope)
    return replace(
        base,
        indexes=rebuild_indexes(pool.keys, base.indexes, visible),
        usage=usage,
        checksum=checksum_of(pool.keys, usage, visible),
        generation=pool.generation,
    )


def _placed(home: Float32Array, own: Float32Array, ids: Int64Array) -> Float32Array:
    """`home` with the rows `ids` of `own`: itself when those are its own bits."""
    if same_bits(home[ids], own[ids]):
        return home
    placed = home.copy()
    placed[ids] = own[ids]
    return placed

"""Experts that are added to a store: added, promoted, retired by hand, and how they settle meanwhile.

What a group is and where it starts is `keystore.pool`; this changes the pool durably and tells everybody.
"""

from collections.abc import Mapping

from keystore.backends.base import PoolEvent
from keystore.canary import log_failed, note_of
from keystore.errors import CanaryFailed, VersionConflict, WrongGroupState
from keystore.learning_side import LearningSide, StoreParts
from keystore.pool import ExpertGroup
from keystore.records import Float32Array, Int64Array, ScopeId
from keystore.settling_watch import LayerSettling


class ExpertGroups:
    """The groups of one store. Thread-safe. Where other processes use the same experts none can be added."""

    def __init__(self, parts: StoreParts, learning: LearningSide) -> None:
        self._ledger, self._backend, self._guard = parts.ledger, parts.backend, parts.guard
        self._clock, self._writing, self._publish = parts.clock, parts.writing, parts.publish
        self._learning = learning

    def add(self, name: str, scope: ScopeId, keys: Mapping[int, Float32Array], digest: str) -> ExpertGroup:
        """Append experts with initial `keys` (n, D) by plastic layer, durably, to settle in `scope`.

        Nobody else sees them, and while they settle nothing else moves there. Their ids never come back. Raises
        InvalidExperts, ExpertGroupExists, and WrongGroupState in a shared store.
        """
        if self._learning.replication() is not None:
            raise WrongGroupState("experts can only be added to a store that one server has alone")
        with self._writing:
            return self._change(self._ledger.pool.add(name, scope, keys, digest, self._clock()))

    def promote(self, name: str) -> ExpertGroup:
        """Make where a group has settled its anchors, which everybody sees and nobody leaves by more than the
        trust radius.

        With a guard these are judged first, as they are now, while learning goes on. Raises UnknownExpertGroup,
        WrongGroupState, CanaryFailed, and VersionConflict when the expert pool changes meanwhile.
        """
        with self._writing:
            pool, anchors = self._ledger.pool, self._ledger.anchors
            settled = self._ledger.shelf.latest(pool.group(name).scope).keys
            event = pool.promote(name, settled, self._clock())
            if self._guard is None:
                return self._change(event)
            following = self._ledger.generations.after(event).anchors
        reading = self._guard.judge_anchors(following, anchors)
        self._backend.note_canary(note_of(reading))
        if not reading.passed:
            log_failed(reading, f"experts {name} are not promoted")
            raise CanaryFailed(f"experts {name}: {reading}; allowed: {self._guard.config.allowed}")
        with self._writing:
            if self._ledger.pool is not pool:
                raise VersionConflict(f"the expert pool changed while the promotion of {name} was judged")
            return self._change(event)

    def retire(self, name: str) -> ExpertGroup:
        """Hide a group from everybody; requests that hold an older version go on.

        Raises UnknownExpertGroup, WrongGroupState.
        """
        with self._writing:
            return self._change(self._ledger.pool.retire(name, self._clock()))

    def all(self) -> list[ExpertGroup]:
        """Every group there ever was, in the order they were added."""
        return list(self._ledger.pool.groups.values())

    def settling_ids(self, scope: ScopeId) -> Mapping[int, Int64Array]:
        """Rising ids of the experts that look for their address in a scope, by layer; layers without any left out."""
        pool = self._ledger.pool
        ids = {layer: pool.settles_in(scope, layer) for layer in pool.plastic_layers}
        return {layer: each for layer, each in ids.items() if len(each)}

    def settling(self, name: str) -> Mapping[int, LayerSettling]:
        """How a settling group moves, by layer. Raises UnknownExpertGroup, WrongGroupState."""
        pool = self._ledger.pool
        group = pool.group(name)
        if group.state != "settling":
            raise WrongGroupState(f"expert group {name!r} is {group.state}; only a settling one moves freely")
        return self._learning.settling.read(pool, group, self._ledger.progress(group.scope))

    def _change(self, event: PoolEvent) -> ExpertGroup:
        published = self._ledger.change_pool(event)
        self._learning.turn()
        self._publish(published)
        return self._ledger.pool.groups[event.name]

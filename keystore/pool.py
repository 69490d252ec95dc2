"""The expert pool: which experts there are beside those a store was born with, who sees them, where they start.

A pool is the fold of the first g events of a log: generation g. Experts are only ever appended, so an id means
the same expert in every generation. Pure values: no storage, no clock, no index.
"""

# M experts of a layer, n experts of a group, D dimensions

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import numpy as np

from keystore.backends.base import PoolEvent, RowChanges
from keystore.backends.blobs import event_checksum
from keystore.errors import (
    ExpertGroupExists,
    InvalidExperts,
    StoreCorrupted,
    UnknownExpertGroup,
    WrongGroupState,
)
from keystore.gravity import Radius
from keystore.records import Float32Array, Int64Array, ScopeId

GroupState = Literal["settling", "promoted", "retired"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}", re.ASCII)


@dataclass(frozen=True, slots=True, eq=False)
class ExpertGroup:
    """Experts that were added together.

    Settling, only `scope` and its sessions see them, and they are free to move; promoted, everybody sees them
    and their anchor is where they settled; retired, nobody does.
    """

    name: str
    scope: ScopeId
    state: GroupState
    expert_ids: Mapping[int, Int64Array]  # by layer, (n,), rising
    digest: str  # of the expert file, as given
    added_at: float  # unix seconds


@dataclass(frozen=True, slots=True, eq=False)
class ExpertPool:
    """One generation: the anchors of every expert there ever was, and the groups among them."""

    generation: int
    keys: Mapping[int, Float32Array]  # every layer, (M, D), read-only
    plastic_layers: Collection[int]
    groups: Mapping[str, ExpertGroup]  # in the order they were added
    digest: str  # of the events so far

    @classmethod
    def born(cls, keys: Mapping[int, Float32Array], plastic_layers: Collection[int]) -> "ExpertPool":
        """Generation 0."""
        return cls(0, keys, tuple(plastic_layers), MappingProxyType({}), "")

    def group(self, name: str) -> ExpertGroup:
        """Raises UnknownExpertGroup."""
        if name not in self.groups:
            raise UnknownExpertGroup(
                f"no expert group {name[:64]!r}; there are {list(self.groups) or 'none'}"
            )
        return self.groups[name]

    def born_experts(self, layer: int) -> int:
        """Number of experts in generation 0."""
        added = sum(len(group.expert_ids.get(layer, ())) for group in self.groups.values())
        return len(self.keys[layer]) - added

    def settling(self, scope: ScopeId) -> list[ExpertGroup]:
        """The groups that settle in a scope; a session has its tenant's."""
        return [
            group for group in self.groups.values() if group.state == "settling" and _belongs(scope, group)
        ]

    def settling_ids(self, scope: ScopeId, layer: int) -> Int64Array:
        """Rising ids of a scope's settling experts."""
        return _joined(self.settling(scope), layer)

    def settles_in(self, scope: ScopeId, layer: int) -> Int64Array:
        """Rising ids of the experts that look for their address in just this scope, not in one it belongs to."""
        return _joined([group for group in self.settling(scope) if group.scope == scope], layer)

    def visible_ids(self, scope: ScopeId, layer: int) -> Int64Array | None:
        """Rising ids of the experts that a scope may use; None: all."""
        hidden = _joined([group for group in self.groups.values() if not _sees(scope, group)], layer)
        if not len(hidden):
            return None
        return np.setdiff1d(np.arange(len(self.keys[layer])), hidden)

    def visible(self, scope: ScopeId) -> Mapping[int, Int64Array]:
        """Visible ids of the layers that hide experts from a scope."""
        shown = {layer: self.visible_ids(scope, layer) for layer in self.keys}
        return {layer: ids for layer, ids in shown.items() if ids is not None}

    def radius(self, scope: ScopeId, layer: int, trust_radius: float) -> Radius:
        """The trust radius of a layer's rows (M,), infinite for those that settle; a number when none does."""
        settling = self.settling_ids(scope, layer)
        if not len(settling):
            return trust_radius
        radii = np.full(len(self.keys[layer]), trust_radius)
        radii[settling] = np.inf
        return radii

    def add(
        self, name: str, scope: ScopeId, keys: Mapping[int, Float32Array], digest: str, at: float
    ) -> PoolEvent:
        """The event that adds a group with initial keys (n, D) by layer, to settle in `scope`.

        Raises InvalidExperts, ExpertGroupExists.
        """
        if not _NAME.fullmatch(name):
            raise InvalidExperts(f"group name is {name[:100]!r}; allowed: {_NAME.pattern}")
        if name in self.groups:
            raise ExpertGroupExists(
                f"there is an expert group {name!r}, {self.groups[name].state}; allowed: a name never used"
            )
        if scope.kind in ("anchor", "session"):
            raise InvalidExperts(f"experts cannot settle in {scope}; allowed: a scope that learns and stays")
        if not keys:
            raise InvalidExperts(f"group {name!r} has no layer; allowed: some of {list(self.plastic_layers)}")
        rows = {layer: self._checked(layer, keys[layer]) for layer in sorted(keys)}
        return PoolEvent(self.generation + 1, "add", name, scope, digest, at, rows)

    def promote(self, name: str, keys: Mapping[int, Float32Array], at: float) -> PoolEvent:
        """The event that makes a group's keys, as its scope has them in `keys` (M, D), everybody's anchors.

        Raises UnknownExpertGroup, WrongGroupState.
        """
        group = self.group(name)
        if group.state != "settling":
            raise WrongGroupState(f"expert group {name!r} is {group.state}; only a settling one is promoted")
        rows = {layer: RowChanges(ids, keys[layer][ids]) for layer, ids in group.expert_ids.items()}
        return PoolEvent(self.generation + 1, "promote", name, group.scope, group.digest, at, rows)

    def retire(self, name: str, at: float) -> PoolEvent:
        """The event that hides a group from everybody. Raises UnknownExpertGroup, WrongGroupState."""
        group = self.group(name)
        if group.state == "retired":
            raise WrongGroupState(f"expert group {name!r} is retired; allowed: a settling or a promoted one")
        return PoolEvent(self.generation + 1, "retire", name, group.scope, group.digest, at, {})

    def after(self, event: PoolEvent) -> "ExpertPool":
        """The next generation. Raises StoreCorrupted for an event that does not follow from this one."""
        self._check_follows(event)
        keys = dict(self.keys)
        for layer, change in event.rows.items():
            known = self.keys[layer][: change.expert_ids[0]]
            rows = [known, change.rows, self.keys[layer][change.expert_ids[-1] + 1 :]]
            keys[layer] = np.concatenate(rows)
            keys[layer].flags.writeable = False
        if event.kind == "add":
            ids = MappingProxyType({layer: change.expert_ids for layer, change in event.rows.items()})
            group = ExpertGroup(event.name, event.scope, "settling", ids, event.digest, event.at)
        else:
            state: GroupState = "promoted" if event.kind == "promote" else "retired"
            group = replace(self.groups[event.name], state=state)
        return ExpertPool(
            generation=event.generation,
            keys=MappingProxyType(keys),
            plastic_layers=self.plastic_layers,
            groups=MappingProxyType({**self.groups, event.name: group}),
            digest=hashlib.sha256((self.digest + event_checksum(event)).encode("ascii")).hexdigest(),
        )

    def _checked(self, layer: int, keys: Float32Array) -> RowChanges:
        if layer not in self.plastic_layers:
            raise InvalidExperts(f"layer {layer}; allowed: plastic layers {list(self.plastic_layers)}")
        num_experts, dim = self.keys[layer].shape
        if keys.ndim != 2 or not len(keys) or keys.shape[1] != dim or keys.dtype != np.float32:
            raise InvalidExperts(
                f"keys of layer {layer} are {keys.dtype} {keys.shape}; allowed: float32 (n, {dim}), n from 1"
            )
        if not np.isfinite(keys).all():
            raise InvalidExperts(f"keys of layer {layer} hold NaN or infinity; allowed: finite values")
        return RowChanges(np.arange(num_experts, num_experts + len(keys)), keys.copy())

    def _check_follows(self, event: PoolEvent) -> None:
        known = self.groups.get(event.name)
        fits = event.generation == self.generation + 1 and (known is None) == (event.kind == "add")
        for layer, change in event.rows.items():
            ids, expected = change.expert_ids, known.expert_ids.get(layer) if known else None
            if layer not in self.plastic_layers or change.rows.shape[1] != self.keys[layer].shape[1]:
                fits = False
                continue
            if expected is None:
                expected = len(self.keys[layer]) + np.arange(len(ids))
            fits = fits and len(ids) > 0 and np.array_equal(ids, expected)
        if not fits:
            raise StoreCorrupted(
                f"event {event.generation} of the expert pool ({event.kind} {event.name!r}) does not follow from"
                f" generation {self.generation}: another model's, or of layers that are not plastic here"
            )


def promoted_between(then: ExpertPool, now: ExpertPool, layer: int) -> Int64Array:
    """Rising ids of the experts that settled in generation `then` and were promoted by `now`."""
    moved = [
        group
        for name, group in now.groups.items()
        if group.state == "promoted" and name in then.groups and then.groups[name].state == "settling"
    ]
    return _joined(moved, layer)


def _sees(scope: ScopeId, group: ExpertGroup) -> bool:
    return group.state == "promoted" or (group.state == "settling" and _belongs(scope, group))


def _belongs(scope: ScopeId, group: ExpertGroup) -> bool:
    return group.scope in (scope, scope.parent)


def _joined(groups: Collection[ExpertGroup], layer: int) -> Int64Array:
    ids = [group.expert_ids[layer] for group in groups if layer in group.expert_ids]
    return np.sort(np.concatenate(ids)) if ids else np.empty(0, np.int64)

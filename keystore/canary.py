"""The guard: what a version does to a fixed text, the canary, against what the anchors do to it.

A version of the global scope is judged before it is published, one of a tenant on a schedule afterwards.
Knows neither the text nor the model, and publishes nothing: the store acts on the verdict.
"""

# T canary tokens, K experts per token

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from keystore.backends.base import CanaryNote
from keystore.errors import InvalidConfig
from keystore.records import Int64Array, ScopeId

if TYPE_CHECKING:
    from keystore.snapshot import KeySnapshot  # which imports FAISS: reading the configuration must not

ANCHORS_KEPT = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class CanaryRun:
    """The canary text under some keys."""

    loss_nats: float  # mean next-token loss
    expert_ids: Mapping[int, Int64Array]  # selected experts (T, K) of every plastic layer


class Probe(Protocol):
    """A model and its canary text. Takes seconds; called by one thread at a time, never by an engine's."""

    def run(self, view: "KeySnapshot") -> CanaryRun:
        """The whole text with `view` in force in every layer that has routing keys."""
        ...


@dataclass(frozen=True, slots=True)
class GuardConfig:
    """When to look, and what is too much. Raises InvalidConfig on a value outside its range."""

    max_loss_increase: float = 0.005  # as a fraction of the anchors' loss
    min_overlap: float = 0.8  # share of the anchors' selections that must stay
    tenant_every_versions: int = 256

    def __post_init__(self) -> None:
        if not 0 <= self.max_loss_increase <= 100:
            raise InvalidConfig("max_loss_increase", self.max_loss_increase, "0 to 100")
        if not 0 <= self.min_overlap <= 1:
            raise InvalidConfig("min_overlap", self.min_overlap, "0 to 1")
        if self.tenant_every_versions < 1:
            raise InvalidConfig("tenant_every_versions", self.tenant_every_versions, "1 or more")

    @property
    def allowed(self) -> str:
        """The limits in words."""
        return f"loss {100 * self.max_loss_increase:+.2f} % at most, overlap {self.min_overlap:g} at least"


@dataclass(frozen=True, slots=True)
class CanaryReading:
    """How one version did."""

    scope: ScopeId
    version: int
    checksum: str
    at: float  # unix seconds
    loss_nats: float
    anchors_loss_nats: float
    overlap: float  # share of the anchors' selections that it makes too, mean over plastic layers and tokens
    passed: bool

    @property
    def loss_increase(self) -> float:
        """As a fraction of the anchors' loss; negative when the version is better."""
        return self.loss_nats / self.anchors_loss_nats - 1.0

    def __str__(self) -> str:
        return f"canary loss {100 * self.loss_increase:+.2f} %, overlap {self.overlap:.3f}"


class Guard:
    """Judges versions, one at a time, and remembers the newest reading of every scope. Thread-safe."""

    def __init__(self, probe: Probe, config: GuardConfig, clock: Callable[[], float] = time.time) -> None:
        self.config = config
        self._probe, self._clock = probe, clock
        self._probing = threading.Lock()
        self._anchors: dict[str, CanaryRun] = {}  # by the checksum of the anchors
        self._readings: dict[ScopeId, CanaryReading] = {}

    def is_due(self, snapshot: "KeySnapshot") -> bool:
        """Whether the schedule asks for this version. Tenants only: it goes by the version's number, so a
        restart does not shift it.
        """
        return snapshot.scope.kind == "tenant" and snapshot.version % self.config.tenant_every_versions == 0

    def judge(self, snapshot: "KeySnapshot", anchors: "KeySnapshot") -> CanaryReading:
        """Run the canary on a version; takes seconds, the first time longer. What the probe raises passes
        through.
        """
        with self._probing:
            reading = self._compare(snapshot, anchors)
            self._readings = self._readings | {snapshot.scope: reading}
            return reading

    def judge_anchors(self, following: "KeySnapshot", anchors: "KeySnapshot") -> CanaryReading:
        """The same for what would be everybody's anchors; no scope's reading."""
        with self._probing:
            return self._compare(following, anchors)

    def readings(self) -> Mapping[ScopeId, CanaryReading]:
        """The newest reading of every scope that was judged since the start, passed or not."""
        return self._readings

    def _compare(self, snapshot: "KeySnapshot", anchors: "KeySnapshot") -> CanaryReading:
        home = self._run_of_anchors(anchors)
        run = self._probe.run(snapshot)
        overlap = routing_overlap(run.expert_ids, home.expert_ids)
        return CanaryReading(
            scope=snapshot.scope,
            version=snapshot.version,
            checksum=snapshot.checksum,
            at=self._clock(),
            loss_nats=run.loss_nats,
            anchors_loss_nats=home.loss_nats,
            overlap=overlap,
            passed=self._accepts(run.loss_nats, home.loss_nats, overlap),
        )

    def _run_of_anchors(self, anchors: "KeySnapshot") -> CanaryRun:
        """Each generation of the expert pool may have other anchors."""
        if anchors.checksum not in self._anchors:
            while len(self._anchors) >= ANCHORS_KEPT:
                del self._anchors[next(iter(self._anchors))]
            self._anchors[anchors.checksum] = self._probe.run(anchors)
        return self._anchors[anchors.checksum]

    def _accepts(self, loss_nats: float, anchors_loss_nats: float, overlap: float) -> bool:
        """False for a loss that is no number, too."""
        limit = anchors_loss_nats * (1.0 + self.config.max_loss_increase)
        return loss_nats <= limit and overlap >= self.config.min_overlap


def routing_overlap(selected: Mapping[int, Int64Array], reference: Mapping[int, Int64Array]) -> float:
    """|selected and reference| / K, mean over layers and tokens; ids (T, K) of the same tokens by layer."""
    assert selected.keys() == reference.keys(), (list(selected), list(reference))
    shares = [
        (selected[layer][:, :, None] == ids[:, None, :]).any(axis=2).mean()
        for layer, ids in reference.items()
    ]
    return float(np.mean(shares))


def newest_due(guard: Guard | None, published: "Sequence[KeySnapshot]") -> "list[KeySnapshot]":
    """Of each scope the newest of these versions that the schedule asks for; nothing without a guard."""
    due = {each.scope: each for each in published if guard is not None and guard.is_due(each)}
    return list(due.values())


def log_failed(reading: CanaryReading, consequence: str) -> None:
    """One line with the numbers."""
    figures = {"scope": str(reading.scope), "version": reading.version, **_figures(reading)}
    logger.warning("canary failed: %s", consequence, extra=figures)


def note_of(reading: CanaryReading) -> CanaryNote:
    """A reading as the audit trail keeps it."""
    event: dict[str, object] = {
        "event": "canary",
        "scope": str(reading.scope),
        "version": reading.version,
        "checksum": reading.checksum,
        "at": reading.at,
        "passed": reading.passed,
        **_figures(reading),
    }
    return CanaryNote(reading.scope, reading.version, reading.passed, event)


def _figures(reading: CanaryReading) -> dict[str, float | None]:
    """Numbers for JSON, which knows none that is not finite."""
    figures = {
        "loss_nats": reading.loss_nats,
        "loss_increase": reading.loss_increase,
        "overlap": reading.overlap,
    }
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}

"""What the store counts, for metrics. Names of metrics are the server's."""

from collections.abc import Mapping
from dataclasses import dataclass

from keystore.durations import DurationCounts


@dataclass(frozen=True, slots=True)
class LearningCounters:
    """What became of windows; the mappings' keys are bounded sets of words."""

    updates: Mapping[
        str, int
    ]  # windows by outcome: published, unchanged, rejected, guard_rejected; and failed consolidations
    canary_rollbacks: int
    dropped: Mapping[str, int]  # windows by reason, see keystore.intake.DropReason
    last_update_s: float  # duration of the last consolidation that had work
    lag_s: float  # from submit to publish, oldest window of that consolidation
    waiting_windows: int
    oldest_waiting_s: float


@dataclass(frozen=True, slots=True)
class ReplicationCounters:
    """How a store that shares its versions with others keeps up with them."""

    connected: bool
    outbox_scopes: int  # whose windows wait to be sent
    pending_entries: int  # sent by anybody and not learned yet, as last seen
    resent: int  # entries sent again because nobody knew whether they had arrived
    resyncs: int  # gaps in the delta stream, closed by loading the newest versions
    regressions: int  # times that the shared store was found behind what had been read from it
    refused: int  # versions that were not adopted: out of bounds or against their checksum
    delay_counts: Mapping[
        float, int
    ]  # versions by how long after their commit they were adopted, at most (s)
    delay_sum_s: float


@dataclass(frozen=True, slots=True)
class StoreCounters:
    """A reading of every counter and gauge of a store."""

    updates: Mapping[str, int]
    rollbacks: Mapping[str, int]  # by reason: admin, canary
    dropped: Mapping[str, int]
    subscriber_failures: int
    last_update_s: float
    lag_s: float
    waiting_windows: int
    oldest_waiting_s: float
    live_sessions: int
    index_recall: Mapping[int, float]  # sampled recall@K by layer, those above the exact limit only
    index_builds: Mapping[tuple[int, str], int]  # by layer and outcome: built, failed
    operations: Mapping[str, DurationCounts]  # of the backend, by name: commit, load, thin, delete

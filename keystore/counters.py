"""What the store counts, for metrics. Names of metrics are the server's."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreCounters:
    """A reading of every counter and gauge; the mappings' keys are bounded sets of words."""

    updates: Mapping[
        str, int
    ]  # windows by outcome: published, unchanged, rejected, guard_rejected; and failed consolidations
    rollbacks: Mapping[str, int]  # by reason: admin, canary
    dropped: Mapping[str, int]  # windows by reason: queue_full, non_finite, frozen, superseded
    subscriber_failures: int
    last_update_s: float  # duration of the last consolidation that had work
    lag_s: float  # from submit to publish, oldest window of that consolidation
    waiting_windows: int
    oldest_waiting_s: float
    live_sessions: int
    index_recall: Mapping[int, float]  # sampled recall@K by layer, those above the exact limit only
    index_builds: Mapping[tuple[int, str], int]  # by layer and outcome: built, failed

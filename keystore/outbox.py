"""What a replica's requests taught, on its way to the workers: merged by scope while it waits, sent in order by shard.

Never blocks whoever hands a window in. An entry whose arrival is uncertain is sent again as it was, with its
number, ahead of anything newer of its shard; workers tell duplicates by the number. Who was silent for so long that they
may have forgotten the numbers drops it, and goes on as somebody new.
"""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from typing import get_args

from keystore.backends.redis_names import GLOBAL_SHARD, shard_of
from keystore.backends.redis_producers import Producers
from keystore.backends.redis_streams import StatsStream
from keystore.errors import StoreUnavailable
from keystore.intake import DropReason
from keystore.records import ScopeId
from keystore.sender import Done, Sender, Sending, Waiting
from keystore.statistics import RoutingStats

MAX_PENDING_ENTRIES = 256  # in a shard's stream; beyond that windows wait here and are merged
FULL_RETRY_S = 0.05
FIRST_RETRY_S, LAST_RETRY_S = 0.05, 1.0

logger = logging.getLogger(__name__)


class Outbox:
    """Thread-safe. Holds the windows of at most `capacity` scopes; a thread of the replica calls `send_waiting`."""

    def __init__(self, stream: StatsStream, producers: Producers, shards: int, capacity: int) -> None:
        self._stream, self._shards, self._capacity = stream, shards, capacity
        self._changed = threading.Condition()
        self._sending = threading.Lock()  # held while talking to Redis; before `_changed`
        self.sender = Sender(stream, producers)
        self._waiting: OrderedDict[ScopeId, Waiting] = OrderedDict()
        self._to_learn: dict[
            int, deque[tuple[int, list[Done]]]
        ] = {}  # sent; somebody waits for what it leads to
        self._dropped: Counter[str] = Counter(dict.fromkeys(get_args(DropReason), 0))
        self._pending = dict.fromkeys((*range(shards), GLOBAL_SHARD), 0)
        self.reachable = True

    def put(self, stats: RoutingStats, done: Done | None = None) -> bool:
        """Add a window; False and counted when there is no room for another scope.

        `done` is called once it has been learned or dropped; at once while Redis is away, when that may take long.
        """
        away = not self.reachable
        with self._changed:
            waiting = self._waiting.get(stats.scope)
            if waiting is None and len(self._waiting) >= self._capacity:
                self._dropped["queue_full"] += 1
                return False
            if waiting is None:
                waiting = self._waiting[stats.scope] = Waiting(stats, time.monotonic())
            else:
                waiting.stats, waiting.windows = waiting.stats.merge(stats), waiting.windows + 1
            if done is not None and not away:
                waiting.done.append(done)
            self._changed.notify_all()
        if done is not None and away:
            done()
        return True

    def count_dropped(self, reason: DropReason, windows: int = 1) -> None:
        """Count windows that never got here, or were taken out."""
        with self._changed:
            self._dropped[reason] += windows

    def discard(self, scope: ScopeId) -> None:
        """Drop what waits of a scope: it was learned on keys that were just replaced."""
        with self._changed:
            dropped = self._waiting.pop(scope, None)
        if dropped is not None:
            self.count_dropped("superseded", dropped.windows)
            _tell([dropped.done])

    def send_waiting(self) -> bool:
        """Send what can be sent; False when a stream is full. Raises StoreUnavailable, and everything still waits."""
        with self._sending:
            try:
                self._send_again()
                room = {shard: MAX_PENDING_ENTRIES - self._count_pending(shard) for shard in self._wanted()}
                while (shard := self._take(room)) is not None:
                    room[shard] -= 1
                    self._note_sent(shard, self.sender.send(shard))
            except StoreUnavailable:
                self._note_away()
                raise
            self.reachable = True
            return all(room.get(shard, 1) > 0 for shard in self._wanted())

    def run_until(self, stopping: threading.Event) -> None:
        """Send whenever something waits; call `wake` after setting `stopping`."""
        retry_s = 0.0
        while not stopping.is_set():
            with self._changed:
                if not (self._waiting or self.sender.unsure or stopping.is_set()):
                    self._changed.wait()
            if stopping.wait(retry_s):
                return
            try:
                retry_s = 0.0 if self.send_waiting() else FULL_RETRY_S
            except StoreUnavailable as error:
                retry_s = min(max(FIRST_RETRY_S, 2 * retry_s), LAST_RETRY_S)
                logger.warning(
                    "statistics wait: %s", error, extra={"scopes": self.scopes, "retry_s": retry_s}
                )

    def wake(self) -> None:
        """End the wait of `run_until` now."""
        with self._changed:
            self._changed.notify_all()

    def when_learned(self, done: Done) -> int:
        """Call back once for every shard that entries were sent to, when all that were sent so far are learned.

        Returns how often that will be.
        """
        with self._sending:
            for shard, sequence in self.sender.sequences.items():
                self._to_learn.setdefault(shard, deque()).append((sequence, [done]))
            return len(self.sender.sequences)

    def leave(self) -> None:
        """Say that nothing more comes from here, if all that was sent has arrived. Raises StoreUnavailable."""
        with self._sending:
            self.sender.leave()

    @property
    def somebody_waits(self) -> bool:
        """Whether anybody wants to know when entries that were sent have been learned."""
        return any(self._to_learn.values())

    def learned(self) -> list[Done]:
        """Who waited for what has been learned by now; to be called when its versions are at hand.

        Raises StoreUnavailable.
        """
        told: list[Done] = []
        with self._sending:
            for shard in [shard for shard, waiting in self._to_learn.items() if waiting]:
                watermark = self._stream.watermarks(shard).get(self.sender.producer, 0)
                waiting = self._to_learn[shard]
                while waiting and waiting[0][0] <= watermark:
                    told += waiting.popleft()[1]
        return told

    def refresh_pending(self) -> None:
        """Look how many entries of every shard wait to be learned. Raises StoreUnavailable."""
        for shard in list(self._pending):
            self._count_pending(shard)

    @property
    def pending(self) -> int:
        """Entries that wait to be learned, whoever sent them, as last seen."""
        return sum(self._pending.values())

    @property
    def scopes(self) -> int:
        """Scopes whose windows wait to be sent."""
        return len(self._waiting)

    def waiting(self) -> tuple[int, float]:
        """Number of windows and the age of the oldest in seconds."""
        with self._changed:
            held = self._held()
        oldest_s = min((each.since_s for each in held), default=None)
        windows = sum(each.windows for each in held)
        return windows, 0.0 if oldest_s is None else time.monotonic() - oldest_s

    def dropped(self) -> Mapping[str, int]:
        """Windows not sent, by reason."""
        with self._changed:
            return dict(self._dropped)

    def _wanted(self) -> set[int]:
        with self._changed:
            return {shard_of(scope, self._shards) for scope in self._waiting}

    def _take(self, room: Mapping[int, int]) -> int | None:
        """Number the scope that has waited longest in a shard with room; the shard."""
        with self._changed:
            for scope in self._waiting:
                shard = shard_of(scope, self._shards)
                if room.get(shard, 0) > 0:
                    self.sender.number(shard, self._waiting.pop(scope))
                    return shard
        return None

    def _send_again(self) -> None:
        for shard in list(self.sender.unsure):
            sent = self.sender.send_again(shard)
            if sent is None:
                self._begin_anew()
                return
            self._note_sent(shard, sent)

    def _begin_anew(self) -> None:
        lost = [each.content for each in self.sender.begin_anew()]
        windows = sum(each.windows for each in lost)
        logger.warning("dropped: perhaps learned before a long silence", extra={"windows": windows})
        self.count_dropped("unclear", windows)
        _tell([each.done for each in lost] + self._take_to_learn())

    def _note_sent(self, shard: int, sending: Sending) -> None:
        self._pending[shard] += 1
        if sending.content.done:
            self._to_learn.setdefault(shard, deque()).append((sending.sequence, sending.content.done))

    def _count_pending(self, shard: int) -> int:
        self._pending[shard] = self._stream.pending(shard)
        return self._pending[shard]

    def _note_away(self) -> None:
        """Nobody should wait for what may take long: requests go on with the keys that they have."""
        self.reachable = False
        with self._changed:
            held = self._held()
            told = [each.done for each in held] + self._take_to_learn()
            for each in held:
                each.done = []
        _tell(told)

    def _held(self) -> list[Waiting]:
        """Everything that has not arrived for certain; to be called under `_changed`."""
        return [*self._waiting.values(), *(each.content for each in list(self.sender.unsure.values()))]

    def _take_to_learn(self) -> list[list[Done]]:
        """Everybody who waits for something that was sent."""
        told = [done for waiting in self._to_learn.values() for _, done in waiting]
        self._to_learn = {}
        return told


def _tell(waiting: list[list[Done]]) -> None:
    for each in waiting:
        for done in each:
            done()

"""Entries on their way to the workers, numbered by shard. What may have arrived is sent again as it was, or never."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID, uuid4

from keystore.backends.redis_producers import Producers
from keystore.backends.redis_streams import StatsStream
from keystore.backends.stats_blob import SentWindow
from keystore.statistics import RoutingStats

Done = Callable[[], None]


@dataclass(slots=True, eq=False)
class Waiting:
    """The windows of one scope that wait to be sent, as one."""

    stats: RoutingStats
    since_s: float  # monotonic
    windows: int = 1
    done: list[Done] = field(default_factory=list[Done])


@dataclass(slots=True, eq=False)
class Sending:
    """An entry that is being sent, or may have been."""

    sequence: int
    content: Waiting
    entry: bytes = b""  # once made, the same until it has arrived


class Sender:
    """One producer. At most one entry of a shard is on its way. Used by one thread at a time; `unsure` may be read
    by any through `list`.
    """

    def __init__(self, stream: StatsStream, producers: Producers) -> None:
        self._stream, self._producers = stream, producers
        self._is_introduced = False
        self.producer: UUID = uuid4()
        self.sequences: Counter[int] = Counter()
        self.unsure: dict[int, Sending] = {}
        self.resent = 0

    def number(self, shard: int, content: Waiting) -> None:
        """Make this the shard's next entry."""
        assert shard not in self.unsure, shard
        self.sequences[shard] += 1
        self.unsure[shard] = Sending(self.sequences[shard], content)

    def send(self, shard: int) -> Sending:
        """Send what was numbered. Raises StoreUnavailable: nobody knows whether it has arrived."""
        sending = self.unsure[shard]
        if not self._is_introduced:
            self._producers.introduce(self.producer)
            self._is_introduced = True
        self._stream.send(shard, self._entry(shard, sending))
        return self.unsure.pop(shard)

    def send_again(self, shard: int) -> Sending | None:
        """The same after a failure; None when it might be learned twice: see `begin_anew`. Raises StoreUnavailable."""
        if not self._is_introduced:
            return self.send(shard)
        sending = self.unsure[shard]
        self.resent += 1
        if not self._producers.send_again(self.producer, shard, self._entry(shard, sending)):
            return None
        return self.unsure.pop(shard)

    def begin_anew(self) -> list[Sending]:
        """Go on as another producer, of whom nothing was ever learned; returns what was unsure, for good."""
        lost = list(self.unsure.values())
        self.unsure.clear()
        self.sequences.clear()
        self.producer, self._is_introduced = uuid4(), False
        return lost

    def stay_known(self) -> None:
        """Say, now and then, that this producer is still there. Raises StoreUnavailable."""
        if self._is_introduced:
            self._producers.renew(self.producer)

    def leave(self) -> None:
        """Say that this producer has ended, if all that it sent has arrived. Raises StoreUnavailable."""
        if self._is_introduced and not self.unsure:
            self._producers.leave(self.producer)

    def _entry(self, shard: int, sending: Sending) -> bytes:
        if not sending.entry:
            window = SentWindow(self.producer, sending.sequence, sending.content.stats)
            sending.entry = self._stream.entry(shard, window)
        return sending.entry

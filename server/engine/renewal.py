"""Keys that are renewed while a prompt is being read. Knows no key store: whoever learns offers the next keys."""

from collections.abc import Callable
from dataclasses import dataclass

from model.keys import KeyView

PATIENCE_S = 2.0  # how long a prompt waits for the keys that a window of it leads to


@dataclass(frozen=True, slots=True)
class KeySpan:
    """From which token of a sequence on which keys are in force."""

    from_token: int
    key_version: int


class KeyRenewal:
    """Of one prompt: after every `window_tokens` tokens it rests until newer keys come or its patience ends.

    `offer` may be called from any thread and calls `wake`; everything else belongs to the engine's thread.
    """

    def __init__(self, window_tokens: int, keys: KeyView, wake: Callable[[], None]):
        self.spans = [KeySpan(0, keys.version)]
        self._window_tokens = window_tokens
        self._keys = keys
        self._wake = wake
        self._border: int | None = None  # where the prompt rests
        self._rests_until = 0.0
        self._offered: tuple[int, KeyView] | None = None

    def tokens_to_border(self, prefilled: int) -> int:
        """How many tokens may be read in one piece."""
        return self._window_tokens - prefilled % self._window_tokens

    def arrive(self, prefilled: int, now: float) -> None:
        """The prompt has been read up to here and goes on after this: rest if it is a border."""
        if prefilled % self._window_tokens == 0:
            self._border, self._rests_until = prefilled, now + PATIENCE_S

    @property
    def resting(self) -> bool:
        return self._border is not None

    def offer(self, border: int, keys: KeyView) -> None:
        """The keys to go on with behind a border. An offer for an earlier border is too late and says nothing."""
        self._offered = (border, keys)
        self._wake()

    def may_go_on(self, now: float) -> bool:
        """Whether the keys have come, or the patience has ended."""
        return self._renewed() is not None or now >= self._rests_until

    def go_on(self) -> KeyView | None:
        """End the rest; the keys from here on, or None when they have not come in time."""
        assert self._border is not None
        renewed, border = self._renewed(), self._border
        if renewed is not None and renewed is not self._keys:
            self._keys = renewed
            self.spans.append(KeySpan(border, renewed.version))
        self._border = None
        return renewed

    def _renewed(self) -> KeyView | None:
        offered = self._offered
        return offered[1] if offered is not None and offered[0] == self._border else None

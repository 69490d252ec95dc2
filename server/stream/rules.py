"""What may happen between two windows: nothing, keys that move, value offsets, an output bias, or several of them."""

from collections.abc import Mapping
from dataclasses import dataclass

from keystore.records import GravityConfig
from model.plastic_pass import CreditKind

VALUE_BOUND = 0.1  # of the residual stream's norm


@dataclass(frozen=True, slots=True)
class StreamRule:
    """One way to adapt. Everything at its default is the frozen model."""

    name: str
    gravity: GravityConfig | None = None  # None: keys stay
    layers: frozenset[int] | None = None  # whose keys move; None: all that have keys
    value_rate: float = 0.0  # eta of the value offsets
    bias_rate: float = 0.0  # of plain gradient steps on one output bias, the baseline to beat

    @property
    def credit(self) -> CreditKind:
        """The derivative that the pass must deliver."""
        if self.gravity is not None and self.gravity.rule == "gradient":
            return "gradient"
        needs_direct = self.value_rate or (self.gravity is not None and self.gravity.rule == "direct")
        return "direct" if needs_direct else "none"


FROZEN = StreamRule("frozen")


def by_name(rules: list[StreamRule]) -> Mapping[str, StreamRule]:
    """Raises AssertionError when two rules share a name."""
    named = {rule.name: rule for rule in rules}
    assert len(named) == len(rules), [rule.name for rule in rules]
    return named

"""The rules under test. The law is the project's own (`keystore.gravity`); what differs is its constants, and where the
weights of a window's queries come from.

L tokens of a window, K experts per token, M experts, D key size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from tiny_model import Routed
from torch import Tensor

from keystore.gravity import consolidate_layer, credit_weights, initial_usage, scale_queries
from keystore.records import DarkEnergy, GravityConfig, Inertia
from keystore.statistics import LayerStats, TokenCredit, TokenTrace

WINDOW = 1024  # tokens between two updates of keys that many sessions share
SESSION_WINDOW = 256  # and of a session's own
FREE = 100.0  # a trust radius that never binds

Signal = Literal["none", "direct", "gradient", "own samples", "shuffled", "advantage"]
BACKWARD = ("gradient", "own samples")  # signals that need a pass back through the layers


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """`law` None moves no key. Own samples: gradient credit for tokens that the model drew itself. Shuffled: direct
    credit dealt out again at random. Advantage: the token's log probability, alike for all its experts."""

    name: str
    law: GravityConfig | None = None
    signal: Signal = "none"
    per_session: bool = False  # keys, usage and bias start anew with each session
    bias_rate: float = 0.0  # of a logit per token by which the outputs missed it; 0: no bias

    @property
    def window(self) -> int:
        return SESSION_WINDOW if self.per_session else WINDOW


def literal(
    rate: float, *, inertia: Inertia = "none", dark_energy: DarkEnergy = "none", bonding_rate: float = 0.0
) -> GravityConfig:
    """The seed's pull, once for every token that selected an expert; nothing else unless asked for."""
    return GravityConfig(
        rule="literal",
        plasticity_rate=rate,
        bonding_rate=bonding_rate,
        inertia=inertia,
        dark_energy=dark_energy,
        trust_radius=FREE,
    )


def credit(rate: float, radius: float) -> GravityConfig:
    return GravityConfig(
        rule="direct", plasticity_rate=rate, trust_radius=radius, inertia="ema", dark_energy="decay"
    )


BIAS_RATE = 0.02
SESSION_LAW = credit(0.05, 0.2)
RULES = (
    Rule(name="frozen"),
    Rule(name="literal .00001", law=literal(0.00001)),
    Rule(name="literal .0001", law=literal(0.0001)),
    Rule(name="literal .001", law=literal(0.001)),
    Rule(name="literal .01", law=literal(0.01)),
    Rule(name="literal .1", law=literal(0.1)),
    Rule(name="literal .01, count inertia", law=literal(0.01, inertia="count")),
    Rule(name="literal .1, decay to zero", law=literal(0.1, dark_energy="decay_to_zero")),
    Rule(name="peer pull .001", law=literal(0.0, bonding_rate=0.001)),
    Rule(name="peer pull .1", law=literal(0.0, bonding_rate=0.1)),
    Rule(name="log-probability advantage .1", law=credit(0.1, 0.05), signal="advantage"),
    Rule(name="shuffled credit .1 (control)", law=credit(0.1, 0.05), signal="shuffled"),
    Rule(name="own samples .1", law=credit(0.1, 0.05), signal="own samples"),
    Rule(name="direct credit .1", law=credit(0.1, 0.05), signal="direct"),
    Rule(name="gradient credit .1", law=credit(0.1, 0.05), signal="gradient"),
    Rule(name="session: direct .05", law=SESSION_LAW, signal="direct", per_session=True),
    Rule(name="session: output bias", per_session=True, bias_rate=BIAS_RATE),
    Rule(
        name="session: direct .05 + bias",
        law=SESSION_LAW,
        signal="direct",
        per_session=True,
        bias_rate=BIAS_RATE,
    ),
)


@dataclass(slots=True)
class Learner:
    """Where one rule stands."""

    rule: Rule
    anchors: list[NDArray[np.float32]]  # (M, D) per layer
    bias: Tensor  # (V)
    keys: list[NDArray[np.float32]] = field(init=False)
    usage: list[NDArray[np.float32]] = field(init=False)
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        law = self.rule.law or GravityConfig()
        self.keys = list(self.anchors)
        self.usage = [initial_usage(len(each), law) for each in self.anchors]
        self.tokens = 0
        self.bias.zero_()

    def learn(self, layer: int, routed: Routed, row: int, weights: Tensor | None) -> None:
        """Consolidate one layer with the window's tokens: raw credit (L, K), or None for 1 each."""
        law = self.rule.law
        assert law is not None
        queries, ids = routed.queries[row].detach().numpy(), routed.expert_ids[row].numpy()
        credited = None
        if weights is not None:
            credited = TokenCredit(ids, credit_weights(weights.numpy(), law.credit_clamp))
            queries = scale_queries(queries, float(np.linalg.norm(self.anchors[layer], axis=1).mean()))
        trace = TokenTrace(ids, queries, len(self.anchors[layer]), credited)
        update = consolidate_layer(
            self.anchors[layer],
            self.keys[layer],
            self.usage[layer],
            LayerStats.from_tokens(trace, coactivation=law.bonding_rate > 0),
            law,
            num_experts_per_tok=ids.shape[1],
            window_tokens=len(ids),
            learned_tokens=self.tokens,
        )
        self.keys[layer], self.usage[layer] = update.keys, update.usage

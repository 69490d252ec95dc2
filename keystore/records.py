"""Who learns (ScopeId) and how (GravityConfig), and the arrays that the key store is made of.

Knows nothing about keys, versions or storage.
"""

import math
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from keystore.errors import InvalidConfig

Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]
Int64Array = NDArray[np.int64]

ScopeKind = Literal["anchor", "global", "tenant", "session"]
Rule = Literal["literal", "direct", "gradient"]
Inertia = Literal["ema", "count", "none"]
DarkEnergy = Literal["decay", "decay_to_zero", "repulsion", "none"]
SessionEviction = Literal["save", "discard"]  # what becomes of the session used longest ago, above the cap

MAX_NAME_CHARS = 128


@dataclass(frozen=True, slots=True, order=True)
class ScopeId:
    """Who the keys learn from: nobody (anchor), everybody (global), one API key (tenant) or one conversation
    (session).

    `str()` gives "anchor", "global", "tenant:default", "session:default/abc"; `parse` reads it back. Tenant
    names hold no "/". Raises InvalidConfig on a name that is empty, too long, has control characters or space
    at an edge.
    """

    kind: ScopeKind
    tenant: str = ""
    session: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(ScopeKind):
            raise InvalidConfig("scope kind", self.kind, "anchor, global, tenant or session")
        if self.kind in ("anchor", "global"):
            if self.tenant or self.session is not None:
                named = (self.tenant, self.session)
                raise InvalidConfig(f"{self.kind} scope", named, "no tenant and no session")
            return
        _check_name("tenant", self.tenant)
        if "/" in self.tenant:
            raise InvalidConfig("tenant", self.tenant, "a name without '/'")
        if self.kind == "session":
            _check_name("session", self.session)
        elif self.session is not None:
            raise InvalidConfig("session of a tenant scope", self.session, "None")

    def __str__(self) -> str:
        if self.kind in ("anchor", "global"):
            return self.kind
        return f"tenant:{self.tenant}" if self.kind == "tenant" else f"session:{self.tenant}/{self.session}"

    @classmethod
    def parse(cls, text: str) -> "ScopeId":
        """Inverse of `str()`. Raises InvalidConfig."""
        if text == "anchor":
            return cls("anchor")
        if text == "global":
            return cls("global")
        kind, _, name = text.partition(":")
        if kind == "tenant":
            return cls("tenant", name)
        tenant, slash, session = name.partition("/")
        if kind == "session" and slash:
            return cls("session", tenant, session)
        raise InvalidConfig("scope", text[:200], "'anchor', 'global', 'tenant:NAME' or 'session:TENANT/NAME'")

    @property
    def parent(self) -> "ScopeId | None":
        """The tenant that a session forks from; None for the scopes that start at the anchors."""
        return ScopeId("tenant", self.tenant) if self.kind == "session" else None


def _check_name(what: str, name: str | None) -> None:
    printable = name is not None and not any(
        unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name
    )
    if not name or not printable or len(name) > MAX_NAME_CHARS or name != name.strip():
        shown = name if name is None else name[:MAX_NAME_CHARS]
        allowed = f"1 to {MAX_NAME_CHARS} printable characters without space at the edges"
        raise InvalidConfig(f"{what} name", shown, allowed)


def check_positive(**limits: float) -> None:
    """Raises InvalidConfig, naming a limit that is not above 0."""
    for name, value in limits.items():
        if not value > 0:
            raise InvalidConfig(name, value, "more than 0")


@dataclass(frozen=True, slots=True)
class GravityConfig:
    """Constants of the consolidation law (docs/gravity).

    Raises InvalidConfig on a value outside its range.
    """

    rule: Rule = "direct"
    plasticity_rate: float = 0.1  # alpha, SOME v2 section 5.1
    bonding_rate: float = 0.0  # beta; 0 leaves peers alone. The literal rule wants it below alpha
    usage_threshold: float = 0.1  # theta: an expert below this fraction of a fair share is idle
    decay_rate: float = 0.01  # delta: fraction of the way home that an idle expert goes per T0 tokens
    decay_window_tokens: int = 4096  # T0
    inertia: Inertia = "ema"
    usage_halflife_tokens: int = 4096
    warmup_tokens: int = 8192  # no dark energy before a scope has learned this many tokens
    dark_energy: DarkEnergy = "decay"
    repulsion_rate: float = 0.0  # push per T0 tokens, as a fraction of the anchor's norm
    trust_radius: float = 0.2  # |k - k0| <= trust_radius * |k0|
    global_trust_radius: float = 0.05  # the same for the scope that everybody reads and teaches
    window_tokens: int = 256
    credit_clamp: float = 3.0
    credit_candidates: int = 16  # how many experts earn credit for a token, the selected first; 0 = all
    settling_warmup_tokens: int = 2048  # tokens that speak for an address before a new expert takes it
    settling_ridge: float = 0.03  # of the mean eigenvalue of the queries' second moments
    settling_halflife_tokens: int = 0  # 0: what new experts were worth to old tokens is never forgotten

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rule", get_args(Rule)),
            ("inertia", get_args(Inertia)),
            ("dark_energy", get_args(DarkEnergy)),
        ):
            if getattr(self, name) not in allowed:
                raise InvalidConfig(name, getattr(self, name), " or ".join(allowed))
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if isinstance(value, bool) or not (math.isfinite(value) and low <= value <= high):
                raise InvalidConfig(name, value, f"a number from {low:g} to {high:g}")
        for name in _WHOLE_NUMBERS:
            if not isinstance(getattr(self, name), int):
                raise InvalidConfig(name, getattr(self, name), "a whole number")

    def for_scope(self, scope: ScopeId) -> "GravityConfig":
        """The law as it binds one scope: what everybody teaches stays within a radius of its own."""
        return replace(self, trust_radius=self.global_trust_radius) if scope.kind == "global" else self


_WHOLE_NUMBERS = (
    "decay_window_tokens",
    "usage_halflife_tokens",
    "warmup_tokens",
    "window_tokens",
    "credit_candidates",
    "settling_warmup_tokens",
    "settling_halflife_tokens",
)
_RANGES = (
    ("plasticity_rate", 0.0, 1.0),
    ("bonding_rate", 0.0, 1.0),
    ("usage_threshold", 0.0, 1e6),
    ("decay_rate", 0.0, 1.0),
    ("decay_window_tokens", 1, 1e12),
    ("usage_halflife_tokens", 1, 1e12),
    ("warmup_tokens", 0, 1e15),
    ("repulsion_rate", 0.0, 1.0),
    ("trust_radius", 0.0, 100.0),
    ("global_trust_radius", 0.0, 100.0),
    ("window_tokens", 1, 1e9),
    ("credit_clamp", 1e-6, 1e6),
    ("credit_candidates", 0, 1e6),
    ("settling_warmup_tokens", 0, 1e12),
    ("settling_ridge", 1e-9, 1e3),
    ("settling_halflife_tokens", 0, 1e12),
)

"""What the engine tells about itself: counts that the metrics page reads, and latencies as they happen."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineCounters:
    """What the engine has done since its start. Tokens by endpoint."""

    prompt_tokens: Counter[str] = field(default_factory=Counter[str])  # computed
    prefix_queries: Counter[str] = field(
        default_factory=Counter[str]
    )  # of prompts that might take what is kept
    prefix_hits: Counter[str] = field(default_factory=Counter[str])  # taken instead of computed
    generated_tokens: Counter[str] = field(default_factory=Counter[str])
    steps: int = 0
    failed_steps: int = 0
    lessons_failed: int = 0
    finished: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])  # endpoint, reason
    renewals: Counter[tuple[str, str]] = field(default_factory=Counter[tuple[str, str]])  # endpoint, outcome


@dataclass(frozen=True, slots=True)
class Observers:
    """Who is told about latencies, in seconds: endpoint and value."""

    queued: Callable[[str, float], None]
    first_token: Callable[[str, float], None]
    inter_token: Callable[[str, float], None]
    finished: Callable[[str, float], None]

"""What requests may teach: who says so, the budget of their API key, and what the metrics count of it."""

from collections.abc import Sequence
from dataclasses import replace

from server.exchange import Caller
from server.generation import Generation, GenerationRequest, PlasticityMode
from server.metrics import Metrics
from server.registry import Endpoint
from server.schemas.generation import GenerationBody


def wanted_mode(
    body: GenerationBody, endpoint: Endpoint, caller: Caller, max_tokens: int
) -> PlasticityMode | None:
    """What a request says of its plasticity, or else its API key; None leaves it to the endpoint.

    A prompt that is scored or replayed teaches nothing unless the request says so: measuring must not move what it
    measures. Clients that score prompts ask for a token besides (lm-eval), so the log-probabilities of an echo count, where `within_request` does not ask to learn.
    """
    if endpoint.plasticity is None or body.plasticity is not None:
        return body.plasticity
    mode = caller.plasticity
    reported = body.report.echo and body.report.top_logprobs is not None and not body.within_request
    fixed = max_tokens == 0 or reported or body.routed_experts is not None or body.key_version is not None
    return "read" if fixed and (mode or endpoint.plasticity.default) == "learn" else mode


def within_budget(
    requests: Sequence[GenerationRequest], endpoint: Endpoint, caller: Caller, metrics: Metrics
) -> list[GenerationRequest]:
    """The requests; when they would teach more than the API key has left, all of them read only."""
    offered = sum(_offered_tokens(request, endpoint) for request in requests)
    if caller.budget is None or not offered or caller.budget.allows(offered):
        return list(requests)
    metrics.count_refused(endpoint.name, "budget", offered)
    return [
        replace(request, plasticity="read", within_request=False)
        if _offered_tokens(request, endpoint)
        else request
        for request in requests
    ]


class Charge:
    """What generations that have started may teach: taken from the budget at once, settled when they have ended."""

    def __init__(
        self, generations: Sequence[Generation], endpoint: Endpoint, caller: Caller, metrics: Metrics
    ):
        self._generations, self._endpoint, self._metrics = generations, endpoint, metrics
        self._budget = caller.budget
        self._charged = self._learned()
        if self._budget is not None:
            self._budget.spend(self._charged)

    def settle(self) -> None:
        """Count what was let teach, and give back what need not: tokens that the prefix cache had."""
        learned = self._learned()
        if learned:
            self._metrics.count_learned(self._endpoint.name, learned)
        if self._budget is not None:
            self._budget.give_back(self._charged - learned)

    def _learned(self) -> int:
        return sum(generation.keys.learned_tokens for generation in self._generations)


def _offered_tokens(request: GenerationRequest, endpoint: Endpoint) -> int:
    """Prompt tokens that would teach: those with a next one."""
    if endpoint.plasticity is None or request.key_version is not None:
        return 0
    mode = request.plasticity or endpoint.plasticity.default
    return len(request.prompt_token_ids) - 1 if mode == "learn" else 0

"""Endpoints by name: what a model id in a request stands for. Assembled once at start by `server.build`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from keystore.records import ScopeId
from keystore.store import KeyStore
from model.blocks.base import ExpertUsage
from model.keys import KeyView
from model.tokenizer import TextTokenizer
from server.engine.errors import ContextLengthExceeded
from server.engine.runner import EngineRunner
from server.engine.sequence import Lesson, RoutedRows, Sequence
from server.generation import Generation, GenerationRequest, KeyUse, PlasticityMode, open_mailbox
from server.plasticity import Teacher


class UnknownEndpoint(LookupError):
    """No endpoint of that name is served."""


class PlasticityUnavailable(ValueError):
    """The request asks for keys of an endpoint that has none."""


class FlowStepsUnavailable(ValueError):
    """The request asks for integration steps of an endpoint that has no flow-matching experts."""


class RoutedExpertsUnavailable(ValueError):
    """The request asks which experts worked, of an endpoint that has none."""


class RoutedExpertsInvalid(ValueError):
    """The experts that the request prescribes do not fit its prompt or the endpoint's layers, or it has none."""


@dataclass(frozen=True, slots=True)
class Plasticity:
    """The moving part of an endpoint: its key store, what turns prompts into statistics, the default mode."""

    store: KeyStore
    teacher: Teacher
    default: PlasticityMode


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One served model: a variant of the base under a name of its own."""

    name: str
    variant: str  # "dense" is the untouched base
    created: int  # unix seconds
    tokenizer: TextTokenizer
    runner: EngineRunner
    max_model_len: int
    eos_token_id: int
    usage: ExpertUsage | None
    plasticity: Plasticity | None

    def start(self, request: GenerationRequest) -> Generation:
        """Queue a request. Needs a running event loop.

        Raises ContextLengthExceeded, EngineOverloaded, EngineDraining, PlasticityUnavailable,
        FlowStepsUnavailable, RoutedExpertsUnavailable, RoutedExpertsInvalid and the key store's
        KeyVersionUnavailable.
        """
        return self.start_all([request])[0]

    def start_all(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Queue several requests, all or none; raises as `start`."""
        made = [self._prepare(request) for request in requests]
        self.runner.submit(*(sequence for sequence, _ in made))
        return [generation for _, generation in made]

    def start_watched(
        self, request: GenerationRequest, keys: KeyView, watch: Callable[[Lesson], None]
    ) -> Generation:
        """Queue a request that reads `keys`; its prompt's routing goes to `watch`, on the engine's thread."""
        sequence, generation = self._prepare(request)
        sequence.keys, sequence.teach = keys, watch
        self.runner.submit(sequence)
        return generation

    def _prepare(self, request: GenerationRequest) -> tuple[Sequence, Generation]:
        prompt, wanted = len(request.prompt_token_ids), request.params.max_tokens
        if prompt + wanted > self.max_model_len:
            raise ContextLengthExceeded(prompt, wanted, self.max_model_len)
        if request.flow_steps is not None and self.variant != "fm-moe":
            raise FlowStepsUnavailable(
                f"endpoint {self.name!r} has no flow-matching experts: 'flow_steps' does not apply"
            )
        if request.report.routed_experts and self.usage is None:
            raise RoutedExpertsUnavailable(
                f"endpoint {self.name!r} has no experts: 'return_routed_experts' does not apply"
            )
        if request.routed_experts is not None:
            self._check_prescribed(request.routed_experts, prompt)
        use, keys, teach = self._keys_for(request)
        mailbox = open_mailbox()
        sequence = Sequence(
            sequence_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=request.params,
            endpoint=self.name,
            variant=None if self.variant == "dense" else self.name,
            keys=keys,
            teach=teach,
            deliver=mailbox.put,
            eos_token_id=self.eos_token_id,
            arrived_at=time.monotonic(),
            flow_steps=request.flow_steps,
            report=request.report,
            forced=request.routed_experts,
        )
        return sequence, Generation(
            self.runner, sequence, mailbox, self.tokenizer, request.stop, use, request.report
        )

    def _check_prescribed(self, expert_ids: RoutedRows, prompt_tokens: int) -> None:
        if self.usage is None or self.variant in ("mom", "ffn"):
            raise RoutedExpertsInvalid(
                f"endpoint {self.name!r} does not choose experts: 'routed_experts' does not apply"
            )
        layers, per_token = len(self.usage.layers), self.usage.num_experts_per_tok
        num_experts = self.usage.counts.shape[2]
        if expert_ids.shape[1:] != (layers, per_token) or len(expert_ids) > prompt_tokens:
            raise RoutedExpertsInvalid(
                f"routed_experts has shape {expert_ids.shape}; allowed: at most {prompt_tokens} tokens of the prompt, "
                f"{layers} layers, {per_token} experts"
            )
        in_order = np.sort(expert_ids, axis=2)
        if (expert_ids >= num_experts).any() or (in_order[..., 1:] == in_order[..., :-1]).any():
            raise RoutedExpertsInvalid(
                f"routed_experts must name different experts for a token, from 0 to {num_experts - 1}"
            )

    def _keys_for(
        self, request: GenerationRequest
    ) -> tuple[KeyUse, KeyView | None, Callable[[Lesson], None] | None]:
        """What the request reads, pinned now for its whole life, and whom it teaches."""
        if self.plasticity is None:
            if request.key_version is not None or request.plasticity not in (None, "off"):
                raise PlasticityUnavailable(
                    f"endpoint {self.name!r} has no routing keys: 'plasticity' and 'key_version' do not apply"
                )
            return KeyUse(None, None, "off", 0), None, None
        mode = request.plasticity or self.plasticity.default
        if request.key_version is not None and mode == "learn":
            if request.plasticity == "learn":
                raise PlasticityUnavailable("a request pinned by 'key_version' can read but not learn")
            mode = "read"
        store = self.plasticity.store
        scope = (
            ScopeId("session", request.tenant, request.session_id)
            if request.session_id is not None
            else ScopeId("tenant", request.tenant)
        )
        view = store.view(scope, 0 if mode == "off" and request.key_version is None else request.key_version)
        learns = mode == "learn" and not store.is_frozen(scope)
        offered = len(request.prompt_token_ids) - 1 if learns else 0
        teach = self.plasticity.teacher.lesson_taker(scope) if learns else None
        return KeyUse(view.version, str(scope), mode, offered), view, teach


class Registry:
    """Every endpoint of the process, and what they share."""

    def __init__(self, endpoints: Mapping[str, Endpoint], runners: tuple[EngineRunner, ...]):
        self.endpoints = dict(endpoints)
        self.runners = runners

    def get(self, name: str) -> Endpoint:
        """Raises UnknownEndpoint, naming what there is."""
        endpoint = self.endpoints.get(name)
        if endpoint is None:
            raise UnknownEndpoint(
                f"the model {name!r} does not exist; available: {', '.join(self.endpoints)}"
            )
        return endpoint

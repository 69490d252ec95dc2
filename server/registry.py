"""Endpoints by name: what a model id in a request stands for. Assembled once at start by `server.build`."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from keystore.records import ScopeId
from keystore.store import KeyStore
from model.blocks.base import ExpertUsage
from model.keys import KeyView
from model.sampling import SamplingParams
from model.tokenizer import TextTokenizer
from server.added_experts import AddedExperts
from server.engine.errors import ContextLengthExceeded
from server.engine.renewal import KeyRenewal, KeySpan
from server.engine.runner import EngineRunner
from server.engine.sequence import Lesson, RoutedRows, Sequence
from server.generation import Generation, GenerationRequest, KeyUse, PlasticityMode, open_mailbox
from server.key_stores import Background
from server.plasticity import Teacher
from server.prefix_scopes import prefix_use
from server.prompt_windows import learn_within
from server.value_offsets import Session, ValueOffsets

Teach = Callable[[Lesson], None]


class UnknownEndpoint(LookupError):
    """No endpoint of that name is served."""


class PlasticityUnavailable(ValueError):
    """The request asks for keys of an endpoint that has none."""


class FlowStepsUnavailable(ValueError):
    """The request asks for integration steps of an endpoint that has no flow-matching experts."""


class WithinRequestUnavailable(ValueError):
    """The request asks to learn from its prompt's beginning before the end, where nothing can be learned so."""


class RoutedExpertsUnavailable(ValueError):
    """The request asks which experts worked, of an endpoint that has none."""


class ValueOffsetsUnavailable(ValueError):
    """The request asks for value offsets where there are none, or without a session to learn them from."""


class RoutedExpertsInvalid(ValueError):
    """The experts that the request prescribes do not fit its prompt or the endpoint's layers, or it has none."""


@dataclass(frozen=True, slots=True)
class Plasticity:
    """The moving part of an endpoint: its key store, what turns prompts into statistics, the defaults."""

    store: KeyStore
    teacher: Teacher
    experts: AddedExperts
    default: PlasticityMode
    learn_scope: Literal["tenant", "global"] = "tenant"
    value_offsets: ValueOffsets | None = None  # None: the endpoint does not offer them
    background: Background | None = None  # what keeps the keys moving; None: whoever consolidates by hand

    def scope_of(self, tenant: str, session_id: str | None = None) -> ScopeId:
        """Whose keys a request reads and teaches. Raises InvalidConfig on a name that is none."""
        if session_id is not None:
            return ScopeId("session", tenant, session_id)
        return ScopeId("global") if self.learn_scope == "global" else ScopeId("tenant", tenant)


@dataclass(frozen=True, slots=True)
class Watched:
    """A request that reads `keys`, and who gets the routing of its prompt, on the engine's thread."""

    request: GenerationRequest
    keys: KeyView
    watch: Callable[[Lesson], None]


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
    fixed_keys: KeyView | None = None  # of experts that are found by keys which never move
    end_token_ids: frozenset[int] = frozenset()  # tokens that end an answer beside eos_token_id

    def start(self, request: GenerationRequest) -> Generation:
        """Queue a request. Needs a running event loop.

        Raises ContextLengthExceeded, EngineOverloaded, EngineDraining, PlasticityUnavailable,
        FlowStepsUnavailable, RoutedExpertsUnavailable, RoutedExpertsInvalid, ValueOffsetsUnavailable and the
        key store's KeyVersionUnavailable.
        """
        return self.start_all([request])[0]

    def start_all(self, requests: list[GenerationRequest]) -> list[Generation]:
        """Queue several requests, all or none; raises as `start`."""
        made = [self._prepare(request) for request in requests]
        self.runner.submit(*(sequence for sequence, _ in made))
        return [generation for _, generation in made]

    def start_watched(self, *watched: Watched) -> list[Generation]:
        """Queue requests, all or none, that read given keys and teach whoever watches; raises as `start`."""
        made = [self._prepare(each.request) for each in watched]
        for (sequence, _), each in zip(made, watched, strict=True):
            sequence.keys, sequence.teach, sequence.prefix = each.keys, each.watch, None
        self.runner.submit(*(sequence for sequence, _ in made))
        return [generation for _, generation in made]

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
        use, keys, teach = self._keys_for(request)
        if request.routed_experts is not None:
            self._check_prescribed(request.routed_experts, prompt, keys)
        renewal, session = None, None
        if request.within_request:
            renewal, teach = self._learn_within(request, use, keys, teach)
            use = replace(use, spans=(KeySpan(0, use.key_version or 0),))
        if request.value_offsets:
            session, teach = self._with_offsets(request, use, teach)
            use = replace(use, offset_windows=session.offsets.windows)
        mailbox = open_mailbox()
        sequence = Sequence(
            sequence_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            params=self._with_ends(request.params),
            endpoint=self.name,
            variant=None if self.variant == "dense" else self.name,
            keys=keys,
            teach=teach,
            deliver=mailbox.put,
            eos_token_id=self.eos_token_id,
            arrived_at=time.monotonic(),
            flow_steps=request.flow_steps,
            report=request.report,
            grammar=None if request.grammar is None else request.grammar.begin(),
            forced=request.routed_experts,
            offsets=None if session is None or keys is None else session.newest(keys),
            newest_offsets=None if session is None else session.newest,
            renewal=renewal,
            prefix=prefix_use(
                self.name,
                request,
                use,
                keys,
                teaches=teach is not None,
                credits_whole_prompts=self.plasticity is not None
                and self.plasticity.teacher.credits_whole_prompts,
            ),
        )
        return sequence, Generation(
            self.runner, sequence, mailbox, self.tokenizer, request.stop, use, request.report
        )

    def _with_ends(self, params: SamplingParams) -> SamplingParams:
        """The request's own, and every token that ends this model's answers."""
        if params.ignore_eos or not self.end_token_ids:
            return params
        return replace(params, stop_token_ids=params.stop_token_ids | self.end_token_ids)

    def _check_prescribed(self, expert_ids: RoutedRows, prompt_tokens: int, keys: KeyView | None) -> None:
        if self.usage is None or self.variant in ("mom", "ffn"):
            raise RoutedExpertsInvalid(
                f"endpoint {self.name!r} does not choose experts: 'routed_experts' does not apply"
            )
        layers, per_token = len(self.usage.layers), self.usage.num_experts_per_tok
        if expert_ids.shape[1:] != (layers, per_token) or len(expert_ids) > prompt_tokens:
            raise RoutedExpertsInvalid(
                f"routed_experts has shape {expert_ids.shape}; allowed: at most {prompt_tokens} tokens of the prompt, "
                f"{layers} layers, {per_token} experts"
            )
        in_order = np.sort(expert_ids, axis=2)
        if (in_order[..., 1:] == in_order[..., :-1]).any():
            raise RoutedExpertsInvalid("routed_experts must name different experts for a token")
        for i, layer in enumerate(self.usage.layers):
            allowed = self._experts_to_name(layer, keys)
            if not np.isin(expert_ids[:, i], allowed).all():
                raise RoutedExpertsInvalid(
                    f"routed_experts must name experts that layer {layer} has: {len(allowed)}, up to {allowed[-1]}"
                )

    def _experts_to_name(self, layer: int, keys: KeyView | None) -> NDArray[np.int64]:
        """Rising ids of the experts of a layer that a request may prescribe."""
        assert self.usage is not None, self.name
        if keys is None:
            return np.arange(self.usage.of_layer(layer).shape[1])
        visible = keys.visible_ids(layer)
        return np.arange(len(keys.keys_of(layer))) if visible is None else visible

    def _keys_for(self, request: GenerationRequest) -> tuple[KeyUse, KeyView | None, Teach | None]:
        """What the request reads, pinned now for its whole life, and whom it teaches."""
        if self.plasticity is None:
            if request.key_version is not None or request.plasticity not in (None, "off"):
                raise PlasticityUnavailable(
                    f"endpoint {self.name!r} has no routing keys: 'plasticity' and 'key_version' do not apply"
                )
            return KeyUse(None, None, "off", 0), self.fixed_keys, None
        mode = request.plasticity or self.plasticity.default
        if request.key_version is not None and mode == "learn":
            if request.plasticity == "learn":
                raise PlasticityUnavailable("a request pinned by 'key_version' can read but not learn")
            mode = "read"
        store = self.plasticity.store
        scope = self.plasticity.scope_of(request.tenant, request.session_id)
        # Off means the anchors alone: not even what settles in the scope.
        off = mode == "off" and request.key_version is None
        view = store.view(ScopeId("anchor")) if off else store.view(scope, request.key_version)
        learns = mode == "learn" and not store.is_frozen(scope)
        offered = len(request.prompt_token_ids) - 1 if learns else 0
        teach = self.plasticity.teacher.lesson_taker(scope) if learns else None
        return KeyUse(view.version, str(scope), mode, offered), view, teach

    def _learn_within(
        self, request: GenerationRequest, use: KeyUse, keys: KeyView | None, teach: Teach | None
    ) -> tuple[KeyRenewal | None, Teach | None]:
        """What renews the keys while the prompt is being read; nothing does in a frozen scope."""
        if self.plasticity is None or keys is None or use.plasticity != "learn":
            raise WithinRequestUnavailable(
                "'within_request' needs an endpoint with keys and plasticity 'learn'"
            )
        scope = self.plasticity.scope_of(request.tenant, request.session_id)
        if scope.kind == "global":
            raise WithinRequestUnavailable(
                "what everybody teaches is judged first: 'within_request' needs a 'session_id' here"
            )
        if teach is None:
            return None, None
        return learn_within(
            self.plasticity.teacher,
            self.plasticity.store,
            scope,
            keys,
            len(request.prompt_token_ids),
            self.runner.wake,
        )

    def _with_offsets(
        self, request: GenerationRequest, use: KeyUse, teach: Teach | None
    ) -> tuple[Session, Teach | None]:
        """The session whose value offsets the request reads; what teaches its keys moves them as well."""
        held = None if self.plasticity is None else self.plasticity.value_offsets
        if held is None or self.plasticity is None:
            raise ValueOffsetsUnavailable(
                f"endpoint {self.name!r} has no value offsets: 'value_offsets' does not apply"
            )
        if request.session_id is None or use.plasticity == "off":
            raise ValueOffsetsUnavailable(
                "'value_offsets' are a session's own; allowed: with 'session_id' and plasticity 'read' or 'learn'"
            )
        session = held.open(self.plasticity.scope_of(request.tenant, request.session_id))
        if teach is None:
            return session, None

        def teach_both(lesson: Lesson) -> None:
            held.take(session, lesson)
            teach(lesson)

        return session, teach_both


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

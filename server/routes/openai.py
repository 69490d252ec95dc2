"""OpenAI's API: models, completions, chat completions; at the root and pinned to one endpoint by the path."""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from model.grammar import Grammar
from server.exchange import caller_of, exchange_of
from server.feedback import past_answer
from server.generation import GenerationRequest
from server.refusals import InvalidRequest
from server.registry import Endpoint
from server.routes.answers import Answer
from server.routes.dialects import ChatDialect, CompletionDialect, Dialect, Frame, Tally, key_headers
from server.routes.learning import Charge, wanted_mode, within_budget
from server.routes.lookup import PinnedEndpoint, served_endpoint
from server.routes.prompts import check_logit_bias, check_token_ids, encode_messages, encode_prompt
from server.routes.streams import DONE, EventStream, stop_when_left
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import ChatAnswer, CompletionAnswer, Model, ModelList, answers
from server.schemas.chat import ChatBody, as_template_input
from server.schemas.completions import DEFAULT_MAX_TOKENS, CompletionBody
from server.schemas.generation import GenerationBody
from server.state import state_of

router = APIRouter(route_class=StrictJsonRoute)

MOST_LOGPROBS = 500_000  # tokens times entries of each; about 100 bytes each until the answer is sent

COMPLETION, CHAT = CompletionDialect(), ChatDialect()
STREAMED = {"text/event-stream": "with `stream`: chunks after `data: `, then `data: [DONE]`"}
COMPLETIONS, CHATS = answers(CompletionAnswer, STREAMED), answers(ChatAnswer, STREAMED)


@router.get("/v1/models", responses=answers(ModelList))
@router.get("/{endpoint}/v1/models", responses=answers(ModelList))
async def list_models(request: Request, endpoint: PinnedEndpoint) -> Response:
    registry = state_of(request).registry
    served = registry.endpoints.values() if endpoint is None else [registry.get(endpoint)]
    return json_response({"object": "list", "data": [_described(each) for each in served]})


@router.get("/v1/models/{model}", responses=answers(Model))
@router.get("/{endpoint}/v1/models/{model}", responses=answers(Model))
async def retrieve_model(request: Request, model: str, endpoint: PinnedEndpoint) -> Response:
    return json_response(_described(served_endpoint(state_of(request).registry, endpoint, model)))


@router.post("/v1/completions", responses=COMPLETIONS)
@router.post("/{endpoint}/v1/completions", responses=COMPLETIONS)
async def create_completion(request: Request, body: CompletionBody, endpoint: PinnedEndpoint) -> Response:
    target = served_endpoint(state_of(request).registry, endpoint, body.model)
    single = len(body.prompt) == 1
    prompts = [
        await encode_prompt(
            target,
            prompt,
            "prompt" if single else f"prompt.{i}",
            add_special_tokens=body.add_special_tokens,
        )
        for i, prompt in enumerate(body.prompt)
    ]
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return await _generate(request, COMPLETION, target, body, prompts, max_tokens)


@router.post("/v1/chat/completions", responses=CHATS)
@router.post("/{endpoint}/v1/chat/completions", responses=CHATS)
async def create_chat_completion(request: Request, body: ChatBody, endpoint: PinnedEndpoint) -> Response:
    target = served_endpoint(state_of(request).registry, endpoint, body.model)
    prompt = await encode_messages(target, as_template_input(body.messages))
    max_tokens = body.max_new_tokens(target.max_model_len - len(prompt))
    return await _generate(request, CHAT, target, body, [prompt], max_tokens)


async def _generate(
    request: Request,
    dialect: Dialect,
    endpoint: Endpoint,
    body: GenerationBody,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
) -> Response:
    """Start every choice of every prompt, then answer whole or piece by piece."""
    _check_extent(endpoint, body, prompts, max_tokens)
    state, caller = state_of(request), caller_of(request)
    grammar = await _grammar_of(request, endpoint, body)
    requests = list(_requests(request, endpoint, body, prompts, max_tokens, grammar))
    generations = endpoint.start_all(within_budget(requests, endpoint, caller, state.metrics))
    charge = Charge(generations, endpoint, caller, state.metrics)
    tally = Tally(sum(map(len, prompts)), len(generations), body.n)
    facts = exchange_of(request).facts
    facts |= {"model": endpoint.name, "prompt_tokens": tally.prompt_tokens, "choices": tally.choices}
    frame = Frame(
        f"{dialect.prefix}{uuid.uuid4().hex}",
        int(time.time()),
        endpoint.name,
        state.system_fingerprint,
    )

    def complete() -> None:
        charge.settle()
        past = past_answer(endpoint.name, caller.tenant, generations)
        if past is not None:
            state.answers.remember(frame.answer_id, past)

    answer = Answer(dialect, frame, generations, body.report, tally, complete)
    headers = key_headers([generation.keys for generation in generations])

    def release() -> None:
        facts["completion_tokens"] = tally.completion_tokens
        if not tally.complete:
            charge.settle()
        for generation in generations:
            generation.cancel()

    if body.stream:
        chunks = answer.stream(
            with_usage=body.wants_usage_chunk, continuous_usage=body.wants_continuous_usage
        )
        return EventStream(chunks, headers, DONE, release)
    try:
        return json_response(await stop_when_left(request.receive, answer.collect()), headers)
    finally:
        release()


async def _grammar_of(request: Request, endpoint: Endpoint, body: GenerationBody) -> Grammar | None:
    """What the answer must be. Raises InvalidRequest, TooManyCompilations."""
    schema = body.schema_of_answer
    if schema is None:
        return None
    grammars, tenant = state_of(request).grammars, caller_of(request).tenant
    return await grammars.get(endpoint.tokenizer, endpoint.eos_token_id, tenant, schema)


def _requests(
    request: Request,
    endpoint: Endpoint,
    body: GenerationBody,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
    grammar: Grammar | None,
) -> Iterator[GenerationRequest]:
    """One request for each choice. A prompt teaches once, however many choices it has."""
    request_id, tenant = exchange_of(request).request_id, caller_of(request).tenant
    default = endpoint.plasticity.default if endpoint.plasticity is not None else "off"
    mode = wanted_mode(body, endpoint, caller_of(request), max_tokens)
    for p, prompt in enumerate(prompts):
        for choice in range(body.n):
            first = GenerationRequest(
                request_id=request_id if len(prompts) * body.n == 1 else f"{request_id}.{p}.{choice}",
                prompt_token_ids=prompt,
                params=body.sampling_params(max_tokens, choice),
                stop=tuple(body.stop),
                tenant=tenant,
                session_id=body.session_id,
                plasticity=mode,
                key_version=body.key_version,
                flow_steps=body.flow_steps,
                routed_experts=body.routed_experts,
                value_offsets=body.value_offsets,
                within_request=body.within_request,
                grammar=grammar,
                report=body.report,
            )
            repeats = choice > 0 and (mode or default) == "learn"
            yield replace(first, plasticity="read") if repeats else first


def _check_extent(
    endpoint: Endpoint, body: GenerationBody, prompts: Sequence[tuple[int, ...]], max_tokens: int
) -> None:
    """Refuse what could never be served, however long it waited. Raises InvalidRequest."""
    engine = endpoint.runner.engine
    sequences, most = len(prompts) * body.n, engine.scheduler.config.max_waiting
    if sequences > most:
        raise InvalidRequest(
            f"{len(prompts)} prompts times n = {body.n} are {sequences} answers; allowed: {most}", "n"
        )
    if body.within_request and sequences > 1:
        raise InvalidRequest(
            f"'within_request' is on for {sequences} answers; allowed: one prompt and n = 1", "within_request"
        )
    if body.within_request and body.routed_experts is not None:
        raise InvalidRequest(
            "'within_request' goes on with newer keys, which may lack experts that 'routed_experts' names; allowed:"
            " one of them",
            "within_request",
        )
    tokens = sum(len(prompt) + body.n * max_tokens for prompt in prompts)
    if body.n > 1 and tokens > engine.cache.capacity_tokens:
        raise InvalidRequest(
            f"prompts plus n times max_tokens are {tokens} tokens; allowed: {engine.cache.capacity_tokens}",
            "n",
        )
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {body.min_tokens}; allowed: at most max_tokens, which is {max_tokens}",
            "min_tokens",
        )
    _check_logprobs(body, prompts, max_tokens)
    check_token_ids(body.stop_token_ids, endpoint.tokenizer.vocab_size, "stop_token_ids")
    check_logit_bias(body.logit_bias, endpoint.tokenizer.vocab_size)


def _check_logprobs(body: GenerationBody, prompts: Sequence[tuple[int, ...]], max_tokens: int) -> None:
    """Refuse an answer of more log-probabilities than the server would hold. Raises InvalidRequest."""
    report = body.report
    if report.top_logprobs is None:
        return
    tokens = body.n * sum(max_tokens + (len(prompt) if report.echo else 0) for prompt in prompts)
    entries = tokens * (1 + report.top_logprobs)
    if entries > MOST_LOGPROBS:
        raise InvalidRequest(
            f"this asks for up to {entries} log-probabilities in one answer; allowed: {MOST_LOGPROBS}",
            "logprobs",
        )


def _described(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": "libration",
        "max_model_len": endpoint.max_model_len,
    }

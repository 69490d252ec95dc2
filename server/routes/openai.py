"""OpenAI's API: models, completions, chat completions; at the root and pinned to one endpoint by the path."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response

from server.exchange import caller_of, exchange_of
from server.generation import Generation, GenerationRequest
from server.refusals import InvalidRequest
from server.registry import Endpoint
from server.routes.dialects import (
    ChatDialect,
    CompletionDialect,
    Dialect,
    Frame,
    Tally,
    key_headers,
    key_report,
)
from server.routes.lookup import served_endpoint
from server.routes.prompts import check_token_ids, encode_messages, encode_prompt
from server.routes.streams import DONE, EventStream, interleaved, sse, stop_when_left
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.chat import ChatBody, as_template_input
from server.schemas.completions import DEFAULT_MAX_TOKENS, CompletionBody
from server.schemas.generation import GenerationBody
from server.state import state_of

router = APIRouter(route_class=StrictJsonRoute)

COMPLETION, CHAT = CompletionDialect(), ChatDialect()


@router.get("/v1/models")
@router.get("/{endpoint}/v1/models")
async def list_models(request: Request, endpoint: str | None = None) -> Response:
    registry = state_of(request).registry
    served = registry.endpoints.values() if endpoint is None else [registry.get(endpoint)]
    return json_response({"object": "list", "data": [_described(each) for each in served]})


@router.get("/v1/models/{model}")
@router.get("/{endpoint}/v1/models/{model}")
async def retrieve_model(request: Request, model: str, endpoint: str | None = None) -> Response:
    return json_response(_described(served_endpoint(state_of(request).registry, endpoint, model)))


@router.post("/v1/completions")
@router.post("/{endpoint}/v1/completions")
async def create_completion(request: Request, body: CompletionBody, endpoint: str | None = None) -> Response:
    target = served_endpoint(state_of(request).registry, endpoint, body.model)
    single = len(body.prompt) == 1
    prompts = [
        await encode_prompt(target, prompt, "prompt" if single else f"prompt.{i}")
        for i, prompt in enumerate(body.prompt)
    ]
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    return await _generate(request, COMPLETION, target, body, prompts, max_tokens)


@router.post("/v1/chat/completions")
@router.post("/{endpoint}/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatBody, endpoint: str | None = None) -> Response:
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
    generations = endpoint.start_all(list(_requests(request, endpoint, body, prompts, max_tokens)))
    tally = Tally(sum(map(len, prompts)), len(generations))
    facts = exchange_of(request).facts
    facts |= {"model": endpoint.name, "prompt_tokens": tally.prompt_tokens, "choices": tally.choices}
    frame = Frame(
        f"{dialect.prefix}{uuid.uuid4().hex}",
        int(time.time()),
        endpoint.name,
        state_of(request).system_fingerprint,
    )
    headers = key_headers([generation.keys for generation in generations])
    if body.stream:

        def release() -> None:
            facts["completion_tokens"] = tally.completion_tokens
            for generation in generations:
                generation.cancel()

        chunks = _chunks(dialect, frame, generations, tally, with_usage=body.wants_usage_chunk)
        return EventStream(chunks, headers, DONE, release)
    await stop_when_left(request.receive, _collect(generations, tally))
    facts["completion_tokens"] = tally.completion_tokens
    return json_response(_whole(dialect, frame, generations, tally), headers)


async def _collect(generations: Sequence[Generation], tally: Tally) -> None:
    async with aclosing(interleaved(generations)) as deltas:
        async for index, delta in deltas:
            tally.add(index, delta)


def _whole(dialect: Dialect, frame: Frame, generations: Sequence[Generation], tally: Tally) -> dict[str, Any]:
    choices = [dialect.choice(i, text, tally.finish_reasons[i]) for i, text in enumerate(tally.texts)]
    return frame.around(dialect.whole, choices) | {
        "usage": tally.usage(),
        "libration": key_report([generation.keys for generation in generations]),
    }


async def _chunks(
    dialect: Dialect, frame: Frame, generations: Sequence[Generation], tally: Tally, *, with_usage: bool
) -> AsyncGenerator[bytes]:
    """The stream's chunks. The last one of all carries the `libration` object."""
    report = {"libration": key_report([generation.keys for generation in generations])}
    no_usage = {"usage": None} if with_usage else {}
    for index in range(tally.choices):
        opening = dialect.opening(index)
        if opening is not None:
            yield sse(frame.around(dialect.piece, [opening]) | no_usage)
    async with aclosing(interleaved(generations)) as deltas:
        async for index, delta in deltas:
            tally.add(index, delta)
            if delta.text or delta.finish_reason is not None:
                choice = dialect.piece_choice(index, delta.text, delta.finish_reason)
                last = report if tally.complete and not with_usage else {}
                yield sse(frame.around(dialect.piece, [choice]) | no_usage | last)
    if with_usage:
        yield sse(frame.around(dialect.piece, []) | {"usage": tally.usage()} | report)


def _requests(
    request: Request,
    endpoint: Endpoint,
    body: GenerationBody,
    prompts: Sequence[tuple[int, ...]],
    max_tokens: int,
) -> Iterator[GenerationRequest]:
    """One request for each choice. A prompt teaches once, however many choices it has."""
    request_id, tenant = exchange_of(request).request_id, caller_of(request).tenant
    default = endpoint.plasticity.default if endpoint.plasticity is not None else "off"
    for p, prompt in enumerate(prompts):
        for choice in range(body.n):
            first = GenerationRequest(
                request_id=request_id if len(prompts) * body.n == 1 else f"{request_id}.{p}.{choice}",
                prompt_token_ids=prompt,
                params=body.sampling_params(max_tokens, choice),
                stop=tuple(body.stop),
                tenant=tenant,
                session_id=body.session_id,
                plasticity=body.plasticity,
                key_version=body.key_version,
                flow_steps=body.flow_steps,
            )
            repeats = choice > 0 and (body.plasticity or default) == "learn"
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
    tokens = sum(len(prompt) + body.n * max_tokens for prompt in prompts)
    if body.n > 1 and tokens > engine.cache.capacity_tokens:
        raise InvalidRequest(
            f"prompts plus n times max_tokens are {tokens} tokens; allowed: {engine.cache.capacity_tokens}",
            "n",
        )
    check_token_ids(body.stop_token_ids, endpoint.tokenizer.vocab_size, "stop_token_ids")


def _described(endpoint: Endpoint) -> dict[str, Any]:
    return {
        "id": endpoint.name,
        "object": "model",
        "created": endpoint.created,
        "owned_by": "libration",
        "max_model_len": endpoint.max_model_len,
    }

"""Text to tokens and back, for clients that count."""

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from server.registry import Endpoint, Registry
from server.routes.lookup import served_endpoint
from server.routes.prompts import check_token_ids, encode_messages, encode_text
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.chat import as_template_input
from server.schemas.tokens import DetokenizeBody, TokenizeBody
from server.state import state_of

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/tokenize")
async def tokenize(request: Request, body: TokenizeBody) -> Response:
    endpoint = _endpoint(state_of(request).registry, body.model)
    if body.messages is not None:
        tokens = await encode_messages(endpoint, as_template_input(body.messages))
    else:
        tokens = await encode_text(endpoint, body.prompt or "")
    texts = [endpoint.tokenizer.token_bytes(token).decode(errors="replace") for token in tokens]
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": endpoint.max_model_len,
            "tokens": tokens,
            "token_strs": texts if body.return_token_strs else None,
        }
    )


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeBody) -> Response:
    tokenizer = _endpoint(state_of(request).registry, body.model).tokenizer
    check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
    return json_response({"prompt": await run_in_threadpool(tokenizer.decode, body.tokens)})


def _endpoint(registry: Registry, model: str | None) -> Endpoint:
    return served_endpoint(registry, None, model if model is not None else next(iter(registry.endpoints)))

"""Text to tokens and back, for clients that count."""

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from server.registry import Endpoint, Registry
from server.routes.logprobs import token_text
from server.routes.lookup import PinnedEndpoint, served_endpoint
from server.routes.prompts import check_token_ids, encode_messages, encode_text
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import Text, TokenizerInfo, Tokens, answers
from server.schemas.chat import as_template_input
from server.schemas.tokens import DetokenizeBody, TokenizeBody
from server.state import state_of

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/tokenize", responses=answers(Tokens))
@router.post("/{endpoint}/tokenize", responses=answers(Tokens))
async def tokenize(request: Request, body: TokenizeBody, endpoint: PinnedEndpoint) -> Response:
    target = _endpoint(state_of(request).registry, endpoint, body.model)
    if body.messages is not None:
        tokens = await encode_messages(target, as_template_input(body.messages))
    else:
        tokens = await encode_text(target, body.prompt or "", add_special_tokens=body.add_special_tokens)
    texts = [token_text(target.tokenizer, token) for token in tokens] if body.return_token_strs else None
    return json_response(
        {
            "count": len(tokens),
            "max_model_len": target.max_model_len,
            "tokens": tokens,
            "token_strs": texts,
        }
    )


@router.post("/detokenize", responses=answers(Text))
@router.post("/{endpoint}/detokenize", responses=answers(Text))
async def detokenize(request: Request, body: DetokenizeBody, endpoint: PinnedEndpoint) -> Response:
    tokenizer = _endpoint(state_of(request).registry, endpoint, body.model).tokenizer
    check_token_ids(body.tokens, tokenizer.vocab_size, "tokens")
    return json_response({"prompt": await run_in_threadpool(tokenizer.decode, body.tokens)})


@router.get("/tokenizer_info", responses=answers(TokenizerInfo))
@router.get("/{endpoint}/tokenizer_info", responses=answers(TokenizerInfo))
async def tokenizer_info(request: Request, endpoint: PinnedEndpoint, model: str | None = None) -> Response:
    """What a client needs to render conversations by itself; the fields as in a tokenizer_config.json."""
    target = _endpoint(state_of(request).registry, endpoint, model)
    tokenizer = target.tokenizer
    return json_response(
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "vocab_size": tokenizer.vocab_size,
            "model_max_length": target.max_model_len,
            "add_bos_token": tokenizer.begins_texts,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "pad_token": None,
            "unk_token": None,
            "chat_template": tokenizer.chat_template,
        }
    )


def _endpoint(registry: Registry, in_path: str | None, in_body: str | None) -> Endpoint:
    """The endpoint that is named, or the first one: they share a tokenizer."""
    if in_path is None and in_body is None:
        in_body = next(iter(registry.endpoints))
    return served_endpoint(registry, in_path, in_body)

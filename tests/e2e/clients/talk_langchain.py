"""What langchain-openai makes of a server. Prints one JSON object; run in the clients' environment."""

import asyncio
import json
import sys

import openai
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI, OpenAI

url, api_key = sys.argv[1:]
HERE = {"base_url": f"{url}/v1", "api_key": api_key, "temperature": 0, "max_retries": 0}
QUESTION = "What is the capital of France?"


def refused(model: ChatOpenAI) -> str:
    """OpenAI's exception that langchain's own descends from."""
    try:
        model.invoke(QUESTION)
    except openai.APIStatusError as error:
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == openai.__name__)
    return "answered"


async def streamed(model: ChatOpenAI) -> str:
    return "".join([chunk.content async for chunk in model.astream(QUESTION)])


some, dense = ChatOpenAI(model="some", **HERE), ChatOpenAI(model="dense", stream_usage=True, **HERE)
message = some.invoke(QUESTION)
chunks = list(dense.stream(QUESTION))
total = chunks[0]
for chunk in chunks[1:]:
    total = total + chunk
chain = ChatPromptTemplate.from_messages([("user", "What is the capital of {country}?")]) | dense
capitals = (chain | StrOutputParser()).batch([{"country": "France"}, {"country": "Italy"}])
kept = ChatOpenAI(model="some", extra_body={"session_id": "langchain", "plasticity": "read"}, **HERE)
scored = dense.bind(logprobs=True, top_logprobs=2).invoke(QUESTION)
print(
    json.dumps(
        {
            "chat": message.content,
            "usage": message.usage_metadata["total_tokens"],
            "finish_reason": message.response_metadata["finish_reason"],
            "stream": total.content,
            "stream_usage": total.usage_metadata["total_tokens"],
            "async_stream": asyncio.run(streamed(dense)),
            "capitals": capitals,
            "session": kept.invoke(QUESTION).content,
            "scored_tokens": len(scored.response_metadata["logprobs"]["content"]),
            "text": OpenAI(model="dense", max_tokens=3, **HERE).invoke("One, two, three,"),
            "unknown_model": refused(ChatOpenAI(model="nobody", **HERE)),
            "wrong_key": refused(ChatOpenAI(model="some", **(HERE | {"api_key": "wrong"}))),
        }
    )
)

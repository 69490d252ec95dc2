"""What litellm makes of a server. Prints one JSON object; run in the clients' environment."""

import json
import sys

import litellm
import openai

url, api_key = sys.argv[1:]
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
HERE = {"api_base": f"{url}/v1", "api_key": api_key, "num_retries": 0}
GREEDY = {"messages": PARIS, "temperature": 0, **HERE}


def refused(**fields: object) -> str:
    try:
        litellm.completion(**({"model": "openai/some", **GREEDY} | fields))
    except openai.APIStatusError as error:  # which litellm's own descend from
        return type(error).__name__
    return "answered"


answer = litellm.completion(model="openai/some", **GREEDY)
chunks = list(
    litellm.completion(model="openai/dense", stream=True, stream_options={"include_usage": True}, **GREEDY)
)
text = litellm.text_completion(
    model="text-completion-openai/dense", prompt="One, two, three,", max_tokens=3, temperature=0, **HERE
)
rebuilt = litellm.stream_chunk_builder(chunks, messages=PARIS)
print(
    json.dumps(
        {
            "chat": answer.choices[0].message.content,
            "finish_reason": answer.choices[0].finish_reason,
            "tokens": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
            "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
            "stream_tokens": [rebuilt.usage.prompt_tokens, rebuilt.usage.completion_tokens],
            "text": text.choices[0].text,
            "unknown_model": refused(model="openai/nobody"),
            "bad_value": refused(extra_body={"min_p": 9}),
            "too_long": refused(messages=[{"role": "user", "content": "word " * 9000}]),
            "wrong_key": refused(api_key="wrong"),
        }
    )
)

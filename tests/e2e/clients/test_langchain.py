"""langchain-openai: chat models, streams, chains and text completion."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("talk_langchain.py")
ANSWER = "The capital of France is Paris."


def test_langchain_invokes_streams_batches_and_chains(server, run):
    told = json.loads(run("python", SCRIPT, server.url, "user-key").splitlines()[-1])
    for way in ("chat", "stream", "async_stream", "session"):
        assert told[way] == ANSWER, way
    assert told["usage"] == told["stream_usage"] == 45
    assert told["finish_reason"] == "stop"
    assert told["capitals"][0] == ANSWER
    assert told["capitals"][1] not in ("", ANSWER)
    assert told["scored_tokens"] == 8
    assert told["text"].strip()
    assert told["unknown_model"] == "NotFoundError"
    assert told["wrong_key"] == "AuthenticationError"

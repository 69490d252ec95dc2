"""litellm, which many programs put between themselves and a server."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("talk_litellm.py")


def test_litellm_chats_streams_and_raises_its_own_exceptions(server, run):
    told = json.loads(run("python", SCRIPT, server.url, "user-key").splitlines()[-1])
    assert told["chat"] == told["stream"] == "The capital of France is Paris."
    assert told["finish_reason"] == "stop"
    assert told["tokens"] == told["stream_tokens"] == [37, 8]
    assert told["text"].strip()
    assert told["unknown_model"] == "NotFoundError"
    assert told["bad_value"] == "BadRequestError"
    assert told["too_long"] == "ContextWindowExceededError"
    assert told["wrong_key"] == "AuthenticationError"

"""What a stranger sees: the real model over HTTP, keys that move, and a server that survives."""

import itertools
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
from openai import NotFoundError, OpenAI

PARIS = "What is the capital of France?"
QUESTIONS = [f"Write one sentence about the number {n}." for n in range(8)]


def c_code(tokens_wanted: int) -> str:
    """Real C: numpy's own headers, about three characters to a token."""
    headers = sorted(Path(np.get_include()).glob("numpy/*.h"))
    return "\n".join(path.read_text() for path in headers)[: 3 * tokens_wanted]


def teach(server, tokens=5000, **body):
    """Post C code in prompts of about 1,000 tokens and wait until it has been learned."""
    token_ids = server.post("/tokenize", model="some", prompt=c_code(2 * tokens))["tokens"][:tokens]
    for first in range(0, tokens, 1000):
        server.post(
            "/v1/completions", model="some", prompt=token_ids[first : first + 1000], max_tokens=1, **body
        )
    wait_until(lambda: settled(server))


def settled(server):
    """Learning follows the answer: it is over when nothing waits and nothing has been published for a while."""
    before = metric(server, "libration_key_updates_total")
    time.sleep(0.5)
    waiting = metric(server, "libration_credit_waiting_tokens")
    return not waiting and metric(server, "libration_key_updates_total") == before


def wait_until(condition, timeout_s=10.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def metric(server, name, **labels):
    """Sum of a metric's series that carry the given labels."""
    total = 0.0
    for line in server.client.get("/metrics").text.splitlines():
        if line.startswith(name + "{") and all(f'{k}="{v}"' in line for k, v in labels.items()):
            total += float(line.rsplit(" ", 1)[1])
    return total


VARIANTS = ("some", "moe", "mom", "fm-moe", "dense")


@pytest.fixture(scope="module")
def shared(start_for_module):
    """A server for the tests that leave no mark on it."""
    return start_for_module("shared")


def test_a_stranger_gets_paris_from_every_endpoint_by_model_and_by_base_url(shared):
    for phase in ("import", "load", "listen"):
        assert metric(shared, "libration_startup_seconds", phase=phase) > 0
    for name in VARIANTS:
        assert "Paris" in text_of(shared.chat(name, PARIS))
        for client, model in (
            (OpenAI(base_url=f"{shared.url}/v1", api_key="none"), name),
            (OpenAI(base_url=f"{shared.url}/{name}/v1", api_key="none"), name),
        ):
            with client:
                stream = client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": PARIS}],
                    temperature=0,
                    max_tokens=24,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                chunks = list(stream)
                text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
                assert "Paris" in text
                assert chunks[-1].usage.completion_tokens > 0
                with pytest.raises(NotFoundError):
                    client.chat.completions.create(
                        model="nobody", messages=[{"role": "user", "content": "x"}]
                    )


def test_eight_streams_at_once_equal_their_single_stream_text(shared):
    asked = list(zip(itertools.cycle(VARIANTS), QUESTIONS, strict=False))  # all variants in one batch

    def answer(item):
        return text_of(shared.chat(*item, plasticity="off", max_tokens=40))

    alone = [answer(item) for item in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answer, asked))
    assert together == alone


def test_the_base_is_in_memory_once_for_all_five(start):
    server = start()
    for name in VARIANTS:
        server.chat(name, PARIS)
    resident = psutil.Process(server.process.pid).memory_info().rss
    base = sum(path.stat().st_size for path in (server.data_dir / "cache").glob("*.safetensors"))
    assert resident < 3 * base + 500 * 2**20, (resident, base)


def test_keys_move_with_the_traffic_within_their_radius_and_survive_kill_9(start):
    server = start()
    first = server.chat("some", PARIS, plasticity="read")
    assert first["libration"]["key_version"] == 0
    teach(server)
    overview = server.get("/v1/keys/some")
    version = overview["version"]
    assert version >= 15
    layers = overview["layers"]
    assert sum(layer["drift"]["moved"] for layer in layers) > 50
    assert all(layer["drift"]["max"] <= 1 for layer in layers)

    usage = server.get("/v1/keys/some/usage")
    for phase, counts in zip(usage["phases"], usage["counts"], strict=True):
        matrix = np.array(counts)
        assert metric(server, "libration_expert_tokens_total", model="some", phase=phase) == matrix.sum()
        assert matrix.sum() % 4 == 0

    again = server.chat("some", PARIS, key_version=0)
    assert text_of(again) == text_of(first)
    assert again["libration"] == {
        "key_version": 0,
        "scope": "tenant:default",
        "plasticity": "read",
        "learned_tokens": 0,
    }

    before = server.get("/v1/keys/some/versions")["data"][0]
    answer = text_of(server.chat("some", QUESTIONS[0], plasticity="read"))
    assert server.end(signal.SIGKILL) == -signal.SIGKILL
    restarted = start()
    after = restarted.get("/v1/keys/some/versions")["data"][0]
    assert (after["version"], after["checksum"]) == (before["version"], before["checksum"])
    assert restarted.get("/v1/keys/some")["version"] == version
    assert text_of(restarted.chat("some", QUESTIONS[0], plasticity="read")) == answer


def test_freeze_stops_movement_and_rollback_restores_answers(start):
    server = start()
    prompt = {
        "prompt": c_code(100),
        "max_tokens": 24,
        "temperature": 0,
        "model": "some",
        "plasticity": "read",
    }
    teach(server, 1000)
    early = server.get("/v1/keys/some")["version"]
    early_text = server.post("/v1/completions", **prompt)["choices"][0]["text"]
    teach(server, 3000)
    late = server.get("/v1/keys/some")["version"]
    assert late > early
    server.post("/admin/keys/some/freeze")
    teach(server, 2000)
    assert server.get("/v1/keys/some")["version"] == late
    assert server.get("/v1/keys/some")["frozen"] is True
    conflict = server.client.post(
        "/admin/keys/some/rollback", json={"to_version": early, "if_version": late + 5}
    )
    assert conflict.status_code == 409
    assert conflict.headers["x-should-retry"] == "false"
    rolled = server.post("/admin/keys/some/rollback", to_version=early, if_version=late)["version"]
    assert rolled == late + 1
    assert server.post("/v1/completions", **prompt)["choices"][0]["text"] == early_text
    server.post("/admin/keys/some/unfreeze")
    teach(server, 1000)
    assert server.get("/v1/keys/some")["version"] > rolled


def test_sessions_learn_for_themselves_alone(start):
    server = start()
    teach(server, 2000, session_id="one")
    assert server.get("/v1/keys/some?session_id=one")["version"] > 0
    assert server.get("/v1/keys/some")["version"] == 0
    answer = server.chat("some", PARIS, session_id="two", plasticity="read")["libration"]
    assert (answer["key_version"], answer["scope"]) == (0, "session:default/two")


def test_a_prompt_over_the_context_is_a_400_that_names_the_limit(shared):
    response = shared.client.post(
        "/v1/completions", json={"model": "some", "prompt": [5] * 9000, "max_tokens": 1}
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "8192" in error["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_second(shared, stream):
    body = {
        "model": "some",
        "prompt": "Once upon a time",
        "max_tokens": 4000,
        "ignore_eos": True,
        "stream": stream,
    }
    leaving = httpx.Client(base_url=shared.url, timeout=0.7 if not stream else 30)
    if stream:
        with leaving.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            assert metric(shared, "libration_requests_running") == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            leaving.post("/v1/completions", json=body)
    leaving.close()
    wait_until(lambda: metric(shared, "libration_requests_running") == 0, timeout_s=1.0)
    assert "libration_kv_cache_usage_ratio 0.0" in shared.client.get("/metrics").text


def test_sigterm_lets_a_stream_finish_flushes_learning_and_exits_0(start):
    server = start()
    prompt = server.post("/tokenize", model="some", prompt=c_code(600))["tokens"][:100]
    body = {"model": "some", "prompt": prompt, "max_tokens": 40, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        wait_until(lambda: httpx.get(f"{server.url}/health/ready").status_code == 503, timeout_s=1.0)
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" or rest[-1] == "data: [DONE]"
    assert server.process.wait(timeout=30) == 0
    restarted = start()
    assert restarted.get("/v1/keys/some")["version"] == 1  # the 99 tokens that no window had taken yet


def test_prompt_text_is_in_no_log(start):
    server = start()
    canary = "xylophone-quagmire-7391"
    server.chat("some", canary)
    server.client.post("/v1/completions", json={"model": canary, "prompt": canary, "bogus": canary})
    server.client.get(f"/v1/{canary}")
    server.end()
    assert canary not in server.log()

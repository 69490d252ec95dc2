"""Over real sockets: OpenAI's own client, bodies that are too long or too slow, and what the log keeps."""

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import openai
import pytest

CANARY = "xylophone-canary-7731"


@pytest.fixture(scope="module")
def served(serve, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("live"), receive_timeout_s=0.5, max_body_bytes=100_000) as running:
        yield running


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_openais_client_streams_a_chat(client):
    messages = [{"role": "user", "content": "hello"}]
    whole = client.chat.completions.create(
        model="some", messages=messages, max_tokens=20, temperature=0, extra_body={"ignore_eos": True}
    )
    stream = client.chat.completions.create(
        model="some",
        messages=messages,
        max_tokens=20,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.usage.completion_tokens == 20
    assert whole.model_extra["libration"]["scope"] == "tenant:default"


def test_openais_client_completes_and_lists(client):
    answer = client.completions.create(
        model="dense", prompt=["a", "b"], max_tokens=3, extra_body={"ignore_eos": True}
    )
    assert len(answer.choices) == 2
    assert [m.id for m in client.models.list()] == ["some", "moe", "mom", "fm-moe", "dense"]


def test_openais_client_understands_our_errors(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="a")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="some", prompt="a", temperature=9)
    assert caught.value.param == "temperature"


def test_a_client_can_be_pinned_by_its_base_url(url):
    with openai.OpenAI(base_url=f"{url}/dense/v1", api_key="none") as pinned:
        assert pinned.completions.create(model="dense", prompt="a", max_tokens=1).model == "dense"


@pytest.mark.parametrize("declared", [True, False], ids=["content-length", "chunked"])
def test_fifty_megabytes_are_413(url, declared):
    content = b"x" * 50_000_000 if declared else (b"x" * 100_000 for _ in range(500))
    response = httpx.post(
        f"{url}/v1/completions", content=content, headers={"Content-Type": "application/json"}, timeout=20
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_body_that_trickles_is_given_up(url):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n"
        connection.sendall(head.encode())
        for _ in range(4):
            connection.sendall(b" ")
            time.sleep(0.1)
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"connection: close" in answer.lower()
    assert json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]["code"] == "request_timeout"


def test_slow_senders_do_not_hold_others_up(url):
    address = urlsplit(url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 500\r\n\r\n{"
    slow = [socket.create_connection((address.hostname, address.port)) for _ in range(100)]
    for connection in slow:
        connection.sendall(head)
    assert (
        httpx.post(
            f"{url}/v1/completions", json={"model": "some", "prompt": "a", "max_tokens": 1}
        ).status_code
        == 200
    )
    for connection in slow:
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        connection.close()


def test_a_client_that_leaves_in_the_middle_of_its_body_is_forgotten(url, log_lines, wait_until):
    address = urlsplit(url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{")
    wait_until(lambda: any('"status":499' in line for line in log_lines))
    assert not any("trace" in line for line in log_lines)


def test_prompts_and_api_keys_are_never_logged(url, log_lines):
    headers = {"Authorization": f"Bearer {CANARY}"}
    messages = [{"role": "user", "content": CANARY}]
    bodies = [
        ("/v1/completions", {"model": "some", "prompt": CANARY, "max_tokens": 2, "stop": CANARY}),
        ("/v1/completions", {"model": "some", "prompt": CANARY, "max_tokens": 2, "stream": True}),
        ("/v1/chat/completions", {"model": "some", "messages": messages, "max_tokens": 2}),
        ("/v1/completions", {"model": "some", "prompt": {"a": CANARY}}),
        ("/v1/completions", {"model": CANARY, "prompt": CANARY}),
        ("/v1/completions", {"model": "some", "prompt": "a", CANARY: CANARY}),
        ("/tokenize", {"prompt": CANARY}),
        ("/v1/keys/some/layers/2/search", {"text": CANARY, "k": 1}),
        (f"/{CANARY}", {}),
        (f"/{CANARY}/v1/completions", {"prompt": "a"}),
    ]
    for path, body in bodies:
        httpx.post(url + path, json=body, headers=headers, params={"q": CANARY})
    httpx.post(
        f"{url}/v1/completions",
        content=f'{{"prompt": "{CANARY}',
        headers={"Content-Type": "application/json"},
    )
    ours = [line for line in log_lines if '"logger":"server' in line or '"logger":"uvicorn' in line]
    assert len(ours) >= len(bodies)
    assert not any(CANARY in line for line in ours)
    assert CANARY not in httpx.get(f"{url}/metrics").text


def test_one_line_tells_of_each_request(url, log_lines):
    body = {"model": "some", "prompt": "four", "max_tokens": 3, "ignore_eos": True}
    httpx.post(f"{url}/v1/completions", json=body, headers={"X-Request-Id": "line-1"})
    (line,) = [json.loads(line) for line in log_lines if '"request_id":"line-1"' in line]
    assert line.pop("duration_ms") > 0
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "logger": "server.access",
        "message": "request",
        "request_id": "line-1",
        "method": "POST",
        "route": "/v1/completions",
        "status": 200,
        "tenant": "default",
        "model": "some",
        "prompt_tokens": 4,
        "choices": 1,
        "completion_tokens": 3,
    }


def test_nothing_is_left_running(served, wait_until):
    wait_until(lambda: served.idle)

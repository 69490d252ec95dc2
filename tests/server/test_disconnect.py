"""A client that leaves gives its slot and memory back."""

import json
import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from server.engine.scheduler import SchedulerConfig

LONG = {"model": "some", "prompt": "go on", "max_tokens": 4000, "ignore_eos": True}
CHAT = {
    "model": "some",
    "messages": [{"role": "user", "content": "go on"}],
    "max_tokens": 4000,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def served(serve, tmp_path_factory):
    with serve(tmp_path_factory.mktemp("small"), SchedulerConfig(2, 8, 64, 128)) as running:
        yield running


def send(url: str, body: dict, path: str = "/v1/completions") -> socket.socket:
    """A request on a bare socket, whose answer nobody has read yet."""
    address = urlsplit(url)
    connection = socket.create_connection((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


def finished(served, reason):
    return served.engine.counters.finished["some", reason]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), [("/v1/completions", LONG), ("/v1/chat/completions", CHAT)])
def test_leaving_while_tokens_come_frees_everything(served, url, wait_until, path, body, stream):
    before = finished(served, "cancelled")
    connection = send(url, body | {"stream": stream}, path)
    wait_until(lambda: served.runner.running() and len(served.runner.running()[0].generated) > 3)
    assert served.engine.cache.reserved_tokens > 4000
    connection.close()
    wait_until(lambda: served.idle)
    assert finished(served, "cancelled") == before + 1


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_token_frees_everything(served, url, wait_until, stream):
    busy = [send(url, LONG) for _ in range(2)]
    wait_until(lambda: len(served.runner.running()) == 2)
    waiting = send(url, LONG | {"stream": stream})
    wait_until(lambda: len(served.runner.waiting()) == 1)
    waiting.close()
    wait_until(lambda: not served.runner.waiting())
    assert len(served.runner.running()) == 2
    for connection in busy:
        connection.close()
    wait_until(lambda: served.idle)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_several_choices_frees_all_of_them(served, url, wait_until, stream):
    connection = send(url, LONG | {"n": 3, "stream": stream})
    wait_until(lambda: len(served.runner.running()) == 2)
    connection.close()
    wait_until(lambda: served.idle)


def test_a_stop_string_frees_everything_and_counts_as_stop(served, url, wait_until):
    before = finished(served, "stop")
    text = httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 40, "temperature": 0}).json()[
        "choices"
    ][0]["text"]
    answer = httpx.post(f"{url}/v1/completions", json=LONG | {"stop": text[5:7], "temperature": 0}).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    wait_until(lambda: served.idle)
    assert finished(served, "stop") == before + 1


def test_the_log_says_that_the_client_left(served, url, wait_until, log_lines):
    connection = send(url, LONG)
    wait_until(lambda: served.runner.running())
    connection.close()
    wait_until(lambda: any('"status":499' in line for line in log_lines))


def test_many_that_come_and_go_leave_nothing_behind(served, url, wait_until):
    for round_ in range(10):
        connections = [send(url, LONG | {"stream": bool((i + round_) % 2)}) for i in range(6)]
        time.sleep(0.01 * (round_ % 4))
        for connection in connections:
            connection.close()
    # Some of them may still be on their way in, and are in the way of one more.
    wait_until(lambda: httpx.post(f"{url}/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200)
    wait_until(lambda: served.idle)

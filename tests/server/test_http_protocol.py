"""What arrives on a socket before it is a request."""

import json
import socket
from contextlib import closing

import pytest

from server import http_protocol
from server.http_protocol import MAX_HEAD_BYTES

HEAD = b"GET /health/live HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
LENGTH, CHUNKED = b"Content-Length: 2\r\n", b"Transfer-Encoding: chunked\r\n"


@pytest.fixture
def connect(served, url):
    """connect(): a fresh connection."""
    host, port = url.removeprefix("http://").split(":")
    open_sockets = []

    def connected():
        open_sockets.append(socket.create_connection((host, int(port)), timeout=30))
        return open_sockets[-1]

    yield connected
    for each in open_sockets:
        each.close()


def everything(connection):
    """What the server sends until it closes."""
    received = b""
    while chunk := connection.recv(65_536):
        received += chunk
    return received


def refused(answer):
    """Status and code of an answer that has an error object."""
    head, _, body = answer.partition(b"\r\n\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    assert headers[b"content-type"] == b"application/json"
    assert headers[b"connection"] == b"close"
    assert int(headers[b"content-length"]) == len(body)
    assert headers[b"x-request-id"]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error["code"]


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
        POST + LENGTH + LENGTH + b"\r\n{}",
        POST + LENGTH + CHUNKED + b"\r\n{}",
        POST + b"Content-Length: -1\r\n\r\n",
        POST + CHUNKED.replace(b"chunked", b"gzip") + b"\r\n",
    ],
)
def test_what_is_no_http_is_answered_with_an_error_object(connect, data):
    connection = connect()
    connection.sendall(data)
    assert refused(everything(connection)) == (400, "invalid_http")


@pytest.mark.parametrize(
    "rest",
    [
        b"X-Long: " + b"a" * MAX_HEAD_BYTES + b"\r\n\r\n",
        b"".join(b"X-%d: a\r\n" % i for i in range(3000)) + b"\r\n",
        b"X-Endless: " + b"a" * 3_000_000,
        b"X-" + b"a" * 3_000_000,
    ],
    ids=["one header", "many headers", "a value without end", "a name without end"],
)
def test_a_head_that_is_too_large_is_refused_before_it_is_complete(connect, rest):
    connection = connect()
    connection.sendall(HEAD + rest)
    assert refused(everything(connection)) == (431, "request_headers_too_large")


def test_an_address_that_is_too_long_is_refused(connect):
    connection = connect()
    connection.sendall(b"GET /health?" + b"a" * MAX_HEAD_BYTES + b" HTTP/1.1\r\nHost: x\r\n\r\n")
    assert refused(everything(connection)) == (431, "request_headers_too_large")


def test_a_head_within_the_limit_is_read_however_it_is_cut(connect):
    head = HEAD + b"X-Long: " + b"a" * (MAX_HEAD_BYTES - 500) + b"\r\nConnection: close\r\n\r\n"
    for step in (1000, 7000):
        connection = connect()
        for first in range(0, len(head), step):
            connection.sendall(head[first : first + step])
        assert everything(connection).startswith(b"HTTP/1.1 200 OK")


def test_a_large_body_counts_for_no_head(connect):
    body = b'{"prompt": "a"}' + b" " * 50_000
    request = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    connection = connect()
    connection.sendall(request + request + HEAD + b"Connection: close\r\n\r\n")
    assert everything(connection).count(b"HTTP/1.1 200 OK") == 3


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"Connection: keep-alive\r\n\r\n" + HEAD])
def test_who_begins_and_does_not_go_on_is_let_go(connect, monkeypatch, sent):
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.3)
    with closing(connect()) as connection:
        connection.sendall(sent)
        answer = everything(connection)
    if not sent:
        assert answer == b""
        return
    _, found, refusal = answer.rpartition(b"HTTP/1.1 408")
    assert refused(found + refusal) == (408, "request_timeout")
    assert answer.startswith(b"HTTP/1.1 200") == (len(sent) > len(HEAD))


def test_a_websocket_is_an_ordinary_request(connect):
    connection = connect()
    upgrade = b"Connection: Upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Key: AAAA\r\n\r\n"
    connection.sendall(HEAD + upgrade)
    connection.shutdown(socket.SHUT_WR)
    assert connection.recv(65_536).startswith(b"HTTP/1.1 200 OK")

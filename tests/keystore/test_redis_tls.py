"""Redis behind TLS: a proxy that ends it stands in for the server, which need not have been built with it."""

import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.errors import StoreUnavailable


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key."""
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        [
            shutil.which("openssl") or "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt",
            "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_certificate(folder, name) for name in ("server", "client", "stranger")}


def pass_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def tls_url(redis_server, certificates) -> Iterator[str]:
    """Asks its clients for the client's certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificates["server"])
    context.load_verify_locations(certificates["client"][0])
    context.verify_mode = ssl.CERT_REQUIRED
    listener, threads = socket.create_server(("127.0.0.1", 0)), list[threading.Thread]()

    def serve(connection: socket.socket) -> None:
        with (
            suppress(OSError),
            context.wrap_socket(connection, server_side=True) as client,
            socket.create_connection(("127.0.0.1", redis_server.port)) as server,
        ):
            back = threading.Thread(target=pass_on, args=(server, client))
            back.start()
            pass_on(client, server)
            back.join()

    def accept() -> None:
        with suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(listener.accept()[0],)))
                threads[-1].start()

    threads.append(threading.Thread(target=accept))
    threads[0].start()
    yield f"rediss://127.0.0.1:{listener.getsockname()[1]}/0"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join()


@pytest.fixture
def connect(tls_url, certificates) -> Callable[[str, str], RedisClient]:
    """A client that trusts one certificate and shows another."""

    def connect(trusts: str, shows: str) -> RedisClient:
        certificate, key = certificates[shows]
        settings = RedisSettings(
            tls_url,
            tls_ca_file=certificates[trusts][0],
            tls_cert_file=certificate,
            tls_key_file=key,
            timeout_s=30.0,
        )
        return RedisClient(settings)

    return connect


def test_both_sides_show_a_certificate(connect) -> None:
    with closing(connect("server", "client")) as client:
        assert client.call("ECHO", "hello") == b"hello"


@pytest.mark.parametrize(("trusts", "shows"), [("stranger", "client"), ("server", "stranger")])
def test_a_stranger_on_either_side_is_refused(connect, trusts, shows) -> None:
    with closing(connect(trusts, shows)) as client, pytest.raises(StoreUnavailable):
        client.call("PING")

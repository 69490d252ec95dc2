"""A plain client of the HTTP API for commands that talk to a running server; knows nothing of the server's parts."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

import click

Json = dict[str, Any]  # Any: JSON

TIMEOUT_S = 300


@dataclass(frozen=True, slots=True)
class ApiClient:
    """One server. Every method raises click.ClickException, with the server's own words where it has any."""

    url: str  # without a path
    api_key: str | None

    @classmethod
    def of(cls, url: str, api_key: str | None) -> "ApiClient":
        """Raises click.UsageError for what is no address of a server."""
        if not url.startswith(("http://", "https://")):
            raise click.UsageError(f"--url is {url!r}; allowed: an http or https address")
        return cls(url.rstrip("/"), api_key)

    def get(self, path: str) -> Json:
        return json.loads(b"".join(self._lines(path, None)))

    def stream(self, path: str, body: Json) -> Iterator[Json]:
        """Chunks of an answer as they come."""
        for line in self._lines(path, body | {"stream": True}):
            data = line.decode().strip().removeprefix("data: ")
            if data and data != "[DONE]":
                chunk: Json = json.loads(data)
                if "error" in chunk:
                    raise click.ClickException(chunk["error"]["message"])
                yield chunk

    def _lines(self, path: str, body: Json | None) -> Iterator[bytes]:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - `of` has checked it
        try:
            response: HTTPResponse
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:  # noqa: S310
                yield from response
        except urllib.error.HTTPError as error:
            raise click.ClickException(_message_of(error)) from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise click.ClickException(
                f"no answer from {self.url}: {reason}. Is `libration serve` running?"
            ) from error


def _message_of(error: urllib.error.HTTPError) -> str:
    try:
        return json.loads(error.read())["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"the server answered {error.code}"

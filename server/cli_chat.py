"""`libration chat`: a conversation in the terminal with a running server, and what its experts did."""

import base64
import io
from collections.abc import Generator, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import click
import numpy as np

from server.api_client import ApiClient, Json
from server.cli_completion import endpoint_names

SHOWN_EXPERTS = 4


@dataclass(slots=True)
class Conversation:
    """Messages so far, and how to ask for the next one."""

    server: ApiClient
    model: str
    options: Json
    messages: list[dict[str, str]] = field(default_factory=list[dict[str, str]])

    def ask(self, text: str) -> Generator[Json]:
        """Chunks of the answer, which becomes part of the conversation once it is complete.

        Raises click.ClickException with the server's own words.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        answer = ""
        body = {"model": self.model, "messages": asked} | self.options
        for chunk in self.server.stream("/v1/chat/completions", body):
            answer += "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
            yield chunk
        self.messages = [*asked, {"role": "assistant", "content": answer}]


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server listens.")
@click.option(
    "--model",
    default="some",
    show_default=True,
    shell_complete=endpoint_names,
    help="Which endpoint answers.",
)
@click.option("--api-key", envvar="LIBRATION_API_KEY", help="Also from LIBRATION_API_KEY.")
@click.option("--session", "session_id", help="Learn for this conversation alone, under this name.")
@click.option("--plasticity", type=click.Choice(["off", "read", "learn"]), help="Default: the endpoint's.")
@click.option("--flow-steps", type=click.IntRange(1, 64), help="Integration steps of fm-moe.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="Default: the server's.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer.")
def chat(url: str, model: str, api_key: str | None, **options: Any) -> None:
    """Talk to a running server.

    An empty line or end of input ends it, Ctrl-C stops an answer. After each answer: the key version it was computed with, how much was learned, and the busiest experts.
    """
    server = ApiClient.of(url, api_key)
    wanted = {name: value for name, value in options.items() if value is not None}
    wanted |= {"stream_options": {"include_usage": True}}
    if model != "dense":
        wanted["return_routed_experts"] = True
    with suppress(ImportError):
        import_module("readline")  # what is typed can then be edited, and called up again
    conversation = Conversation(server, model, wanted)
    while text := _next_line():
        try:
            with closing(conversation.ask(text)) as chunks:
                _show(chunks)
        except KeyboardInterrupt:
            click.echo(click.style("\nstopped; the conversation goes on without it", dim=True), err=True)


def _next_line() -> str:
    try:
        return click.prompt(click.style("you", bold=True), default="", show_default=False)
    except click.Abort:
        return ""


def _show(chunks: Iterator[Json]) -> None:
    """Print an answer as it comes, then what is known of it."""
    report, usage, routed = {}, None, None
    for chunk in chunks:
        for choice in chunk["choices"]:
            click.echo(choice["delta"].get("content") or "", nl=False)
            routed = choice.get("routed_experts", routed)
        report, usage = chunk.get("libration", report), chunk.get("usage") or usage
    click.echo()
    click.echo(click.style("\n".join(_described(report, usage, routed)), dim=True), err=True)


def _described(report: Json, usage: Json | None, routed: str | None) -> Iterator[str]:
    parts = [f"{usage['completion_tokens']} tokens"] if usage else []
    if report.get("key_version") is not None:
        parts.append(f"keys {report['scope']} version {report['key_version']}")
    if report.get("learned_tokens"):
        parts.append(f"{report['learned_tokens']} tokens to learn from")
    yield ", ".join(parts)
    if routed is not None:
        expert_ids = np.load(io.BytesIO(base64.b64decode(routed)), allow_pickle=False)  # (T, layers, K)
        yield "busiest experts " + ", ".join(
            f"layer {n + 1}: {_busiest(expert_ids[:, n])}" for n in range(expert_ids.shape[1])
        )


def _busiest(expert_ids: np.ndarray[Any, Any]) -> str:
    ids, counts = np.unique(expert_ids, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:SHOWN_EXPERTS]
    return " ".join(f"{ids[i]} ({counts[i] / len(expert_ids):.0%})" for i in order)

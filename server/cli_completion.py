"""`libration completion`: what a shell needs to complete commands, options and the names of endpoints."""

from pathlib import Path

import click
from click.shell_completion import get_completion_class

from server.offline_keys import plastic_endpoints
from server.settings import Settings, load_settings

PROGRAM, VARIABLE = "libration", "_LIBRATION_COMPLETE"
HOW = """\b
bash  eval "$(libration completion bash)"   in ~/.bashrc
zsh   eval "$(libration completion zsh)"    in ~/.zshrc, behind compinit
fish  libration completion fish | source    in ~/.config/fish/config.fish
"""


@click.command(epilog=HOW)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion script of SHELL."""
    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(context.find_root().command, {}, PROGRAM, VARIABLE).source())


def endpoint_names(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Endpoints of the configuration that the command would read."""
    settings = _settings_of(context)
    return [name for name in settings.endpoints if name.startswith(incomplete)] if settings else []


def plastic_names(context: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """Those of them that have routing keys."""
    settings = _settings_of(context)
    return [name for name in plastic_endpoints(settings) if name.startswith(incomplete)] if settings else []


def _settings_of(context: click.Context) -> Settings | None:
    """None where the configuration has a fault: the command itself will tell."""
    file: Path | None = None
    at: click.Context | None = context
    while at is not None and file is None:
        file, at = at.params.get("config_file"), at.parent
    try:
        return load_settings(file)
    except (OSError, ValueError):
        return None

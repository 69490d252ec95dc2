"""Completion of commands, options and endpoints, asked as a shell asks for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner

from server.cli import main
from server.cli_completion import PROGRAM, VARIABLE

CONFIG = "[endpoints.mine]\nvariant = 'some'\n[endpoints.dense]\nvariant = 'dense'\n"


def completed(*words: str) -> list[str]:
    found = ShellComplete(main, {}, PROGRAM, VARIABLE).get_completions(list(words[:-1]), words[-1])
    return [each.value for each in found]


def test_commands_and_options_are_completed():
    assert completed("ser") == ["serve"]
    assert completed("keys", "api", "") == ["create", "list", "revoke"]
    assert "--learned-tokens-per-hour" in completed("keys", "api", "create", "--")
    assert completed("keys", "api", "create", "x", "--level", "a") == ["admin"]


def test_endpoints_come_from_the_configuration_that_the_command_reads(tmp_path):
    file = tmp_path / "libration.toml"
    file.write_text(CONFIG)
    assert completed("keys", "show", "") == ["some"]
    assert completed("keys", "--config", str(file), "show", "") == ["mine"]
    assert completed("keys", "--config", str(file), "experts", "list", "m") == ["mine"]
    assert completed("stream", "text", "--config", str(file), "--endpoint", "") == ["mine"]
    assert completed("chat", "--model", "d") == ["dense"]
    file.write_text("= 3")
    assert completed("keys", "--config", str(file), "show", "") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_its_script(shell):
    result = CliRunner().invoke(main, ["completion", shell])
    assert result.exit_code == 0
    assert f"{VARIABLE}={shell}_complete" in result.stdout
    assert f"libration completion {shell}" in CliRunner().invoke(main, ["completion", "--help"]).output


def test_bash_itself_completes_with_the_script():
    script = (
        'eval "$(libration completion bash)"; COMP_WORDS=(libration keys ver); COMP_CWORD=2; '
        '_libration_completion libration; echo "${COMPREPLY[@]}"'
    )
    here = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=here, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["versions"], done.stderr

"""The tokenizer of a Hugging Face folder: `tokenizer.json`, with what `tokenizer_config.json` says about it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.checkpoints.json_file import JsonFile
from model.checkpoints.plain_file import read_small
from model.errors import CheckpointError
from model.tokenizer import TokenizerSpec

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MAX_TOKENIZER_BYTES = 128 << 20
MAX_TEMPLATE_BYTES = 1 << 20


def read_tokenizer(folder: Path) -> tuple[TokenizerSpec, int | None]:
    """The tokenizer, and the id of the end token that it names. Raises CheckpointError naming the file."""
    path = folder / TOKENIZER_FILE
    content = read_small(path, MAX_TOKENIZER_BYTES)
    try:
        backend = Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is no tokenizer: {str(error)[:200]}") from error
    backend.no_truncation()
    backend.no_padding()
    settings = JsonFile.read_if_there(folder / SETTINGS_FILE)
    special = [id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special]
    eos = _token(settings, "eos_token")
    spec = TokenizerSpec(
        backend=backend.to_str(),
        special_ids=special,
        chat_template=_chat_template(folder, settings),
        bos_token=_token(settings, "bos_token"),
        eos_token=eos,
    )
    return spec, backend.token_to_id(eos) if eos else None


def _token(settings: JsonFile, name: str) -> str:
    """A token that is named as a string, or as an object with its text; empty where there is none."""
    given = settings.value(name)
    return settings.section(name).text("content") if isinstance(given, dict) else settings.text(name)


def _chat_template(folder: Path, settings: JsonFile) -> str:
    """A file of its own goes before the settings' field, which may be a list of named ones."""
    path = folder / TEMPLATE_FILE
    if path.exists():
        try:
            return read_small(path, MAX_TEMPLATE_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is no UTF-8: {error.reason}") from error
    given: Any = settings.value("chat_template")  # Any: JSON
    if not isinstance(given, list):
        return settings.text("chat_template")
    named: dict[str, Any] = {
        str(each.get("name")): each.get("template") for each in given if isinstance(each, dict)
    }
    if not isinstance(named.get("default"), str):
        settings.refuse("chat_template", "a string, or a list with one that is named 'default'")
    return named["default"]

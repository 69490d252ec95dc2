"""The tokenizer of a Hugging Face folder: `tokenizer.json`, with what `tokenizer_config.json` says about it."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.chat_template import ChatTemplate
from model.checkpoints.hf_config import MAX_VOCABULARY
from model.checkpoints.json_file import JsonFile, parsed_object
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
    backend = _backend(path)
    backend.no_truncation()
    backend.no_padding()
    settings = JsonFile.read_if_there(folder / SETTINGS_FILE)
    special = [id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special]
    eos = _token(settings, "eos_token")
    spec = TokenizerSpec(
        backend=backend.to_str(),
        special_ids=special,
        chat_template=_checked_template(folder, settings),
        bos_token=_token(settings, "bos_token"),
        eos_token=eos,
    )
    return spec, backend.token_to_id(eos) if eos else None


def _backend(path: Path) -> Tokenizer:
    content = read_small(path, MAX_TOKENIZER_BYTES)
    _check_what_the_library_trusts(JsonFile(path, parsed_object(str(path), content)))
    try:
        return Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path} is no tokenizer: {str(error)[:200]}") from error


def _check_what_the_library_trusts(file: JsonFile) -> None:
    """Refuses what would end the process: text cut within a character, a table of all ids up to a huge one."""
    model = file.section("model")
    if model.text("continuing_subword_prefix"):  # no family has one
        model.refuse("continuing_subword_prefix", "null")
    vocabulary: Any = model.value("vocab")
    added: Any = file.value("added_tokens")
    ids: list[Any] = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    ids += [each.get("id") for each in added if isinstance(each, dict)] if isinstance(added, list) else []
    wrong = next((each for each in ids if type(each) is not int or not 0 <= each < MAX_VOCABULARY), None)
    if wrong is not None:
        raise CheckpointError(
            f"{file.path}: a token has the id {str(wrong)[:100]}; allowed: 0 to {MAX_VOCABULARY - 1}"
        )


def _token(settings: JsonFile, name: str) -> str:
    """A token that is named as a string, or as an object with its text; empty where there is none."""
    given = settings.value(name)
    return settings.section(name).text("content") if isinstance(given, dict) else settings.text(name)


def _checked_template(folder: Path, settings: JsonFile) -> str:
    """Empty where there is none."""
    source = _chat_template(folder, settings)
    try:
        ChatTemplate(source)
    except CheckpointError as error:
        file = folder / TEMPLATE_FILE
        raise CheckpointError(f"{file if file.exists() else settings.path}: {error}") from error
    return source


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

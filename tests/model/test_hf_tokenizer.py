"""Tokenizers and chat templates of Hugging Face folders, beside transformers reading the same."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel

from model.checkpoints.hf_tokenizer import read_tokenizer
from model.errors import ChatTemplateError, CheckpointError
from model.tokenizer import TextStream, TextTokenizer

TEXTS = ["Hello, world", "  two  spaces ", "naïve 日本語 🎉", "a\n\tb", "", "</s> written out", "\x00\x07"]
MESSAGES = [
    {"role": "user", "content": "Hi <b>'there'</b>"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
TEMPLATES = {
    "loops and namespaces": "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.n = ns.n + 1 %}{% endif %}{{ loop.index0 }} {{ m['content'] | trim }}\n{% endfor %}{{ ns.n }}",
    "json and generation": "{{ messages | tojson }}{% generation %}x{% endgeneration %}{{ [1, 2] + [3] }}",
    "break and tokens": "{{ bos_token }}{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}>{% endif %}",
    "macros and filters": "{% macro f(m) %}{{ m.role | upper }}: {{ m.content[:3] }}{% endmacro %}"
    "{% for m in messages | rejectattr('role', 'equalto', 'assistant') %}{{ f(m) }}{{ '%03d' % loop.index }}{% endfor %}",
}


def read(folder):
    spec, end = read_tokenizer(folder)
    return TextTokenizer(spec), end


@pytest.fixture
def folder(checkpoint, tmp_path):
    """Just the tokenizer's files of a tiny checkpoint."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint("mixtral")[0] / name).read_bytes())
    return tmp_path


def reference(folder):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def settings(folder, **fields):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_token_ids_are_those_of_transformers_with_and_without_what_begins_a_text(folder):
    tokenizer, end = read(folder)
    theirs = reference(folder)
    for text in TEXTS:
        assert tokenizer.encode(text) == theirs.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text, add_special_tokens=True) == theirs.encode(text)
    assert tokenizer.begins_texts
    assert (tokenizer.bos_token, tokenizer.eos_token, end) == ("<s>", "</s>", 1)
    assert tokenizer.special_ids == {0, 1, 2, 3}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_chat_template_renders_as_in_transformers(folder, template):
    settings(folder, chat_template=template)
    expected = reference(folder).apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert read(folder)[0].encode_chat(MESSAGES) == expected


def test_a_template_file_goes_before_the_settings_and_a_list_has_a_default(folder):
    settings(folder, chat_template=[{"name": "tool", "template": "t"}, {"name": "default", "template": "d"}])
    assert read(folder)[0].chat_template == "d"
    (folder / "chat_template.jinja").write_text("from the file")
    assert read(folder)[0].chat_template == "from the file"
    (folder / "chat_template.jinja").unlink()
    settings(folder, chat_template=[{"name": "tool", "template": "t"}])
    with pytest.raises(CheckpointError, match="one that is named 'default'"):
        read(folder)


def test_without_a_template_a_chat_is_refused_and_text_is_not(folder):
    settings(folder, chat_template=None)
    tokenizer, _ = read(folder)
    assert tokenizer.encode("Hello")
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        tokenizer.encode_chat(MESSAGES)


def sentence_piece(folder):
    """Llama 2's and Mistral's kind: `▁` for a space, one before every text, bytes for what no token has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdehlorw,.ï", "▁▁"]
    backend = Tokenizer(
        BPE({p: i for i, p in enumerate(pieces)}, [("▁", "▁")], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in pieces[:3]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return backend


def test_a_sentence_piece_text_survives_encoding_decoding_and_streaming(tmp_path):
    backend = sentence_piece(tmp_path)
    tokenizer, _ = read(tmp_path)
    for text in TEXTS[:4]:
        ids = tokenizer.encode(text)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text == backend.decode(ids)
        stream = TextStream(tokenizer)
        assert "".join(stream.push([i]) for i in ids) + stream.finish() == f" {text}"


def test_a_later_piece_of_a_text_keeps_its_space(tmp_path):
    sentence_piece(tmp_path)
    tokenizer, _ = read(tmp_path)
    hello, world = tokenizer.encode("hello"), tokenizer.encode("world")
    stream = TextStream(tokenizer)
    assert stream.push(hello) + stream.push(world) + stream.finish() == " hello world"


def test_added_tokens_stand_for_their_own_text(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens(["é", "    ", "<think>"])
    backend.save(str(folder / "tokenizer.json"))
    tokenizer, _ = read(folder)
    for token in ("é", "    ", "<think>"):
        assert tokenizer.token_bytes(backend.token_to_id(token)) == token.encode()
    assert tokenizer.decode(tokenizer.encode("é    <think>")) == "é    <think>"


def test_ids_that_only_the_model_has_stand_for_nothing(folder):
    spec, _ = read_tokenizer(folder)
    tokenizer = TextTokenizer(spec, 600)
    assert tokenizer.vocab_size == 600
    assert tokenizer.token_bytes(599) == b""
    assert tokenizer.decode([599, *tokenizer.encode("a")]) == "a"


def test_a_way_of_spelling_tokens_that_is_not_known_is_refused(tmp_path):
    backend = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match="spells its tokens in a way that is not known"):
        read(tmp_path)


def test_truncation_and_padding_that_a_file_asks_for_are_not_followed(folder):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(3)
    backend.enable_padding(length=64)
    backend.save(str(folder / "tokenizer.json"))
    assert read(folder)[0].encode("Hello, world, hello") == reference_ids(folder, "Hello, world, hello")


def reference_ids(folder, text):
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    return backend.encode(text, add_special_tokens=False).ids

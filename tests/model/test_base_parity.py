"""The real base model against transformers reading the same file."""

import random

import pytest
import torch
from tokenizers import pre_tokenizers
from torch.testing import assert_close

from model.checkpoints import assemble, native
from model.checkpoints.load import find_base_file
from model.kv_cache import CacheBudget
from model.native.decoder import supported
from model.transformer import Segment

GREEDY_TOKENS = 16
PROMPTS = [
    "What is the capital of France? Explain in one sentence.",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "Translate 'good morning' to German.",
    "def fibonacci(n):",
    "Explain gravity to a child.",
    "What is 12 times 7?",
    "Name a mammal that lays eggs.",
    "Why is the sky blue?",
    "Write a SQL query that counts users.",
    "Who wrote Hamlet?",
    "Give me a synonym for happy.",
    "How do plants make food?",
    "Summarise: the cat sat on the mat.",
    "What is the boiling point of water?",
    "Schreibe einen Satz über den Winter.",
    "#include <stdio.h>",
    "Tell me a joke about computers.",
    "What comes after Tuesday?",
    "Describe the colour red.",
]


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find_base_file()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def real(load_real):
    return load_real(torch.float32)


def greedy(base, token_ids, count):
    model = base.transformer
    cache = CacheBudget(model.config, 1024, model.dtype, model.device).reserve(len(token_ids) + count)
    hidden = model.step([Segment(token_ids, 0, cache)])
    written = [int(model.logits(hidden[-1:], written=True).argmax())]
    while len(written) < count:
        position = len(token_ids) + len(written) - 1
        hidden = model.step([Segment(written[-1:], position, cache, decode=True)])
        written.append(int(model.logits(hidden, written=True).argmax()))
    return written


def test_logits_are_within_a_thousandth(real, reference):
    token_ids = real.tokenizer.encode(
        "def area(r):\n    return 3.14159 * r ** 2\n\nDie Fläche ist groß. " * 8
    )
    cache = CacheBudget(real.transformer.config, 1024, torch.float32, torch.device("cpu")).reserve(1024)
    mine = real.transformer.logits(real.transformer.step([Segment(token_ids, 0, cache)]))
    with torch.inference_mode():
        theirs = reference[0](torch.tensor([token_ids])).logits[0]
    assert_close(mine, theirs, atol=1e-3, rtol=0)


def test_greedy_text_is_identical_on_twenty_prompts(real, reference):
    for prompt in PROMPTS:
        token_ids = real.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        written = greedy(real, token_ids, GREEDY_TOKENS)
        # Both write the same if transformers, having read it, would have chosen every token of it.
        with torch.inference_mode():
            read = reference[0](torch.tensor([token_ids + written[:-1]])).logits[0]
        assert written == read[len(token_ids) - 1 :].argmax(1).tolist(), prompt


def hard_strings():
    """200 strings that tokenizers disagree on: scripts, emoji, control characters, code, odd spaces."""
    pieces = [
        "def f(x):\n\treturn x**2  # ok",
        "#include <a.h>\r\n",
        "naïve café",
        "日本語のテキスト",
        "🎉👩‍👩‍👧‍👦🏳️‍🌈",
        "\x00\x01\x07\x1b[0m",
        "  leading",
        "trailing   ",
        "\n\n\n",
        "1234567890",
        "3.14e-10",
        "don't can't I'll",
        "<|im_start|>user",
        "<|im_end|>",
        "<|endoftext|>",
        "Привет, мир",
        "مرحبا بالعالم",
        "שלום",
        "ไทย",
        "한국어",
        "a\u0301e\u0308",
        "\u200b\u200d\ufeff",
        "\ud7ff\ue000",
        "ﬁ ligature",
        "€£¥",
        "→⇒∀x∈ℝ",
        "𝒳𝒴",
        "http://a.b/c?d=e&f=%20",
        '{"k": [1, null]}',
        "\t\t\tx",
        "ÄÖÜß",
        "\u00a0nbsp\u2003em",
        "l'été",
        "___",
        "--->",
    ]
    generator = random.Random(7)
    return [
        "".join(generator.choices(pieces, k=generator.randint(1, 6))) for _ in range(200 - len(pieces))
    ] + pieces


@pytest.fixture
def declared_splitting(reference):
    """transformers' tokenizer with the splitting that the file declares (`tokenizer.ggml.pre = smollm`).

    The original SmolLM2 tokenizer and llama.cpp give every numeral a piece of its own before anything else;
    transformers drops that when it reads a GGUF file.
    """
    backend = reference[1].backend_tokenizer
    as_loaded = backend.pre_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), as_loaded]
    )
    yield backend
    backend.pre_tokenizer = as_loaded


def test_token_ids_are_identical_on_two_hundred_hard_strings(real, declared_splitting):
    for text in (*hard_strings(), "½ ² µ", "a ½ b", "٣ ٤", "x² + y² = 25"):
        assert real.tokenizer.encode(text) == declared_splitting.encode(text, add_special_tokens=False).ids


def test_token_ids_of_text_without_numerals_are_those_of_transformers_as_it_loads(real, reference):
    texts = [text for text in hard_strings() if not any(character.isnumeric() for character in text)]
    assert len(texts) > 100
    for text in texts:
        assert real.tokenizer.encode(text) == reference[1].encode(text, add_special_tokens=False)


def test_text_survives_encoding_and_decoding(real):
    for text in hard_strings():
        if "<|" not in text:
            assert real.tokenizer.decode(real.tokenizer.encode(text)) == text


def test_the_chat_template_renders_like_the_reference(real, reference):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    for conversation in (messages, messages[1:]):
        expected = reference[1].apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=False
        )
        assert real.tokenizer.encode_chat(conversation) == expected


def differing(served, real):
    """The prompts whose answer is not that of float32.

    The float32 model reads prompt and answer at once: it would have written the same if it expects every token.
    """
    found = []
    for prompt in PROMPTS:
        token_ids = served.tokenizer.encode_chat([{"role": "user", "content": prompt}])
        answer = greedy(served, token_ids, GREEDY_TOKENS)
        model = real.transformer
        cache = CacheBudget(model.config, 1024, model.dtype, model.device).reserve(1024)
        hidden = model.step([Segment([*token_ids, *answer[:-1]], 0, cache)])[len(token_ids) - 1 :]
        if model.logits(hidden).argmax(1).tolist() != answer:
            found.append(prompt)
    return found


@pytest.mark.skipif(not supported(), reason="this processor has no AVX-512 VNNI")
def test_served_weights_write_what_float32_writes_on_at_least_18_of_20_prompts(real, load_real):
    found = differing(load_real(torch.bfloat16), real)
    assert len(found) <= 2, found


@pytest.mark.slow
def test_without_compiled_code_they_write_it_on_at_least_17_of_20_prompts(real, load_real, monkeypatch):
    """What a processor without the instructions of compiled code does."""
    monkeypatch.setattr(assemble, "supported", lambda: False)
    monkeypatch.setattr(native, "supported", lambda: False)
    served = load_real(torch.bfloat16)
    assert served.transformer.decoder is None
    assert served.transformer.layers[0].qkv_proj.int4 is not None
    found = differing(served, real)
    assert len(found) <= 3, found

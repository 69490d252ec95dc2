"""Masks that leave only texts of a schema; what cannot be followed is told by its keyword."""

import json
import random

import pytest
import torch

from model.errors import GrammarExhausted, InvalidGrammar
from model.grammar import GrammarCompiler

END = 256
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
        "parent": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
    },
    "required": ["name", "age", "tags", "parent"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, END)


def write(tokenizer, state, seed=0, most=400):
    """A text of tokens chosen at random among those allowed; None when it did not end in time."""
    chooser, written = random.Random(seed), []
    for _ in range(most):
        logits = state.constrain(torch.zeros(tokenizer.vocab_size))
        token = chooser.choice(logits.isfinite().nonzero().flatten().tolist())
        state.accept(token)
        if token == END:
            return tokenizer.decode(written)
        written.append(token)
    return None


def fits_person(value):
    assert list(value) == ["name", "age", "tags", "parent"]
    assert isinstance(value["name"], str)
    assert len(value["name"]) <= 12
    assert value["age"] in range(151)
    assert len(value["tags"]) <= 2
    assert set(value["tags"]) <= {"red", "green"}
    if value["parent"] is not None:
        fits_person(value["parent"])


def test_whatever_is_chosen_among_the_allowed_tokens_fits_the_schema(compiler, tokenizer):
    grammar = compiler.compile(PERSON)
    texts = [write(tokenizer, grammar.begin(), seed) for seed in range(40)]
    complete = [text for text in texts if text is not None]
    assert len(complete) > 10
    for text in complete:
        fits_person(json.loads(text))


def test_logits_of_allowed_tokens_stay_as_they_are(compiler, tokenizer):
    state = compiler.compile({"enum": [True, 7]}).begin()
    logits = torch.randn(tokenizer.vocab_size + 5)  # a model may have more rows than tokens
    before = logits.clone()
    constrained = state.constrain(logits)
    allowed = sorted(tokenizer.encode("t7"))
    assert constrained.isfinite().nonzero().flatten().tolist() == allowed
    torch.testing.assert_close(constrained[allowed], before[allowed], rtol=0, atol=0)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_the_end_is_allowed_where_the_text_is_complete_and_nowhere_else(compiler, tokenizer):
    state = compiler.compile({"const": True}).begin()
    for token in tokenizer.encode("true"):
        assert state.constrain(torch.zeros(259))[END] == -torch.inf
        state.accept(token)
    assert state.constrain(torch.zeros(259)).isfinite().nonzero().flatten().tolist() == [END]


def test_texts_begun_with_one_grammar_go_their_own_ways(compiler, tokenizer):
    grammar = compiler.compile({"enum": ["ab", "cd"]})
    first, second = grammar.begin(), grammar.begin()
    for one, other in zip(tokenizer.encode('"ab"'), tokenizer.encode('"cd"'), strict=True):
        for state, token in ((first, one), (second, other)):
            assert state.constrain(torch.zeros(259))[token] == 0
            state.accept(token)


def test_a_special_token_spelled_in_the_schema_is_only_text(compiler, tokenizer):
    schema = {"const": "say <|end|> or <|user|>"}
    text = write(tokenizer, compiler.compile(schema).begin())
    assert text is not None
    assert json.loads(text) == schema["const"]


def test_white_space_comes_to_an_end(compiler, tokenizer):
    state = compiler.compile({"type": "array", "minItems": 1}).begin()
    space = tokenizer.encode(" ")[0]
    state.accept(tokenizer.encode("[")[0])
    for _ in range(40):
        if state.constrain(torch.zeros(259))[space] == -torch.inf:
            return
        state.accept(space)
    raise AssertionError("more than 40 spaces were allowed")


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {}}, "not"),
        ({"properties": {"a": {"if": {}}}}, "if"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"type": "strong"}, "type"),
        ({"type": "string", "pattern": "("}, "pattern"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "string", "format": "novel"}, "format"),
        ({"type": "string", "minLength": "x"}, "minLength"),
        ({"type": "string", "minLength": 5, "maxLength": 2}, "minLength"),
        ({"type": "integer", "multipleOf": 0}, "multipleOf"),
        ({"$ref": "#/nowhere"}, "$ref"),
        ({"$ref": "http://127.0.0.1:1/schema"}, "$ref"),
        ({"$ref": "file:///etc/passwd"}, "$ref"),
        ({"x-guidance": {"lenient": True}, "uniqueItems": True}, "uniqueItems"),
        ({"anyOf": []}, "anyOf"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no text fits it"),
    ],
)
def test_what_cannot_be_followed_is_named(compiler, schema, named):
    with pytest.raises(InvalidGrammar) as caught:
        compiler.compile(schema)
    assert named in str(caught.value)


def test_a_schema_too_large_is_refused(compiler):
    wide = {f"p{i}": {"type": "integer", "minimum": -(10**15) - i, "maximum": 10**15} for i in range(900)}
    with pytest.raises(InvalidGrammar, match="too big"):
        compiler.compile({"type": "object", "properties": wide})


def test_a_grammar_that_outgrows_its_bounds_is_exhausted_and_a_new_one_is_not(compiler, tokenizer):
    wild = {"type": "string", "pattern": "^.*[ab].{200}$"}
    grammar = compiler.compile(wild)
    state, chooser = grammar.begin(), random.Random(0)
    state.accept(tokenizer.encode('"')[0])

    def write_on():
        for _ in range(200_000):
            state.constrain(torch.zeros(259))
            state.accept(tokenizer.encode(chooser.choice("abxyz"))[0])

    with pytest.raises(GrammarExhausted, match="lexer"):
        write_on()
    assert grammar.exhausted
    assert not compiler.compile(wild).exhausted

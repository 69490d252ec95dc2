"""Chat templates that mean harm: they end with an error, soon, and touch nothing."""

import pytest

from model import chat_template
from model.chat_template import ChatTemplate
from model.errors import ChatTemplateError, CheckpointError

DOUBLING = (
    "{{% set ns = namespace(x={}) %}}{{% for i in range(60) %}}{{% set ns.x = ns.x {} ns.x %}}{{% endfor %}}"
)


def refusal(source, messages=()):
    with pytest.raises(ChatTemplateError) as raised:
        ChatTemplate(source).render(messages)
    return str(raised.value)


def test_a_loop_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "RENDER_TIMEOUT_S", 0.05)
    assert "takes longer than 0.05 s" in refusal("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 2**(10**9) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a' | center(10000000000) }}",
        "{{ 'a'.center(10000000000) }}",
        "{{ 'a'.ljust(width) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '{:>1000000000}'.format(1) }}",
        DOUBLING.format("'a'", "~"),
        DOUBLING.format("'a'", "+"),
        DOUBLING.format("[1]", "+"),
    ],
)
def test_what_would_fill_the_memory_is_refused(source):
    with pytest.raises(ChatTemplateError, match=r"of size|a width like"):
        ChatTemplate(source).render([], width=10_000_000_000)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.os }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ range(10**7) }}",
    ],
)
def test_what_reaches_out_or_breaks_is_an_error_of_the_template(source):
    assert refusal(source, [{"role": "user", "content": "x"}]).startswith("the chat template")


def test_the_templates_own_refusal_is_told():
    assert "no system messages" in refusal("{{ raise_exception('no system messages') }}")


@pytest.mark.parametrize(
    "source", ["{% for %}", "{{", "{% block %}", "{{ '" + "(" * 5000 + " }}", "(" * 10 + "{{ (" + "(" * 3000]
)
def test_what_is_no_template_is_refused_when_it_is_read(source):
    with pytest.raises(CheckpointError, match="the chat template is none"):
        ChatTemplate(source)

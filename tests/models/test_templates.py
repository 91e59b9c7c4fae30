"""Chat templates are rendered as transformers renders them, and end whatever they do."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.models import template_worker
from lorakit.models.chat import _DATED, Chat
from lorakit.models.templates import TemplateError, render
from lorakit.records.record import Turn
from tests.support.chat_templates import TEMPLATES
from tests.support.models import byte_tokenizer

TURNS = [Turn("user", " Hi \ud83d "), Turn("assistant", "Hello"), Turn("user", "日本 <b>'\"")]
MESSAGES = [{"role": turn.role, "content": turn.content} for turn in TURNS]
FEATURES = {
    "loop controls": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}x{% endfor %}",
    "generation": "a{% generation %} b{{ messages[0].role }}{% endgeneration %} c",
    "JSON": "{{ messages | tojson }}{{ {'b': 1, 'a': '<'} | tojson(indent=2, sort_keys=true) }}",
    "namespaces": "{% set n = namespace(self=1, a=2) %}{% set n.a = n.a + 1 %}{{ n.a, n.self }}",
    "dicts": "{{ dict(a=1) }}{{ dict.fromkeys([1, 2], 3) }}",
    "blocks": "  {% if true %}\n  x\n  {% endif %}\n\ty\n",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools }}{{ documents }}",
    "arguments": "{{ enable_thinking }}{{ number + 1 }}{{ missing is defined }}",
    "macros": "{% macro f(x, y='d') %}<{{ x }}{{ y }}>{% endmacro %}{{ f('a') }}",
    "slices": "{{ messages[1:] | length }}{{ messages | map(attribute='role') | join }}",
}


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize(
    "template", [*TEMPLATES.values(), *FEATURES.values()], ids=[*TEMPLATES, *FEATURES]
)
def test_a_template_is_rendered_as_transformers_renders_it(template: str, ask: bool) -> None:
    template = _DATED + template
    tokenizer: Any = byte_tokenizer()
    arguments = {"enable_thinking": False, "number": 1}
    messages = [
        {**message, "content": message["content"].replace("\ud83d", "")} for message in MESSAGES
    ]
    theirs = tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=ask, **arguments
    )
    variables = {**tokenizer.special_tokens_map, **arguments, "tools": None, "documents": None}
    ours = render(template, {**variables, "messages": messages, "add_generation_prompt": ask})
    assert ours == theirs


REFUSED = {
    "an endless loop": (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "it takes more than 5 s of processor time",
    ),
    "a number too large to compute": ("{{ 9 ** (9 ** 9) }}", "it takes more than 5 s"),
    "a text too large to hold": ("{{ 'a' * 10 ** 10 }}", "it needs more than 1024 MiB"),
    "a text too large to take": ("{{ 'a' * 10 ** 7 }}", "it writes more than 4 Mi characters"),
    "a width": ("{{ '%9999999999d' | format(1) }}", "it needs more than 1024 MiB"),
    "a long range": ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
    "a division": ("{{ 1 // 0 }}", "by zero"),
    "a macro that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "no template": ("{% for %}", "xpected"),
    "a way out": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "a hidden field": ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "no field"),
    "a refusal": ("{{ raise_exception('no system turn') }}", "no system turn"),
}


@pytest.mark.parametrize(("template", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_a_template_without_end_or_sense_is_an_error_and_the_next_is_rendered(
    template: str, reason: str
) -> None:
    tokenizer: Any = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        LorakitError,
        match=rf"^d:1: the model's chat template cannot be applied \(.*{reason}.*--chat off",
    ):
        Chat(tokenizer).prompt([Turn("user", "Hi")], "d:1")
    assert render("{{ x }}", {"x": "half \ud800"}) == "half \ud800"


def test_the_reason_that_a_template_gives_is_short_and_in_one_line() -> None:
    with pytest.raises(TemplateError) as raised:
        render("{{ raise_exception('a\nb ' * 1000) }}", {})
    assert str(raised.value).startswith("a b a b")
    assert len(str(raised.value)) == 200


def test_the_process_that_renders_ends_with_its_pipe() -> None:
    command = [sys.executable, "-P", template_worker.__file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0

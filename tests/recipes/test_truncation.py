"""What `--truncate` leaves of the records of every recipe that has a document."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lorakit.models.chat import Chat
from lorakit.models.tokens import Encoder
from lorakit.recipes.request import Request
from lorakit.recipes.table import RECIPES, sample_record
from lorakit.records.record import Record
from tests.support.chat_templates import TEMPLATES
from tests.support.models import byte_tokenizer

END = 2
DOCUMENTED = [name for name, recipe in RECIPES.items() if recipe.document]


@pytest.mark.parametrize("template", [None, "smollm2", "qwen3"])
@pytest.mark.parametrize("recipe", DOCUMENTED)
def test_a_record_far_too_long_still_holds_its_instruction_question_and_cue(
    recipe: str, template: str | None
) -> None:
    """Token for token: each token of the byte tokenizer is a byte of the text."""
    sample = Record(sample_record(recipe, Request()), "sample")
    assert sample.document is not None
    start, end = sample.document
    head, document, tail = sample.prompt[:start], sample.prompt[start:end], sample.prompt[end:]
    prompt = head + document * 60 + tail
    span = [start, start + 60 * len(document)]
    long = Record({**sample.fields, "prompt": prompt, "document": span}, "sample")

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES.get(template or "")
    whole = Encoder(tokenizer, (END,), 10**9, Chat(tokenizer) if template else None)
    short = len(whole.example(sample.with_field("prompt", head + tail)).ids)
    encoder = replace(whole, limit=short + 40, truncate=True)
    example = encoder.example(long)
    text = str(tokenizer.decode(list(example.ids)))
    assert len(example.ids) <= short + 40
    left, cue = text.index(head), text.index(tail, text.index(head) + len(head))
    kept = text[left + len(head) : cue]
    assert kept
    assert document.startswith(kept.rstrip("\N{REPLACEMENT CHARACTER}"))
    expected = whole.example(long.with_field("prompt", head + kept + tail))
    assert example.ids == expected.ids
    assert example.start == expected.start


def test_the_recipes_of_texts_have_documents() -> None:
    assert {"scitldr", "hotpotqa", "samsum", "dialogsum", "xlsum", "mimic"} <= {*DOCUMENTED}

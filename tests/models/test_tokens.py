from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.models.tokens import CHAT_DATE, CutTally, Encoder
from lorakit.records import Record
from tests.support.models import byte_tokenizer

END = 2
CHAT = (
    "{{ strftime_now('%Y-%m-%d') }}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def record(prompt: str, completion: str = "") -> Record:
    return Record({"prompt": prompt, "completion": completion}, "data.jsonl:7")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def decode(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


def test_prompt_and_completion_are_one_string_and_an_end_token(tokenizer: Any) -> None:
    example = Encoder(tokenizer, END, 99).example(record("Say a:", " b"))
    assert decode(tokenizer, example.ids) == "<s>Say a: b</s>"
    assert decode(tokenizer, example.ids[example.start :]) == " b</s>"
    assert example.targets == 3


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_completions_tokens_are_those_that_end_in_it(prompt: str, completion: str) -> None:
    encoder = Encoder(byte_tokenizer(), END, 999)
    example = encoder.example(record(prompt, completion))
    plain = encoder.prompt(record(prompt), 0)
    if "</s>" not in prompt + completion:
        assert example.ids[: example.start] == plain.ids
        said = encoder.tokenizer.decode(list(example.ids[example.start : -1]))
        assert said == completion


def test_a_token_across_the_border_is_learnt() -> None:
    """`▁word` begins with the prompt's last space; without it the first word would be lost."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"<unk>": 0, "▁Say": 1, "▁it": 2, "</s>": 3}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words), 3, 99)
    example = encoder.example(record("Say ", "it"))
    assert (example.ids, example.start) == ((1, 2, 3), 1)


def test_a_record_that_is_too_long_is_named(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match=r"data.jsonl:7: 23 tokens exceed the 20 .*--truncate"):
        Encoder(tokenizer, END, 20).example(record("0123456789:", " abcdefghi"))
    with pytest.raises(LorakitError, match=r"data.jsonl:7: the prompt's 12 tokens and 9 new"):
        Encoder(tokenizer, END, 20).prompt(record("0123456789:"), 9)


def test_truncating_cuts_the_prompts_end_and_keeps_the_completion(tokenizer: Any) -> None:
    example = Encoder(tokenizer, END, 20, truncate=True).example(
        record("0123456789:", " abcdefghi")
    )
    assert decode(tokenizer, example.ids) == "<s>01234567 abcdefghi</s>"
    assert (example.cut, len(example.ids)) == (3, 20)
    prompt = Encoder(tokenizer, END, 20, truncate=True).prompt(record("0123456789:"), 12)
    assert (decode(tokenizer, prompt.ids), prompt.cut) == ("<s>0123456", 4)


def test_a_completion_that_is_too_long_cannot_be_helped_by_truncating(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match="no prompt left to cut"):
        Encoder(tokenizer, END, 8, truncate=True).example(record("0123456789:", " abcdefghi"))


def test_the_tally_reports_the_share_that_was_cut(tokenizer: Any) -> None:
    tally = CutTally()
    encoder = Encoder(tokenizer, END, 20, truncate=True)
    for prompt in ("0123456789:", "short:"):
        tally.add(encoder.example(record(prompt, " abcdefghi")))
    assert tally.note == "1 of 2 records were too long: --truncate cut 13.0 % of their tokens"
    assert CutTally().note is None


@pytest.fixture
def chatty() -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def test_a_chat_template_renders_the_prompt_with_and_without_the_answer(chatty: Any) -> None:
    encoder = Encoder(chatty, END, 99, chat=True)
    example = encoder.example(record("Say a:", " b"))
    prompt = f"{CHAT_DATE}<user>Say a:</s>\n<assistant>"
    assert decode(chatty, example.ids) == f"{prompt}b</s>"
    assert decode(chatty, example.ids[: example.start]) == prompt
    assert decode(chatty, encoder.prompt(record("Say a:"), 4).ids) == prompt


def test_truncating_a_chat_cuts_the_users_words_and_no_marks(chatty: Any) -> None:
    whole = Encoder(chatty, END, 99, chat=True).example(record("0123456789:", " b"))
    cut = Encoder(chatty, END, len(whole.ids) - 4, chat=True, truncate=True)
    example = cut.example(record("0123456789:", " b"))
    assert decode(chatty, example.ids) == f"{CHAT_DATE}<user>0123456</s>\n<assistant>b</s>"
    assert example.cut == 4


def test_a_template_that_rewrites_the_prompt_is_refused(chatty: Any) -> None:
    chatty.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(LorakitError, match=r"data.jsonl:7: .*--chat off"):
        Encoder(chatty, END, 99, chat=True).example(record("a", "b"))

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import LorakitError
from lorakit.models.chat import CHAT_DATE, Chat
from lorakit.models.tokens import CutTally, Encoder
from lorakit.records.record import Record
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
    example = Encoder(tokenizer, (END,), 99).example(record("Say a:", " b"))
    assert decode(tokenizer, example.ids) == "<s>Say a: b</s>"
    assert decode(tokenizer, example.ids[example.start :]) == " b</s>"
    assert example.targets == 3


@given(st.text(max_size=20), st.text(max_size=20))
def test_the_completions_tokens_are_those_that_end_in_it(prompt: str, completion: str) -> None:
    encoder = Encoder(byte_tokenizer(), (END,), 999)
    example = encoder.example(record(prompt, completion))
    plain = encoder.prompt(record(prompt), 0)
    if "</s>" not in prompt + completion:
        assert example.ids[: example.start] == plain.ids
        said = encoder.tokenizer.decode(list(example.ids[example.start : -1]))
        assert said == completion


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("a\ud800", "b"), ("a", "b\udfff"), ("\udc00\ud800", "")]
)
def test_half_a_surrogate_pair_is_an_error_that_names_the_record(
    chatty: Any, chat: bool, prompt: str, completion: str
) -> None:
    encoder = Encoder(chatty, (END,), 99, Chat(chatty) if chat else None)
    with pytest.raises(LorakitError, match=r"^data.jsonl:7: holds \\u[0-9a-f]{4}, half a surrog"):
        encoder.example(record(prompt, completion))


def test_a_token_across_the_border_is_learnt() -> None:
    """`▁word` begins with the prompt's last space; without it the first word would be lost."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordLevel({"<unk>": 0, "▁Say": 1, "▁it": 2, "</s>": 3}, unk_token="<unk>")
    words = Tokenizer(model)
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words), (3,), 99)
    example = encoder.example(record("Say ", "it"))
    assert (example.ids, example.start) == ((1, 2, 3), 1)


def test_a_token_beyond_the_embedding_is_an_error_that_names_the_model(tokenizer: Any) -> None:
    token = max(tokenizer("z", add_special_tokens=False)["input_ids"])
    small = Encoder(tokenizer, (END,), 99, embedded=token, model="small")
    for encode in (small.example, lambda record: small.prompt(record, 0)):
        with pytest.raises(
            LorakitError, match=rf"^data.jsonl:7: the tokenizer of small gives token {token}, '.*z'"
        ):
            encode(record("z"))
    whole = Encoder(tokenizer, (END,), 99, embedded=token + 1)
    assert token in whole.example(record("z")).ids


def test_a_record_that_is_too_long_is_named(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match=r"data.jsonl:7: 23 tokens exceed the 20 .*--truncate"):
        Encoder(tokenizer, (END,), 20).example(record("0123456789:", " abcdefghi"))
    with pytest.raises(LorakitError, match=r"data.jsonl:7: the prompt's 12 tokens and 9 new"):
        Encoder(tokenizer, (END,), 20).prompt(record("0123456789:"), 9)


@pytest.mark.parametrize(
    ("cut", "span", "prompt", "shorter"),
    [
        ("auto", None, "0123789:", "012389:"),
        ("middle", None, "0123789:", "012389:"),
        ("start", None, "3456789:", "456789:"),
        ("end", None, "01234567", "0123456"),
        ("auto", [2, 8], "0123489:", "012389:"),
        ("end", [2, 8], "01234567", "0123456"),
        ("auto", [8, 2], "0123789:", "012389:"),
        ("auto", "a title", "0123789:", "012389:"),
    ],
    ids=["none", "middle", "start", "end", "document", "end all the same", "odd", "another's"],
)
def test_truncating_keeps_the_completion_and_what_is_no_document(
    tokenizer: Any, cut: str, span: object, prompt: str, shorter: str
) -> None:
    fields = {"prompt": "0123456789:", "completion": " abcdefghi", "document": span}
    long = Record(fields, "data.jsonl:7")
    encoder = Encoder(tokenizer, (END,), 20, truncate=True, cut=cut)
    example = encoder.example(long)
    assert decode(tokenizer, example.ids) == f"<s>{prompt} abcdefghi</s>"
    assert (example.cut, len(example.ids)) == (3, 20)
    alone = encoder.prompt(long, 12)
    assert (decode(tokenizer, alone.ids), alone.cut) == (f"<s>{shorter}", 4)


@pytest.mark.parametrize(
    ("over", "prompt"), [(1, "012456789:"), (2, "01456789:"), (3, "0145789:"), (5, "01489:")]
)
def test_what_surrounds_a_document_is_cut_only_where_that_does_not_do(
    tokenizer: Any, over: int, prompt: str
) -> None:
    short = Record({"prompt": "0123456789:", "completion": "a", "document": [2, 4]}, "d:1")
    length = len(Encoder(tokenizer, (END,), 99).example(short).ids) - over
    example = Encoder(tokenizer, (END,), length, truncate=True).example(short)
    assert decode(tokenizer, example.ids) == f"<s>{prompt}a</s>"
    assert example.cut == over
    with pytest.raises(LorakitError, match=r"^d:1: .*nothing left to cut"):
        Encoder(tokenizer, (END,), 2, truncate=True).example(short)


@pytest.mark.parametrize("form", ["messages", "prompt"])
def test_of_a_conversation_the_longest_user_turn_is_cut(chatty: Any, form: str) -> None:
    turns = [
        {"role": "system", "content": "0123456789"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "What?"},
        {"role": "user", "content": "abcdefgh"},
    ]
    answer = [{"role": "assistant", "content": "Yes."}]
    fields = {"prompt": turns, "completion": answer}
    talk = Record({"messages": turns + answer} if form == "messages" else fields, "d:1")
    whole = Encoder(chatty, (END,), 999, Chat(chatty)).example(talk)
    encoder = Encoder(chatty, (END,), len(whole.ids) - 4, Chat(chatty), truncate=True)
    expected = decode(chatty, whole.ids).replace("abcdefgh", "abgh")
    assert decode(chatty, encoder.example(talk).ids) == expected
    assert decode(chatty, whole.ids[whole.start :]) == "Yes.</s>"


def test_a_conversation_without_a_template_is_refused(tokenizer: Any) -> None:
    talk = Record({"messages": [{"role": "user", "content": "Hi"}]}, "d:1")
    with pytest.raises(LorakitError, match=r"^d:1: a conversation needs a chat template"):
        Encoder(tokenizer, (END,), 99).prompt(talk, 9)


def test_a_completion_that_is_too_long_cannot_be_helped_by_truncating(tokenizer: Any) -> None:
    with pytest.raises(LorakitError, match="nothing left to cut"):
        Encoder(tokenizer, (END,), 8, truncate=True).example(record("0123456789:", " abcdefghi"))


def test_the_tally_reports_the_share_that_was_cut(tokenizer: Any) -> None:
    tally = CutTally()
    encoder = Encoder(tokenizer, (END,), 20, truncate=True)
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
    encoder = Encoder(chatty, (END,), 99, Chat(chatty))
    example = encoder.example(record("Say a:", " b"))
    prompt = f"{CHAT_DATE}<user>Say a:</s>\n<assistant>"
    assert decode(chatty, example.ids) == f"{prompt}b</s>"
    assert decode(chatty, example.ids[: example.start]) == prompt
    assert decode(chatty, encoder.prompt(record("Say a:"), 4).ids) == prompt


def test_truncating_a_chat_cuts_the_users_words_and_no_marks(chatty: Any) -> None:
    whole = Encoder(chatty, (END,), 99, Chat(chatty)).example(record("0123456789:", " b"))
    cut = Encoder(chatty, (END,), len(whole.ids) - 4, Chat(chatty), truncate=True)
    example = cut.example(record("0123456789:", " b"))
    assert decode(chatty, example.ids) == f"{CHAT_DATE}<user>012389:</s>\n<assistant>b</s>"
    assert example.cut == 4


def test_a_template_that_rewrites_the_prompt_is_refused(chatty: Any) -> None:
    chatty.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(LorakitError, match=r"data.jsonl:7: .*--chat off"):
        Encoder(chatty, (END,), 99, Chat(chatty)).example(record("a", "b"))


SHOTS = [record("What a?", " b"), record("What c?", " d")]


def test_examples_come_before_the_prompt_as_texts_with_a_blank_line_between(
    tokenizer: Any,
) -> None:
    example = Encoder(tokenizer, (END,), 99).prompt(record("What e?"), 0, SHOTS)
    assert decode(tokenizer, example.ids) == "<s>What a? b\n\nWhat c? d\n\nWhat e?"


def test_examples_are_earlier_turns_under_a_chat_template(tokenizer: Any, chatty: Any) -> None:
    encoder = Encoder(chatty, (END,), 999, Chat(chatty, "s"))
    text = decode(tokenizer, encoder.prompt(record("What e?"), 0, SHOTS[:1]).ids)
    turns = "<system>s</s>\n<user>What a?</s>\n<assistant>b</s>\n<user>What e?</s>\n"
    assert text.endswith(f"{turns}<assistant>")


@pytest.mark.parametrize("chat", [False, True])
def test_only_the_records_own_document_is_cut(tokenizer: Any, chatty: Any, chat: bool) -> None:
    own = record("Sum up: " + "x" * 50 + " now")
    fields = {**own.fields, "document": [8, 58]}
    kind = Chat(chatty) if chat else None
    encoder = Encoder(chatty, (END,), 999, kind)
    length = len(encoder.prompt(Record(fields, "w"), 0, SHOTS).ids)
    cutting = Encoder(chatty, (END,), length - 40, kind, truncate=True)
    example = cutting.prompt(Record(fields, "w"), 0, SHOTS)
    whole = decode(tokenizer, encoder.prompt(Record(fields, "w"), 0, SHOTS).ids)
    assert decode(tokenizer, example.ids) == whole.replace("x" * 50, "x" * 10)
    tiny = Encoder(chatty, (END,), 20, kind, truncate=True)
    with pytest.raises(LorakitError, match="; show fewer --shots, there is nothing left to cut"):
        tiny.prompt(Record(fields, "w"), 0, SHOTS)

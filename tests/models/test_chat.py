"""Conversations under templates that behave as published ones do."""

from __future__ import annotations

import pytest

from lorakit.adapters.history import Header
from lorakit.errors import LorakitError
from lorakit.models.chat import CHAT_DATE, Chat, Tokenizer, following, reasons
from lorakit.models.tokens import Encoder
from lorakit.records.completions import split_reasoning
from lorakit.records.record import Record, Turn
from lorakit.settings import GenerationSettings, TrainingSettings
from tests.support.chat_templates import TEMPLATES
from tests.support.models import byte_tokenizer

ASKED = (Turn("user", "Capital of France?"),)
REASONING = ("qwen3", "deepseek-r1")
END = 2


def tokenizer_of(family: str) -> Tokenizer:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[family]
    return tokenizer


@pytest.fixture(params=TEMPLATES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_what_is_learnt_begins_with_the_answer(family: str) -> None:
    rendered = Chat(tokenizer_of(family)).answered(ASKED, " Paris", "d:1")
    learnt = rendered.text.removeprefix(rendered.prompt)
    assert learnt.lstrip(" ").startswith("Paris")
    assert (learnt != learnt.lstrip(" ")) == (family == "mistral")
    assert rendered.text == rendered.prompt + learnt


def test_answers_are_learnt_after_the_prompt_that_generation_gets(family: str) -> None:
    chat = Chat(tokenizer_of(family))
    assert chat.answered(ASKED, "Paris", "d:1").prompt == chat.prompt(ASKED, "d:1")


def test_the_outer_white_space_of_an_answer_is_not_learnt(family: str) -> None:
    chat = Chat(tokenizer_of(family))
    assert chat.answered(ASKED, " \n Paris \n", "d:1") == chat.answered(ASKED, "Paris", "d:1")


@pytest.mark.parametrize("answer", ["m", "assistant", "<", "end", "You are SmolLM."])
def test_an_answer_is_found_that_the_templates_marks_hold_too(family: str, answer: str) -> None:
    rendered = Chat(tokenizer_of(family)).answered(ASKED, answer, "d:1")
    assert rendered.text.removeprefix(rendered.prompt).lstrip(" ").startswith(answer)


@pytest.mark.parametrize("family", REASONING)
def test_an_empty_block_of_reasoning_belongs_to_the_prompt(family: str) -> None:
    chat = Chat(tokenizer_of(family))
    assert chat.prompt(ASKED, "d:1").endswith("<think>\n\n</think>\n\n")
    rendered = chat.answered(ASKED, "Paris", "d:1")
    assert "think" not in rendered.text.removeprefix(rendered.prompt)


@pytest.mark.parametrize(
    ("family", "end"), [("qwen3", "assistant\n"), ("deepseek-r1", "<think>\n")]
)
def test_a_model_that_is_told_to_think_gets_the_templates_own_prompt(family: str, end: str) -> None:
    chat = Chat(tokenizer_of(family), arguments={"enable_thinking": True})
    assert chat.prompt(ASKED, "d:1").endswith(end)


def test_reasoning_that_the_data_hold_is_learnt_where_the_template_keeps_it() -> None:
    answer = "<think>\nIt is on the Seine.\n</think>\n\nParis"
    kept = Chat(tokenizer_of("qwen3")).answered(ASKED, answer, "d:1")
    assert kept.text.removeprefix(kept.prompt) == f"{answer}<|im_end|>\n"
    left_out = Chat(tokenizer_of("deepseek-r1")).answered(ASKED, answer, "d:1")
    assert left_out.text.removeprefix(left_out.prompt) == "\n\nParis<|end|>"


def test_all_turns_are_written_and_the_last_answer_alone_is_learnt(family: str) -> None:
    turns = (*ASKED, Turn("assistant", "Paris"), Turn("user", "And of Spain?"))
    rendered = Chat(tokenizer_of(family)).answered(turns, "Madrid", "d:1")
    for turn in turns:
        assert turn.content in rendered.prompt
    assert "Paris" not in rendered.text.removeprefix(rendered.prompt)


@pytest.mark.parametrize("family", ["qwen3", "llama-3.1", "gemma-3", "phi-4", "smollm2"])
def test_a_system_turn_is_given_to_conversations_without_one(family: str) -> None:
    chat = Chat(tokenizer_of(family), system="Be brief.")
    assert "Be brief." in chat.prompt(ASKED, "d:1")
    own = chat.prompt((Turn("system", "Be verbose."), *ASKED), "d:1")
    assert "Be verbose." in own
    assert "Be brief." not in own


def test_a_template_that_refuses_a_turn_is_named_with_its_reason() -> None:
    chat = Chat(tokenizer_of("gemma-2"), system="Be brief.")
    with pytest.raises(LorakitError, match=r"^d:1: .*System role not supported"):
        chat.prompt(ASKED, "d:1")


def test_arguments_reach_the_template() -> None:
    off = Chat(tokenizer_of("qwen3"), arguments={"enable_thinking": False})
    assert off.prompt(ASKED, "d:1") == Chat(tokenizer_of("qwen3")).prompt(ASKED, "d:1")
    assert "<think>" in off._render(ASKED, None, "d:1")


def test_the_date_is_the_same_on_every_day() -> None:
    assert f"{CHAT_DATE:%d %b %Y}" in Chat(tokenizer_of("llama-3.1")).prompt(ASKED, "d:1")


def test_the_templates_that_reason_are_told_from_the_others() -> None:
    assert {family for family in TEMPLATES if reasons(tokenizer_of(family))} == {*REASONING}


def test_the_first_end_token_that_the_template_writes_ends_what_is_learnt() -> None:
    tokenizer = tokenizer_of("phi-4")
    tokenizer.chat_template = TEMPLATES["phi-4"].replace("<|im_end|>", "\x07\n")
    bell = tokenizer("\x07", add_special_tokens=False)["input_ids"][0]
    encoder = Encoder(tokenizer, (END, bell), 999, Chat(tokenizer))
    example = encoder.example(Record({"prompt": "Hi", "completion": "Yo"}, "d:1"))
    assert example.ids[-1] == bell
    assert tokenizer.decode(list(example.ids[example.start : -1])) == "Yo"


@pytest.mark.parametrize(
    ("text", "opened", "answer", "reasoning"),
    [
        (" Paris ", False, "Paris", None),
        ("<think>\n\n</think>\n\nParis", False, "Paris", ""),
        ("<think>Hm.</think>Paris", False, "Paris", "Hm."),
        ("Hm.\n</think>\n\nParis", True, "Paris", "Hm."),
        ("<think>Hm, I am not d", False, "", "Hm, I am not d"),
        ("Hm, I am not d", True, "", "Hm, I am not d"),
        ("The mark <think> begins it.", False, "The mark <think> begins it.", None),
    ],
    ids=["none", "empty", "some", "opened before", "cut off", "opened and cut off", "quoted"],
)
def test_reasoning_is_split_from_the_answer(
    text: str, opened: bool, answer: str, reasoning: str | None
) -> None:
    assert split_reasoning(text, opened=opened) == (answer, reasoning)


def test_what_is_not_asked_for_is_as_the_adapters_were_trained() -> None:
    header: Header = {"chat": "on", "system": "Be brief.", "chat_args": {"enable_thinking": False}}
    settings = following(GenerationSettings(), [header])
    assert (settings.chat, settings.system) == ("on", "Be brief.")
    assert settings.chat_args == (("enable_thinking", False),)
    asked = following(GenerationSettings(chat="off", system="x", chat_args=(("a", 1),)), [header])
    assert (asked.chat, asked.system, asked.chat_args) == ("off", "x", (("a", 1),))


@pytest.mark.parametrize(
    ("other", "option"),
    [({"chat": "on", "system": "y"}, "--system"), ({"chat": "off", "system": "x"}, "--chat on")],
    ids=["system", "chat"],
)
def test_adapters_that_do_not_agree_are_refused(other: Header, option: str) -> None:
    with pytest.raises(LorakitError, match=option):
        following(TrainingSettings(), [{"chat": "on", "system": "x"}, other])

"""What of a model's text is the answer, and where it ends."""

from __future__ import annotations

import pytest

from lorakit.records.completions import (
    Completion,
    completion_in,
    stopped,
    until_stop,
    with_completions,
)
from lorakit.records.record import Record


@pytest.mark.parametrize(
    ("text", "stop", "before"),
    [
        pytest.param("abc", (), "abc", id="no stop text"),
        pytest.param("abc", ("x",), "abc", id="none there"),
        pytest.param("a. b. c", (".",), "a", id="the first occurrence"),
        pytest.param("a; b. c", (".", ";"), "a", id="the first of several texts"),
        pytest.param("abc", ("abc", "b"), "a", id="the one that is complete first"),
        pytest.param("xaab", ("b", "aab"), "x", id="the longest of those complete at once"),
        pytest.param("\nabc", ("\n",), "", id="at once"),
    ],
)
def test_a_text_ends_before_the_stop_text_that_is_complete_first(
    text: str, stop: tuple[str, ...], before: str
) -> None:
    assert until_stop(text, stop) == before
    letter_by_letter = next(
        (text[:n] for n in range(len(text) + 1) if stopped(text[:n], stop=stop)), text
    )
    assert until_stop(letter_by_letter, stop) == before


@pytest.mark.parametrize(
    ("text", "options", "completion"),
    [
        pytest.param(" a\nb ", {}, Completion("a"), id="plain"),
        pytest.param("<think>a\n</think>b\nc", {}, Completion("<think>a"), id="no marks known"),
        pytest.param(
            "<think>a\n</think>\n\nb\nc", {"reasons": True}, Completion("b", "a"), id="reasoning"
        ),
        pytest.param("a\n", {"reasons": True, "opened": True}, Completion("", "a"), id="opened"),
        pytest.param("a\nb", {"reasons": True}, Completion("a"), id="no reasoning"),
    ],
)
def test_stop_texts_end_the_answer_and_not_the_reasoning(
    text: str, options: dict[str, bool], completion: Completion
) -> None:
    assert completion_in(text, stop=["\n"], **options) == completion


def test_several_completions_are_lists_of_which_the_first_stands_alone_too() -> None:
    record = Record({"prompt": "p"}, "x:1")
    (alone, several, reasoned) = (
        with_completions(record, completions).fields
        for completions in (
            [Completion("a")],
            [Completion("a"), Completion("b")],
            [Completion("a"), Completion("b", "r")],
        )
    )
    assert alone == {"prompt": "p", "prediction": "a"}
    assert several == {**alone, "predictions": ["a", "b"]}
    assert reasoned == {**several, "reasonings": [None, "r"]}

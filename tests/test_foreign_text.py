"""Foreign text: made safe for a terminal."""

from __future__ import annotations

import pytest

from lorakit.foreign_text import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("plain, 猫, é", "plain, 猫, é"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("title\x1b]0;x\x07", "title\\x1b]0;x\\x07"),
        ("a\u202eb", "a\\u202eb"),
        ("half \ud83d", "half \\ud83d"),
        ("\x9b31m", "\\x9b31m"),
    ],
)
def test_what_could_steer_a_terminal_is_escaped(text: str, printed: str) -> None:
    assert printable(text) == printable_lines(text) == printed
    assert printed.isprintable()


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("a\nb", "a\nb"),
        ("a\r\nb", "a\nb"),
        ("a\rb", "a\\rb"),
        ("a\x0bb", "a\\x0bb"),
        ("\tb", "    b"),
        ("猫\u3000犬", "猫\u3000犬"),
    ],
)
def test_line_breaks_and_wide_spaces_of_a_text_stay(text: str, printed: str) -> None:
    assert printable_lines(text) == printed

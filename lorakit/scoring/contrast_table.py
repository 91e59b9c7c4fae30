"""Show contrasts on a terminal: the two predictions side by side, the words that differ marked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, TYPE_CHECKING

from lorakit.foreign_text import printable_lines
from lorakit.scoring.contrast import Contrast
from lorakit.scoring.differing_words import Passage, mark_differing_words

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_LONGEST_PROMPT = 400  # characters; --html and JSON lines have all of them
_MARK_A, _MARK_B = "bold underline red", "bold underline green"


def write_contrast_table(
    contrasts: Sequence[Contrast], stream: IO[str], *, names: tuple[str, str], lang: str = "en"
) -> None:
    """Write the contrasts, two columns each, as wide as the terminal.

    A long prompt is cut in its middle. Whatever could steer the terminal is escaped.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(file=stream, highlight=False)
    for contrast in contrasts:
        scores = f"{contrast.score_a:.2f} → {contrast.score_b:.2f} ({contrast.difference:+.2f})"
        console.print(Text(f"{printable_lines(contrast.id)}  {scores}", style="bold"))
        if contrast.prompt is not None:
            console.print(Text(printable_lines(_shortened(contrast.prompt)), style="dim"))
        for reference in contrast.references:
            console.print(Text(f"reference: {printable_lines(reference)}"))
        console.print(_side_by_side(contrast, names, lang))
        console.print()


def _shortened(text: str) -> str:
    if len(text) <= _LONGEST_PROMPT:
        return text
    return f"{text[: _LONGEST_PROMPT // 2]} … {text[-_LONGEST_PROMPT // 2 :]}"


def _side_by_side(contrast: Contrast, names: tuple[str, str], lang: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    ours, theirs = mark_differing_words(contrast.prediction_a, contrast.prediction_b, lang=lang)
    table = Table(expand=True, box=None, pad_edge=False, header_style="bold")
    for letter, name in zip("AB", names, strict=True):
        header = Text(f"{letter}: {printable_lines(name)}", overflow="fold")
        table.add_column(header, ratio=1, overflow="fold")
    table.add_row(_marked(ours, _MARK_A), _marked(theirs, _MARK_B))
    return table


def _marked(passages: Sequence[Passage], style: str) -> Text:
    from rich.text import Text

    text = Text()
    for passage in passages:
        text.append(printable_lines(passage.text), style=style if passage.differs else "")
    return text

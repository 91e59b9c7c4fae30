"""Scoring files of records: from the path of a JSONL file to its scores, and a table of several.

What a metric is stands in metrics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO, Any

from lorakit.answers import final_number
from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.metrics import METRICS, Score, score
from lorakit.records import Record, read_records
from lorakit.segmentation import LANGUAGES, script_of

_ENOUGH_TO_JUDGE = 1000
_WIDER_THAN_ANY_ROW = 10_000


@dataclass(frozen=True)
class FileScores:
    """The scores of one file, and what the user should know before believing them."""

    file: str
    lang: str
    count: int
    scores: tuple[Score, ...]
    cautions: tuple[str, ...]

    def as_record(self) -> dict[str, Any]:
        """Return one flat record: the metrics' full values by name, signatures in one object."""
        return {
            "file": self.file,
            "count": self.count,
            "lang": self.lang,
            **{one.name: one.value for one in self.scores},
            "signatures": {one.name: one.signature for one in self.scores},
        }


def score_file(path: str, *, metrics: Sequence[str], lang: str = "en") -> FileScores:
    """Return the scores of a JSONL file of predictions (`-`: stdin) under each metric.

    Only predictions and references are held in memory. Raises LorakitError naming file and line.
    """
    predictions, references = _load_pairs(path)
    scores = tuple(score(predictions, references, metric=name, lang=lang) for name in metrics)
    cautions = tuple(find_cautions(references, metrics=metrics, lang=lang))
    return FileScores(path, lang, len(predictions), scores, cautions)


def _load_pairs(path: str) -> tuple[list[str], list[list[str]]]:
    predictions, references = [], []
    for record in read_records(path, "prediction"):
        predictions.append(record.prediction)
        references.append(references_of(record))
    if not predictions:
        name = "stdin" if path == STDIO else path
        raise LorakitError(f"{name} holds no records; check what wrote it")
    return predictions, references


def references_of(record: Record) -> list[str]:
    """Return what a prediction is compared with; LorakitError where the record has nothing."""
    if record.fields.get("references") is None and "completion" not in record.fields:
        raise LorakitError(
            f"{record.where}: the record has neither 'references' nor 'completion'; "
            "give the texts to compare the prediction with"
        )
    return record.references


def find_cautions(
    references: Sequence[Sequence[str]], *, metrics: Sequence[str], lang: str
) -> list[str]:
    """Return a line for each way in which a metric cannot work on such references."""
    texts = [text for listed in references[:_ENOUGH_TO_JUDGE] for text in listed]
    script = script_of(texts)
    found = []
    blind = [name for name in metrics if METRICS[name].reads in ("words", "ascii")]
    if blind and _needs_other_language(script, lang):
        found.append(
            f"the references are mostly {LANGUAGES[script].name}, whose words --lang {lang} does "
            f"not find ({', '.join(blind)}); use --lang {script}"
        )
    dropped = [name for name in metrics if METRICS[name].reads == "ascii"]
    if dropped and script == "other" and LANGUAGES[lang].spaced:
        found.append(
            f"the references are mostly not in ASCII letters, the only ones {', '.join(dropped)} "
            "counts; use --metric chrf"
        )
    numeric = [name for name in metrics if METRICS[name].reads == "numbers"]
    if numeric and 2 * sum(final_number(text) is None for text in texts) > len(texts):
        found.append(
            f"most references hold no number, which {', '.join(numeric)} compares; "
            "choose another --metric"
        )
    return found


def _needs_other_language(script: str, lang: str) -> bool:
    """Say whether words are not found: no spaces between them, or kana among Chinese characters."""
    if script not in LANGUAGES or script == lang:
        return False
    return LANGUAGES[lang].spaced or script == "ja"


def write_table(systems: Sequence[FileScores], stream: IO[str]) -> None:
    """Write a row per file and a column per metric, two decimals, the best of several in bold.

    The signatures stand below, each once. No line is folded or cut: a narrow terminal wraps it.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(file=stream, width=_WIDER_THAN_ANY_ROW)
    table = Table("file", box=None, pad_edge=False, header_style="bold")
    table.add_column("count", justify="right")
    for one in systems[0].scores:
        table.add_column(one.name, justify="right", no_wrap=True)
    for system in systems:
        cells = [
            Text(f"{one.value:.2f}", style="bold" if one.value == best else "")
            for one, best in zip(system.scores, _best_values(systems), strict=True)
        ]
        table.add_row(Text(system.file), str(system.count), *cells)
    console.print(table)
    signatures = (f"{one.name}: {one.signature}" for s in systems for one in s.scores)
    for line in dict.fromkeys(signatures):
        console.print(Text(line, style="dim"), soft_wrap=True)


def _best_values(systems: Sequence[FileScores]) -> list[float | None]:
    if len(systems) == 1:
        return [None] * len(systems[0].scores)
    columns = zip(*(system.scores for system in systems), strict=True)
    return [
        (max if METRICS[column[0].name].higher_is_better else min)(one.value for one in column)
        for column in columns
    ]

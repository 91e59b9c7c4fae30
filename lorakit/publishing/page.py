"""The page of a repository on the hub: whether its metadata is valid, and scores on it.

Metadata is read and written by huggingface_hub's own classes, so that what it takes is what the hub
is sent. Scores are lines of JSON as `lorakit score` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from lorakit.adapters.card import RELATIONS, TAG
from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.foreign_text import printable
from lorakit.records.jsonl import read_objects

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

    from lorakit.records.record import Record

TITLE = "## Scores"
_TASK = "text-generation"
_METADATA = re.compile(r"\A---\r?\n.*?^---\s*$", re.MULTILINE | re.DOTALL)
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?", re.ASCII)
_SECTION = re.compile(rf"^{TITLE}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Score:
    """A metric's value on one set of predictions; `interval` is its 95 % interval, if known."""

    metric: str
    value: float
    signature: str
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class ScoredSet:
    """The scores of one line of `score`: of a file's or a system's predictions, or a group of them.

    `is_baseline` says that another line is compared with it: it is not the model's own.
    """

    name: str
    group: str | None
    count: int
    scores: tuple[Score, ...]
    is_baseline: bool = False


def has_metadata(page: str) -> bool:
    """Return whether a page begins with metadata, between two lines `---`."""
    return _METADATA.match(page) is not None


def check_page(page: str, where: str) -> None:
    """Raise LorakitError for metadata that huggingface_hub cannot read or the hub refuses.

    The hub's own check, which takes a request, is upload.py's.
    """
    if not has_metadata(page):
        return
    data = _parse(page, where).data
    bases = data.get("base_model", [])
    for name in bases if isinstance(bases, list) else [bases]:
        if not (isinstance(name, str) and _HUB_ID.fullmatch(name)):
            raise LorakitError(
                f"{where}: its base_model, {name!r}, is no model of the hub, which refuses such a "
                "page; write owner/name, or take the line out"
            )
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise LorakitError(
            f"{where}: its base_model_relation is {relation!r}; write one of {', '.join(RELATIONS)}"
        )


def with_scores(page: str | None, name: str, scores: str) -> str:
    """Return a page with the scores in a file: in its metadata, and as a table in its text.

    In the metadata they replace the model-index, in which the model is called `name`; lines that
    others are compared with stay out of it. The text of a page that lorakit did not write is left
    alone. Raises LorakitError for a file of anything but scores.
    """
    sets = load_scores(scores)
    card = _parse(page or "", "README.md")
    card.data["model_name"] = name
    card.data["eval_results"] = list(_results(sets))
    if page is None or TAG in card.data.get("tags", []):
        card.text = _with_section(card.text, _section(sets))
    return str(card)


def load_scores(path: str) -> list[ScoredSet]:
    """Return the scores in a file of `lorakit score`'s JSON lines (`-`: stdin)."""
    records = list(read_objects(path))
    if not records:
        raise LorakitError(f"{path} holds no scores; write it by lorakit score -o {path}")
    significances = (_mapping(record.fields.get("significance")) for record in records)
    baselines = {str(found["baseline"]) for found in significances if "baseline" in found}
    return [_scored_set(record, baselines) for record in records]


def _scored_set(record: Record, baselines: set[str]) -> ScoredSet:
    """Return what a line of `score` says; its files are named without their folders."""
    fields = record.fields
    signatures = _mapping(fields.get("signatures"))
    label, count = fields.get("system", fields.get("file")), fields.get("count")
    values = {metric: fields.get(metric) for metric in signatures}
    numbers = all(isinstance(value, int | float) for value in values.values())
    if not values or not numbers or not isinstance(label, str) or not isinstance(count, int):
        raise LorakitError(f"{record.where} is no line of lorakit score; give --scores its output")
    intervals = _mapping(_mapping(fields.get("significance")).get("intervals"))
    group = _mapping(fields.get("group"))
    return ScoredSet(
        label if "system" in fields else _named(label),
        ", ".join(f"{name}: {value}" for name, value in group.items()) or None,
        count,
        tuple(
            Score(metric, float(value), str(signatures[metric]), _ends(intervals.get(metric)))
            for metric, value in values.items()
            if isinstance(value, int | float)
        ),
        label in baselines,
    )


def _named(file: str) -> str:
    """Return what a file of predictions is called: its name alone, without a suffix."""
    return "predictions" if file == STDIO else PurePath(file).stem


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _ends(value: object) -> tuple[float, float] | None:
    """Return an interval as its two ends; None for anything else."""
    if isinstance(value, list) and len(value) == 2:
        low, high = value
        if isinstance(low, int | float) and isinstance(high, int | float):
            return float(low), float(high)
    return None


def _results(sets: Sequence[ScoredSet]) -> Iterator[EvalResult]:
    """Yield the model's own scores as the hub's metadata has them.

    The hub joins results by the data's type, so that this is the name, too.
    """
    from huggingface_hub import EvalResult

    for scored in sets:
        for score in () if scored.is_baseline else scored.scores:
            yield EvalResult(
                task_type=_TASK,
                dataset_type=scored.name,
                dataset_name=scored.name,
                dataset_config=scored.group,
                metric_type=score.metric,
                metric_value=score.value,
                metric_args={"signature": score.signature},
            )


def _section(sets: Sequence[ScoredSet]) -> str:
    """Return a section of Markdown: a table, a row for each line of `score`, and signatures."""
    metrics = list(dict.fromkeys(score.metric for scored in sets for score in scored.scores))
    rows = [["", "records", *metrics], ["---", *["---:"] * (len(metrics) + 1)]]
    for scored in sets:
        values = {score.metric: _value(score) for score in scored.scores}
        label = scored.name if scored.group is None else f"{scored.name} ({scored.group})"
        rows.append([label, str(scored.count), *(values.get(metric, "") for metric in metrics)])
    table = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    lines = dict.fromkeys(
        f"- {score.metric}: `{printable(score.signature)}`"
        for scored in sets
        for score in scored.scores
    )
    notes = ["In brackets: 95 % intervals."] if any(map(_has_interval, sets)) else []
    return "\n\n".join([TITLE, "\n".join(table), *notes, "\n".join(lines)]) + "\n"


def _has_interval(scored: ScoredSet) -> bool:
    return any(score.interval is not None for score in scored.scores)


def _value(score: Score) -> str:
    if score.interval is None:
        return f"{score.value:.2f}"
    low, high = score.interval
    return f"{score.value:.2f} [{low:.2f}, {high:.2f}]"


def _cell(text: str) -> str:
    """Return a text that is one cell of a Markdown table."""
    return printable(text).replace("|", "\\|")


def _with_section(text: str, section: str) -> str:
    """Return a page's text with its section of scores replaced, or else at the end."""
    if _SECTION.search(text):
        return _SECTION.sub(lambda _: f"{section}\n", text, count=1).rstrip() + "\n"
    return f"{text.rstrip()}\n\n{section}" if text.strip() else section


def _parse(page: str, where: str) -> ModelCard:
    """Return huggingface_hub's reading of a page; LorakitError for metadata that it cannot read."""
    import yaml
    from huggingface_hub import ModelCard

    content = page if has_metadata(page) else f"---\n{{}}\n---\n{page}"
    try:
        return ModelCard(content)
    except (ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise LorakitError(
            f"{where}: its metadata cannot be read ({printable(reason)}); mend what stands between "
            "the lines ---"
        ) from None

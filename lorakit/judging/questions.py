"""Judging: language models rate predictions, or choose between two systems' predictions.

GPT-Score and the preference are those of the boundary-layer paper (lora-inference-necessity, 6.4
and A.2). It knows questions and answers; who carries them is asking.py, their wording prompts.py.
An answer that is not what was asked for is counted as malformed and left out, never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import LorakitError
from lorakit.files import STDIO
from lorakit.prompts import PREFERENCE_PROMPTS, RATING_PROMPTS, fields_of, fill
from lorakit.records import Record, load_records

Answer = Callable[[str, str], str]  # the answer of a judge to a prompt

_WRAPPING = " \t\r\n\"'“”‘’*_`."  # around an answer, it changes nothing
_RATING = re.compile(r"[0-9]|10")


@dataclass(frozen=True)
class Item:
    """One prediction to judge: a prompt to rate it, or two to choose, the order swapped."""

    id: str
    prompts: tuple[str, ...]


def choose_template(given: str | None, *, preference: bool) -> tuple[str, str]:
    """Return the name and the text of the template `given`: a shipped one's name, or a text.

    Raises LorakitError where it does not hold what is to be judged.
    """
    shipped = PREFERENCE_PROMPTS if preference else RATING_PROMPTS
    name = given or "general"
    if name in shipped:
        return name, shipped[name]
    needed = ("a", "b") if preference else ("prediction",)
    if missing := [field for field in needed if field not in fields_of(name)]:
        raise LorakitError(
            f"--template lacks {{{{{missing[0]}}}}}; write it there, or name one of "
            f"{', '.join(shipped)}"
        )
    return "own", name


def rating_items(path: str, template: str) -> list[Item]:
    """Return an item for every record of a file of predictions."""
    records, _ = load_records(path, "prediction")
    return [Item(one.id, (fill(template, _row(one), one.where),)) for one in records]


def preference_items(path: str, others: Sequence[Record], template: str) -> list[Item]:
    """Return an item for every pair of records; `others` are the baseline's, in the same order.

    The baseline is A in the first prompt and B in the second. Raises LorakitError naming file and
    line where the files do not hold the same records.
    """
    records, _ = load_records(path, "prediction")
    if len(records) != len(others):
        name = "stdin" if path == STDIO else path
        raise LorakitError(
            f"{name} holds {len(records)} records, --against {len(others)}; give two systems' "
            "predictions for the same records"
        )
    return [_pair(*both, template) for both in zip(records, others, strict=True)]


def _pair(record: Record, other: Record, template: str) -> Item:
    for name in ("id", "prompt"):
        if record.fields.get(name) != other.fields.get(name):
            raise LorakitError(
                f"{record.where}: its {name} is not that of {other.where}; give two systems' "
                "predictions for the same records, in the same order"
            )
    texts = (other.prediction, record.prediction)
    rows = ({**_row(record), "a": a, "b": b} for a, b in (texts, texts[::-1]))
    return Item(record.id, tuple(fill(template, row, record.where) for row in rows))


def _row(record: Record) -> Mapping[str, Any]:
    """Return the fields a template may name: the record's, and `reference`, the first it has."""
    known = record.fields.get("references") is not None or "completion" in record.fields
    return {**record.fields, **({"reference": record.references[0]} if known else {})}


def parse_rating(answer: str) -> int | None:
    """Return the integer from 0 to 10 that the answer is, but for quotes, stars and full stops."""
    bare = answer.strip(_WRAPPING)
    return int(bare) if _RATING.fullmatch(bare) else None


def parse_choice(answer: str) -> str | None:
    """Return `A` or `B` where the answer is that, but for quotes, stars and full stops."""
    bare = answer.strip(_WRAPPING)
    return bare if bare in ("A", "B") else None


def rating_summary(
    items: Sequence[Item], judges: Sequence[str], answer: Answer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of a file and a line of ratings for each of its records.

    `gpt_score` is in percent: of a judge ten times the mean of its ratings, of the file the mean
    over judges; null where a judge gave no rating at all.
    """
    rows: list[dict[str, Any]] = []
    for item in items:
        answers = {judge: answer(judge, item.prompts[0]) for judge in judges}
        ratings = {judge: parse_rating(text) for judge, text in answers.items()}
        rows.append({"id": item.id, "ratings": ratings, "answers": answers})
    found = {judge: _rated([row["ratings"][judge] for row in rows]) for judge in judges}
    return {"gpt_score": _mean_over_judges(found, "gpt_score"), "judges": found}, rows


def _rated(ratings: Sequence[int | None]) -> dict[str, Any]:
    given = [rating for rating in ratings if rating is not None]
    score = 10 * sum(given) / len(given) if given else None
    return {"gpt_score": score, "rated": len(given), "malformed": len(ratings) - len(given)}


def preference_summary(
    items: Sequence[Item], judges: Sequence[str], answer: Answer
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the summary of a file against the baseline, and a line for each of its records.

    A record is a win where both orders choose the file's prediction, a loss where both choose the
    baseline's, a tie where the choice goes with the place. `preference` is (wins + ties/2) in
    percent of the three, `first` the share of answers that chose what stood first: 50 is no bias.
    """
    rows = []
    for item in items:
        answers = {judge: [answer(judge, prompt) for prompt in item.prompts] for judge in judges}
        choices = {judge: _outcome(*map(parse_choice, both)) for judge, both in answers.items()}
        rows.append({"id": item.id, "choices": choices, "answers": answers})
    found = {judge: _preferred(judge, rows) for judge in judges}
    return {"preference": _mean_over_judges(found, "preference"), "judges": found}, rows


def _outcome(first: str | None, swapped: str | None) -> str | None:
    if first is None or swapped is None:
        return None
    return "tie" if first == swapped else ("win" if first == "B" else "loss")


def _preferred(judge: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    outcomes = [row["choices"][judge] for row in rows]
    wins, ties, losses = (outcomes.count(name) for name in ("win", "tie", "loss"))
    total = wins + ties + losses
    letters = [parse_choice(text) for row in rows for text in row["answers"][judge]]
    chosen = [letter for letter in letters if letter is not None]
    return {
        "preference": 100 * (wins + ties / 2) / total if total else None,
        "wins": wins,
        "ties": ties,
        "losses": losses,
        "malformed": outcomes.count(None),
        "first": 100 * chosen.count("A") / len(chosen) if chosen else None,
    }


def _mean_over_judges(found: Mapping[str, Mapping[str, Any]], name: str) -> float | None:
    values = [one[name] for one in found.values()]
    return None if None in values else sum(values) / len(values)


def cautions(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a warning for each judge of whose answers some were malformed, with the first such."""
    parsed = "ratings" if "ratings" in rows[0] else "choices"
    for judge, told in summary["judges"].items():
        if told["malformed"]:
            row = next(row for row in rows if row[parsed][judge] is None)
            shown = json.dumps(row["answers"][judge])[:80]
            yield (
                f"Warning: {summary['file']}: {told['malformed']} of {len(rows)} records left out "
                f"for {judge}, whose answers are malformed, such as {shown}"
            )

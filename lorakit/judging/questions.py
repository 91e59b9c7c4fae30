"""What judges are asked about predictions, and what their answers add up to.

They rate predictions (GPT-Score), or choose between two systems' predictions, as in the
boundary-layer paper (6.4 and A.2). This file knows questions and answers;
asking.py asks them, and prompts.py holds their wording. An answer in any other form than asked for
counts as malformed and is left out, never guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, final

from lorakit.errors import LorakitError
from lorakit.files import input_name
from lorakit.prompts import PREFERENCE_PROMPTS, RATING_PROMPTS, fields_of, fill
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record

Answer = Callable[[str, str], str]  # the answer of a judge to a prompt

_WRAPPING = " \t\r\n\"'“”‘’*_`."  # around an answer, these change nothing
_RATING = re.compile(r"[0-9]|10")


@dataclass(frozen=True)
class Item:
    """One prediction to judge: the prompt to rate it, or two to choose, with the order swapped."""

    id: str
    prompts: tuple[str, ...]


class JudgeRatings(TypedDict):
    """One judge's ratings of a file; `gpt_score` in percent, None without any rating."""

    gpt_score: float | None
    rated: int
    malformed: int


class JudgePreferences(TypedDict):
    """One judge's choices in a file; `preference` and `first` in percent, None without any."""

    preference: float | None
    wins: int
    ties: int
    losses: int
    malformed: int
    first: float | None


class RatingSummary(TypedDict):
    """What a file's summary says about its ratings, by judge and over all judges."""

    gpt_score: float | None
    judges: dict[str, JudgeRatings]


class PreferenceSummary(TypedDict):
    """What a file's summary says about its comparison with the baseline."""

    preference: float | None
    judges: dict[str, JudgePreferences]


@final
class RatingRow(TypedDict):
    """One record's ratings by judge, None where the answer is malformed, and the answers."""

    id: str
    ratings: dict[str, int | None]
    answers: dict[str, str]


@final
class PreferenceRow(TypedDict):
    """One record's outcome by judge (`win`, `tie`, `loss`), and the answers in both orders."""

    id: str
    choices: dict[str, str | None]
    answers: dict[str, list[str]]


Summary = RatingSummary | PreferenceSummary
Row = RatingRow | PreferenceRow


def choose_template(template: str | None, *, preference: bool) -> tuple[str, str]:
    """Return the name and the text of a template: a shipped one, by name, or the user's own text.

    None means `general`; the name of a text is `own`. Raises LorakitError for a text without a
    placeholder for what is to be judged.
    """
    shipped = PREFERENCE_PROMPTS if preference else RATING_PROMPTS
    name = template or "general"
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
    return [Item(record.id, (fill(template, _row(record), record.where),)) for record in records]


def preference_items(path: str, baseline: Sequence[Record], template: str) -> list[Item]:
    """Return an item for every record and the baseline's record in the same place.

    The baseline is A in the first prompt and B in the second. Raises LorakitError naming file and
    line where the files do not hold the same records.
    """
    return [_pair(record, other, template) for record, other in paired_records(path, baseline)]


def paired_records(path: str, baseline: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Return every record of a file with the baseline's record in the same place.

    Raises LorakitError naming file and line where the two do not hold the same records.
    """
    records, _ = load_records(path, "prediction")
    if len(records) != len(baseline):
        raise LorakitError(
            f"{input_name(path)} holds {len(records)} records, --against {len(baseline)}; "
            "give two systems' predictions for the same records"
        )
    pairs = list(zip(records, baseline, strict=True))
    for record, other in pairs:
        _check_same(record, other)
    return pairs


def _check_same(record: Record, other: Record) -> None:
    """Raise LorakitError if the ids or the prompts of two records differ."""
    for name in ("id", "prompt"):
        if record.fields.get(name) != other.fields.get(name):
            raise LorakitError(
                f"{record.where}: its {name} is not that of {other.where}; give two systems' "
                "predictions for the same records, in the same order"
            )


def _pair(record: Record, other: Record, template: str) -> Item:
    texts = (other.prediction, record.prediction)
    rows = ({**_row(record), "a": a, "b": b} for a, b in (texts, texts[::-1]))
    return Item(record.id, tuple(fill(template, row, record.where) for row in rows))


def _row(record: Record) -> Mapping[str, object]:
    """Return the fields a template may name: the record's, and `reference`, the first it has."""
    reference = reference_of(record)
    return record.fields if reference is None else {**record.fields, "reference": reference}


def reference_of(record: Record) -> str | None:
    """Return the first of the texts a prediction is compared with; None where there are none."""
    return record.references[0] if record.has_references else None


def parse_rating(answer: str) -> int | None:
    """Return the integer from 0 to 10 that is the answer, but for quotes, stars and full stops."""
    bare = answer.strip(_WRAPPING)
    return int(bare) if _RATING.fullmatch(bare) else None


def parse_choice(answer: str) -> str | None:
    """Return the `A` or `B` that is the answer, but for quotes, stars and full stops."""
    bare = answer.strip(_WRAPPING)
    return bare if bare in ("A", "B") else None


def rating_summary(
    items: Sequence[Item], judges: Sequence[str], answer: Answer
) -> tuple[RatingSummary, list[RatingRow]]:
    """Return the summary of a file and a line of ratings for each of its records.

    `gpt_score` is in percent: of a judge ten times the mean of its ratings, of the file the mean
    over judges; null where a judge gave no rating at all.
    """
    rows: list[RatingRow] = []
    for item in items:
        answers = {judge: answer(judge, item.prompts[0]) for judge in judges}
        ratings = {judge: parse_rating(text) for judge, text in answers.items()}
        rows.append({"id": item.id, "ratings": ratings, "answers": answers})
    by_judge = {judge: _ratings_of([row["ratings"][judge] for row in rows]) for judge in judges}
    mean = _mean([judged["gpt_score"] for judged in by_judge.values()])
    return {"gpt_score": mean, "judges": by_judge}, rows


def _ratings_of(ratings: Sequence[int | None]) -> JudgeRatings:
    """Return a judge's share of the summary."""
    valid = [rating for rating in ratings if rating is not None]
    score = 10 * sum(valid) / len(valid) if valid else None
    return {"gpt_score": score, "rated": len(valid), "malformed": len(ratings) - len(valid)}


def preference_summary(
    items: Sequence[Item], judges: Sequence[str], answer: Answer
) -> tuple[PreferenceSummary, list[PreferenceRow]]:
    """Return the summary of a file against the baseline, and a line for each of its records.

    A record is a win where both orders choose the file's prediction, a loss where both choose the
    baseline's, a tie where the choice follows the position. `preference` is (wins + ties/2) in
    percent of the three, `first` the share of answers that chose what stood first: 50 is no bias.
    """
    rows: list[PreferenceRow] = []
    for item in items:
        answers = {judge: [answer(judge, prompt) for prompt in item.prompts] for judge in judges}
        choices = {judge: _outcome(*map(parse_choice, both)) for judge, both in answers.items()}
        rows.append({"id": item.id, "choices": choices, "answers": answers})
    by_judge = {judge: _preferences_of(judge, rows) for judge in judges}
    mean = _mean([judged["preference"] for judged in by_judge.values()])
    return {"preference": mean, "judges": by_judge}, rows


def _outcome(first: str | None, swapped: str | None) -> str | None:
    """Return what the choices in both orders mean for the file, which is B in the first."""
    if first is None or swapped is None:
        return None
    return "tie" if first == swapped else ("win" if first == "B" else "loss")


def _preferences_of(judge: str, rows: Sequence[PreferenceRow]) -> JudgePreferences:
    """Return a judge's share of the summary."""
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


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean over judges; None where one of them has no value."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def malformed_warnings(path: str, summary: Summary, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a warning for each judge with malformed answers, quoting the first of them."""
    for judge, numbers in summary["judges"].items():
        if numbers["malformed"]:
            row = next(row for row in rows if _parsed(row)[judge] is None)
            quoted = json.dumps(row["answers"][judge])[:80]
            yield (
                f"Warning: {path}: {numbers['malformed']} of {len(rows)} records left out "
                f"for {judge}, whose answers are malformed, such as {quoted}"
            )


def _parsed(row: Row) -> Mapping[str, int | str | None]:
    """Return each judge's parsed answer to a record."""
    return row["ratings"] if "ratings" in row else row["choices"]

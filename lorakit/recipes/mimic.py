"""MIMIC-III: findings and impressions of radiology reports (Johnson et al., 2016).

Sections are cut out of raw reports at their headings, following RadAdapt (Van Veen et al., 2023)
and Appendix A.3 of the adaptive-merge paper. De-identification marks such as `[**Hospital 12**]`
stay. The paper removes findings "shorter than or comparable in length to" the impression and gives
no number; the bound of 1.5 words of findings to one of the impression is ours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import zip_longest

from lorakit.errors import LorakitError
from lorakit.recipes.filters import count_words
from lorakit.recipes.readers.rows import converted, id_of
from lorakit.recipes.readers.sources import Part, parts
from lorakit.recipes.readers.tables import table_in
from lorakit.recipes.request import Request, Tally, UnwantedError
from lorakit.records.record import Record

MIN_RATIO = 1.5
_FILES = ("NOTEEVENTS*.csv", "radiology*.csv", "*.csv", "*.tsv", "*.txt")

# Names of sections. With a colon, a heading stands at a line's beginning in any case, or anywhere
# in capitals (some reports are one line); without one it is a line of its own. "CT CHEST FINDINGS:"
# is a heading as well; "LUNGS:", within the findings, is not.
_FINDINGS = "FINDINGS?"
_IMPRESSION = (
    "IMPRESSIONS?(?: AND (?:PLAN|RECOMMENDATIONS?))?|CONCLUSIONS?|INTERPRETATION|OPINION|"
    "SUMMARY(?: OF FINDINGS)?"
)
_OTHER = (
    "FINDINGS? ?(?:/|AND|&) ?IMPRESSIONS?|IMPRESSIONS? ?(?:/|AND|&) ?FINDINGS?|COMPARISONS?|"
    "TECHNIQUES?|PROCEDURES?|CLINICAL [A-Z ]{3,30}|(?:MEDICAL )?HISTORY|"
    "INDICATIONS?(?: FOR [A-Z ]{3,30})?|EXAM(?:INATION)?|STUDY|REASON FOR [A-Z ]{3,40}|"
    r"RECOMMENDATIONS?(?:\(S\))?|NOTIFICATION|ADDENDUM|WET READ|PRELIMINARY REPORT|FINAL REPORT|"
    r"UNDERLYING MEDICAL CONDITION|PROVISIONAL FINDINGS IMPRESSION(?: \(PFI\))?|DICTATED BY|"
    "ATTENDING(?: RADIOLOGIST)?|RADIOLOGISTS?|(?:ELECTRONICALLY )?SIGNED(?: BY)?|MEDICATIONS?|"
    "ANESTHESIA|COMPLICATIONS?"
)
_QUALIFIED = r"(?:[A-Z0-9][\w/,&()\-]* (?:(?:of|the|and|with) ){0,2}){0,8}"
_RULE = r"^[ \t]*(?:_{5,}|={5,})[ \t]*$"
_PAGE_BREAK = r"\(Over\)[\s\S]{0,1500}?\(Cont\)[ \t]*"
_FINAL = r"^[ \t]*FINAL REPORT[^\n:]{0,30}:?[ \t]*$"


def _heading(before: str, qualified: str, flags: str, after: str) -> str:
    """Return the pattern of a heading; the name of the group that matches is the section's."""
    return (
        rf"{before}(?:(?P<other>(?{flags}:{_OTHER}))|{qualified}(?:"
        rf"(?P<findings>(?{flags}:{_FINDINGS}))|(?P<impression>(?{flags}:{_IMPRESSION})))){after}"
    )


_CAPITALS = r"[A-Z][A-Z()/& ]{3,60}[ \t]*:"
_HEADINGS = (
    _heading(r"^[ \t]*", _QUALIFIED, "i", r"[ \t]*:"),
    _heading(r"^[ \t]*", r"(?:[A-Z0-9/,&()\-]+ ){0,8}", "-i", r"[ \t]*$"),
    _heading(r"(?<!\S)", "", "-i", r"[ \t]*:"),
)


def mimic_rows(sources: Sequence[str], request: Request, tally: Tally) -> Iterator[Record]:
    """Yield rows with `article` (the findings) and `summary` (the impression) of reports.

    A source is NOTEEVENTS.csv, whose radiology reports are read, a CSV file with the columns
    findings and impression, a report, or a folder of reports (`.txt`). Reports that lack a section
    and those the ratio excludes are removed and counted. A row of NOTEEVENTS.csv, shortened:

        ROW_ID,SUBJECT_ID,CATEGORY,DESCRIPTION,TEXT
        741,26880,Radiology,CHEST (PA & LAT),"[**2162-3-3**] 8:33 AM
                                     FINAL REPORT
         INDICATION:  Cough.

         FINDINGS:  The heart is normal in size. The lungs are clear, without
         consolidation or effusion. No pneumothorax. As seen at [**Hospital1 18**].

         IMPRESSION:  No acute process.
        "
    """
    ratio = MIN_RATIO if request.min_ratio is None else request.min_ratio
    for part in parts(sources, tally, _FILES):
        is_table = (
            part.suffix in (".csv", ".tsv") or b"," in part.stream.peek(80)[:80].split(b"\n")[0]
        )
        is_report = part.suffix == ".txt" or not is_table
        rows = _report_in(part) if is_report else table_in(part, tally)
        yield from converted(rows, lambda row: _report(row, ratio), tally)


def _report_in(part: Part) -> Iterator[Record]:
    """Yield the one report in a text file."""
    try:
        text = part.whole().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LorakitError(f"{part.name}: not UTF-8 text; save the file as UTF-8") from None
    yield Record({"TEXT": text, "id": part.inside}, part.name)


def _report(row: Record, ratio: float) -> Record:
    """Return the sections of a note or a table's row; UnwantedError if it is to be removed."""
    columns = {name.lower(): value for name, value in row.fields.items()}
    _check_note(columns)
    if "findings" in columns and "impression" in columns:
        findings, impression = (_folded(columns[name]) for name in ("findings", "impression"))
    elif "text" in columns:
        findings, impression = sections_of(str(columns["text"]))
    else:
        raise LorakitError(
            f"{row.where}: no column TEXT, nor findings and impression; give NOTEEVENTS.csv"
        )
    _check_sections(findings, impression, ratio)
    rest = {name: columns[name] for name in ("subject_id", "hadm_id") if columns.get(name)}
    report_id = id_of(Record(columns, row.where), "row_id", "note_id", "study_id", "id")
    fields = {"id": report_id, "article": findings, "summary": impression}
    return Record({**fields, **rest}, row.where)


def _check_note(columns: dict[str, str]) -> None:
    """Raise UnwantedError for a note that is not radiology or is marked as an error."""
    if columns.get("category", "Radiology").strip().lower() != "radiology":
        raise UnwantedError("a note that is not of the category Radiology")
    if columns.get("iserror", "") in ("1", "1.0"):
        raise UnwantedError("a note that MIMIC marks as an error")


def _check_sections(findings: str, impression: str, ratio: float) -> None:
    """Raise UnwantedError where a section is missing or the findings are too short."""
    if not findings:
        raise UnwantedError("a report without findings")
    if not impression:
        raise UnwantedError("a report without an impression")
    if count_words(findings) < ratio * count_words(impression):
        raise UnwantedError(f"findings of fewer words than {ratio:g} times the impression's")


def sections_of(report: str) -> tuple[str, str]:
    """Return the findings and the impression of a raw report, each empty if it is missing.

    A section goes up to the next heading, a rule of underscores or the end; page breaks are taken
    out. If a report has a preliminary reading, only what follows the last FINAL REPORT with both
    sections counts.
    """
    text = re.sub(_PAGE_BREAK, "\n", report.replace("\r\n", "\n"))
    starts = [0, *(match.end() for match in re.finditer(_FINAL, text, re.M))]
    for start in (starts[-1], starts[-2:][0], 0):
        findings, impression = _sections(text[start:])
        if findings and impression:
            break
    return findings, impression


def _sections(text: str) -> tuple[str, str]:
    """Return the findings and the impression under the headings of a text without page breaks."""
    bodies: dict[str, list[str]] = {"findings": [], "impression": [], "other": []}
    headings = _headings(text)
    for heading, following in zip_longest(headings, headings[1:]):
        body = text[heading.end() : following.start() if following else len(text)]
        body = re.split(_RULE, body, maxsplit=1, flags=re.M)[0]
        bodies[str(heading.lastgroup)].append(_folded(body))
    return " ".join(bodies["findings"]).strip(), " ".join(bodies["impression"]).strip()


def _headings(text: str) -> list[re.Match[str]]:
    """Return the headings in order; of two that overlap, the one that begins first."""
    at_lines, alone, anywhere = (re.compile(pattern, re.M) for pattern in _HEADINGS)
    candidates = [*at_lines.finditer(text), *alone.finditer(text)]
    for capitals in re.finditer(_CAPITALS, text):  # fast in texts that have none
        candidates += anywhere.finditer(text, *capitals.span())
    headings: list[re.Match[str]] = []
    for candidate in sorted(candidates, key=re.Match.start):
        if not headings or candidate.start() >= headings[-1].end():
            headings.append(candidate)
    return headings


def _folded(text: str) -> str:
    return " ".join(text.split())

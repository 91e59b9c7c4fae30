"""Predictions for a file of records: what `lorakit generate` does between input and output file.

The output holds the input's records, unchanged and in order, each with its `prediction`; a killed
run can be resumed. Completions come from generation.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.files import cannot_write, check_output, delete_siblings, hidden_path_beside
from lorakit.models.base import Base
from lorakit.models.chat import S, following
from lorakit.models.generation import generate, window_size
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import CutTally, Encoder, Example
from lorakit.models.whole import attached
from lorakit.records.completions import skip_done
from lorakit.records.few_shot import NO_EXAMPLES, FewShot
from lorakit.records.jsonl import read_records, write_records
from lorakit.records.record import Record
from lorakit.reporting import Reporter
from lorakit.runs.resume import continuing, run_key
from lorakit.settings import GenerationSettings


def write_predictions(
    base: Base,
    adapter: Adapter | None,
    data: str,
    *,
    settings: GenerationSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    few_shot: FewShot = NO_EXAMPLES,
    team: Team = ALONE,
) -> None:
    """Complete every record of `data`, writing each to `output` as soon as it is done.

    Of a team's processes the first alone reads and writes. Raises LorakitError naming file and line
    for a record that cannot be used; what was written up to then stays beside the output for
    `resume`.
    """
    with contextlib.nullcontext() if adapter is None else attached(base, adapter):
        _write_predictions(
            base,
            adapter,
            data,
            settings=_settings_for(adapter, settings),
            output=output,
            reporter=reporter,
            resume=resume,
            few_shot=few_shot,
            team=team,
        )


def _write_predictions(
    base: Base,
    adapter: Adapter | None,
    data: str,
    *,
    settings: GenerationSettings,
    output: str,
    reporter: Reporter,
    resume: bool,
    few_shot: FewShot,
    team: Team,
) -> None:
    """Write what a base with the adapter on it predicts, as write_predictions does."""
    encoder = base.encoder_for(settings)
    if not team.is_first:
        for _ in generate(base, encoder, (), settings, few_shot=few_shot, team=team):
            pass
        return
    records = reporter.track(read_records(data, "prompt"), "generating")
    tally = CutTally()
    key = _key(base, adapter, settings, few_shot)
    window = window_size(settings)
    with continuing(output, key, resume=resume, multiple=window) as (stream, done):
        skip_done(records, done)
        if done:
            reporter.note(f"going on after {len(done)} records")
        completed = generate(
            base,
            encoder,
            records,
            settings,
            first=len(done),
            few_shot=few_shot,
            note=reporter.note,
            team=team,
        )
        fields = (_tallied(record, prompt, tally) for record, prompt in completed)
        if not write_records(fields, stream) + len(done):
            raise LorakitError(f"{data} holds no records; check what wrote it")
    if tally.note:
        reporter.note(tally.note)


def write_predictions_of_each(
    base: Base,
    adapters: Sequence[Adapter],
    data: str,
    *,
    settings: GenerationSettings,
    outputs: Sequence[str],
    reporter: Reporter,
    resume: bool = False,
    few_shot: FewShot = NO_EXAMPLES,
    team: Team = ALONE,
) -> None:
    """Write the predictions of several adapters, one after the other, each to its own output.

    A hidden file beside each output that is done lets a resumed run pass over it; they are deleted
    at the end. Raises LorakitError as `write_predictions` does.
    """
    for output in outputs if team.is_first else ():
        check_output(output)
        if not resume:
            delete_siblings(output, "[0-9a-f]{12}[.]done")
    keys = [_key(base, each, _settings_for(each, settings), few_shot) for each in adapters]
    marks = [hidden_path_beside(*pair) for pair in zip(outputs, map(_mark, keys), strict=True)]
    for adapter, output, mark in zip(adapters, outputs, marks, strict=True):
        if team.from_first(resume and mark.exists() and _holds_all(output, data)):
            reporter.note(f"{output} is done already")
            continue
        write_predictions(
            base,
            adapter,
            data,
            settings=settings,
            output=output,
            reporter=reporter,
            resume=resume,
            few_shot=few_shot,
            team=team,
        )
        if team.is_first:
            _write_mark(mark)
    for mark in marks if team.is_first else ():
        mark.unlink(missing_ok=True)


def _mark(key: str) -> str:
    return f"{key[:12]}.done"


def _write_mark(mark: Path) -> None:
    try:
        mark.touch()
    except OSError as error:
        raise cannot_write(mark, error) from error


def _holds_all(output: str, data: str) -> bool:
    """Return whether an output is there with a line for every record of `data`."""
    if not Path(output).is_file():
        return False
    records = read_records(data, "prompt")
    skip_done(records, Path(output).read_text(encoding="utf-8").split("\n")[:-1])
    return next(records, None) is None


def _settings_for(adapter: Adapter | None, settings: S) -> S:
    """Return the settings with what they leave open of chat as the adapter was trained."""
    return following(settings, [] if adapter is None else [adapter.header])


def encoder_of(base: Base, adapter: Adapter | None, settings: S) -> Encoder:
    """Return the encoder for outputs of an adapter: as asked, else as it was trained."""
    return base.encoder_for(_settings_for(adapter, settings))


def _tallied(record: Record, prompt: Example, tally: CutTally) -> Mapping[str, Any]:
    """Return a record's fields, and count its prompt."""
    tally.add(prompt)
    return record.fields


def _key(
    base: Base, adapter: Adapter | None, settings: GenerationSettings, few_shot: FewShot
) -> str:
    """Return a hash of everything but the data that predictions depend on."""
    sha256 = adapter.sha256 if adapter else None
    return run_key(asdict(settings), base.record, sha256, few_shot.sha256)

"""Predictions for a file of records: what `lorakit generate` does between input and output file.

The output holds the input's records, unchanged and in order, each with its `prediction`; a killed
run can be resumed. Completions come from generation.py.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import IO, Any

from lorakit.adapters.adapter import Adapter
from lorakit.errors import LorakitError
from lorakit.files import is_stream, open_text_output
from lorakit.models.base import Base
from lorakit.models.chat import S, following
from lorakit.models.generation import generate, window_size
from lorakit.models.lora import attach
from lorakit.models.tokens import CutTally, Encoder, Example
from lorakit.records import Record, read_records, write_records
from lorakit.reporting import Reporter
from lorakit.resume import OutputLines, run_key
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
) -> None:
    """Complete every record of `data`, writing each to `output` as soon as it is done.

    Raises LorakitError naming file and line for a record that cannot be used; what was written up
    to then stays beside the output for `resume`.
    """
    settings = following(settings, [adapter.header] if adapter else [])
    encoder = base.encoder_for(settings)
    if adapter is not None:
        attach(base, adapter)
    records = reporter.track(read_records(data, "prompt"), "generating")
    tally = CutTally()
    key = _key(base, adapter, settings)
    with _open_output(output, key, window_size(settings), resume) as (stream, done):
        _skip(records, done)
        if done:
            reporter.note(f"going on after {len(done)} records")
        completed = generate(base, encoder, records, settings, first=len(done))
        fields = (_tallied(record, prompt, tally) for record, prompt in completed)
        if not write_records(fields, stream) + len(done):
            raise LorakitError(f"{data} holds no records; check what wrote it")
    if tally.note:
        reporter.note(tally.note)


def _tallied(record: Record, prompt: Example, tally: CutTally) -> Mapping[str, Any]:
    """Return a record's fields, and count its prompt."""
    tally.add(prompt)
    return record.fields


def encoder_of(base: Base, adapter: Adapter | None, settings: S) -> Encoder:
    """Return the encoder for outputs of an adapter: as asked, else as it was trained."""
    headers = [] if adapter is None else [adapter.header]
    return base.encoder_for(following(settings, headers))


def _key(base: Base, adapter: Adapter | None, settings: GenerationSettings) -> str:
    """Return a hash of everything but the data that predictions depend on."""
    return run_key(asdict(settings), base.record, adapter.sha256 if adapter else None)


@contextlib.contextmanager
def _open_output(
    output: str, key: str, window: int, resume: bool
) -> Iterator[tuple[IO[str], list[str]]]:
    """Yield the output stream and the lines that an earlier run left, in whole windows."""
    if is_stream(output):
        with open_text_output(output) as stream:
            yield stream, []
        return
    part = OutputLines(output, key, resume=resume)
    keep = len(part.lines) - len(part.lines) % window
    with part.writing(keep) as stream:
        yield stream, part.lines[:keep]


def _skip(records: Iterator[Record], done: list[str]) -> None:
    """Skip the records whose predictions were written by an earlier run.

    Raises LorakitError if the data is not what that run had read.
    """
    for line in done:
        record = next(records, None)
        written = json.loads(line)
        ours = dict.fromkeys(("prediction", "reasoning"))
        if record is None or {**record.fields, **ours} != {**written, **ours}:
            where = record.where if record else "the end of --data"
            raise LorakitError(
                f"{where}: not the record that the killed run had read; generate afresh without "
                "--resume"
            )

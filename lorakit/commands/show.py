"""`lorakit show`: records as a model sees them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import click

from lorakit.commands import _options
from lorakit.commands._types import Whole
from lorakit.reach import check_model
from lorakit.settings import GenerationSettings, ModelSettings

if TYPE_CHECKING:
    from lorakit.models.tokens import Encoder
    from lorakit.records.record import Record


@click.command()
@click.argument("records")
@_options.model
@click.option(
    "--n",
    type=Whole(1),
    default=3,
    show_default=True,
    help="How many records to show.",
)
@_options.max_length
@_options.truncate
@_options.settings(model=ModelSettings, encoding=GenerationSettings)
def show(records: str, n: int, model: ModelSettings, encoding: GenerationSettings) -> None:
    """Show records as the model sees them: special tokens, what is learnt, what was cut.

    On a terminal what is learnt is green, and a red mark stands where --truncate has cut. In a pipe
    there is a line of JSON for each record. No weights are loaded.

    \b
    lorakit show train.jsonl --model Qwen/Qwen2.5-0.5B-Instruct
    """
    check_model(model.model, model.revision)
    import json
    import sys

    from lorakit.adapters.base_model import choose_model
    from lorakit.models.loading import load_encoder
    from lorakit.records.jsonl import read_records

    name, _ = choose_model(model.model, ())
    encoder = load_encoder(
        name, encoding, revision=model.revision, trust_remote_code=model.trust_remote_code
    )
    for record in islice(read_records(records, "prompt"), n):
        view = _view(encoder, record)
        if sys.stdout.isatty():
            click.echo("".join(_styled(view)), color=True)
        else:
            click.echo(json.dumps(view._asdict(), ensure_ascii=False))


class _View(NamedTuple):
    """A record in decoded tokens: the prompt before and after a cut, and what is learnt.

    `cut` and `tokens` are numbers of tokens: those that were cut, and those that are left.
    """

    id: str
    prompt: str
    cut: int
    prompt_after_cut: str
    learnt: str
    tokens: int
    learnt_tokens: int


def _view(encoder: Encoder, record: Record) -> _View:
    """Return what the model sees of a record; without a completion, the prompt alone."""
    from dataclasses import replace

    from lorakit.models.base import UNLIMITED

    def encoded(by: Encoder) -> tuple[tuple[int, ...], int, int]:
        example = by.example(record) if record.has_completion else by.prompt(record, 0)
        return example.ids, example.start, example.cut

    ids, start, cut = encoded(encoder)
    prompt, learnt = ids[:start], ids[start:]
    place = len(prompt)
    if cut:
        whole, whole_start, _ = encoded(replace(encoder, limit=UNLIMITED))
        place = _first_difference(prompt, whole[:whole_start])
    text = encoder.tokenizer.decode
    return _View(
        record.id,
        text(prompt[:place]),
        cut,
        text(prompt[place:]),
        text(learnt),
        len(ids),
        len(learnt),
    )


def _first_difference(shorter: tuple[int, ...], longer: tuple[int, ...]) -> int:
    pairs = enumerate(zip(shorter, longer, strict=False))
    return next((place for place, (a, b) in pairs if a != b), len(shorter))


def _styled(view: _View) -> Iterator[str]:
    from lorakit.foreign_text import printable

    def shown(text: str) -> str:
        return "\n".join(printable(line) for line in text.split("\n"))

    yield click.style(f"── {printable(view.id)}: {view.tokens} tokens, ", dim=True)
    yield click.style(f"{view.learnt_tokens} of them learnt\n", dim=True)
    yield shown(view.prompt)
    if view.cut:
        yield click.style(f"[… {view.cut} tokens cut …]", fg="red")
    yield shown(view.prompt_after_cut)
    yield click.style(shown(view.learnt), fg="green", bold=True)
    yield "\n"

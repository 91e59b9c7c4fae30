"""Find the boundary by evaluation: the k at which the LoRA of the bottom k layers scores best.

The outputs of a boundary are, in float32, those of greedy decoding with the adapter stripped there,
and its score is what the command `score` gives them. How boundaries are decoded together is in
decode.py; models that it cannot handle are decoded one boundary after the other.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TypeVar

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import layer_of
from lorakit.boundary.choice import Sweep, check_rule
from lorakit.boundary.cuts import Cut, Point, cut_at, layer_order, search_points
from lorakit.boundary.decode import Done, Output, Pool, can_pool
from lorakit.boundary.gates import Gates
from lorakit.boundary.strip import check_layers_are_named
from lorakit.files import open_text_output
from lorakit.models.architecture import steady_positions
from lorakit.models.base import Base
from lorakit.models.completions import text_of
from lorakit.models.generation import complete
from lorakit.models.lora import attach
from lorakit.models.memory import BatchSize, in_batches
from lorakit.models.predictions import encoder_of
from lorakit.models.sharing import ALONE, Team
from lorakit.models.tokens import Example, encode_all
from lorakit.records.jsonl import load_records, write_records
from lorakit.records.record import Record
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, nothing_saved, run_key
from lorakit.scoring.cautions import find_cautions
from lorakit.scoring.metrics import compute_statistics
from lorakit.scoring.texts import references_of
from lorakit.settings import BoundarySettings, GenerationSettings

K = TypeVar("K")
_BATCHES_A_ROUND = 2  # of prompts for each process: more keep a Pool full, fewer save earlier
PromptTokens = Sequence[int]


def draw_sample(data: str, *needed: str, sample: int, seed: int) -> list[Record]:
    """Return a seeded random sample of a file's records in file order, or all if there are fewer.

    Each has the fields `needed`. Raises LorakitError naming file and line for a record that cannot
    be used.
    """
    records, _ = load_records(data, *needed)
    chosen = random.Random(f"sample:{seed}").sample(range(len(records)), min(sample, len(records)))
    return [records[index] for index in sorted(chosen)]


def evaluate(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    reporter: Reporter,
    predictions: str | None = None,
    saved: SavedValues | None = None,
    team: Team = ALONE,
) -> Sweep:
    """Decode a sample of `data` at every boundary, and every factor, and score it.

    The outputs of all boundaries are written to the file `predictions`, if that is set, by the
    first process of a team. Each is added to `saved`, and not decoded if it is there. Raises
    LorakitError naming file and line for a record that cannot be used, and for an adapter or a
    boundary that does not fit the base.
    """
    check_layers_are_named(adapter)
    points = search_points(settings, base.layers)
    order = layer_order(settings.keep, base.layers, generation.seed)
    records = draw_sample(data, "prompt", sample=settings.sample, seed=generation.seed)
    check_rule(settings.rule, len(records))
    references = [references_of(record) for record in records]
    for line in find_cautions(references, metrics=[settings.metric], lang=settings.lang):
        reporter.note(f"Warning: {line}")
    encoder, new = encoder_of(base, adapter, generation), generation.max_new_tokens
    prompts = encode_all(records, lambda record: encoder.prompt(record, new), reporter.note)
    cuts = {point: cut_at(point, order) for point in points}
    outputs = decode(base, adapter, prompts, cuts, generation, reporter, saved, team)
    statistics = {
        point: compute_statistics(texts, references, metric=settings.metric, lang=settings.lang)
        for point, texts in outputs.items()
    }
    sweep = Sweep(statistics, settings, order)
    if predictions and team.is_first:
        with open_text_output(predictions) as stream:
            write_records(_predictions(records, outputs, settings), stream)
    for line in sweep.notes:
        reporter.note(line)
    return sweep


def _predictions(
    records: Sequence[Record], outputs: Mapping[Point, Sequence[str]], settings: BoundarySettings
) -> Iterator[dict[str, object]]:
    """Yield the records once for every point, the base first, each with its `prediction`."""
    for point, texts in sorted(outputs.items()):
        factor = {} if settings.factors is None else {"factor": point.factor}
        for record, text in zip(records, texts, strict=True):
            fields = {"id": record.id, **record.fields, "prediction": text}
            yield {"boundary": point.boundary, **factor, **fields}


def decode(
    base: Base,
    adapter: Adapter,
    prompts: Sequence[Example],
    cuts: Mapping[K, Cut],
    settings: GenerationSettings,
    reporter: Reporter,
    saved: SavedValues | None = None,
    team: Team = ALONE,
) -> dict[K, list[str]]:
    """Return, by the keys of `cuts`, the greedy output for every prompt, in their order.

    Cuts that leave the same LoRA are decoded once, and those in `saved` not again. Half precision
    decodes all again: other batches would round otherwise. Processes of a team share the prompts.
    """
    layers = attach(base, adapter)
    places = {layer_of(name) for name in layers}
    left = {key: cut.on(places) for key, cut in cuts.items()}
    distinct, rows = sorted(set(left.values()), reverse=True), [prompt.ids for prompt in prompts]
    saved = saved if saved is not None and base.dtype == torch.float32 else nothing_saved()
    names = _names(prompts, distinct)
    saved_tokens = {place: saved.get(name, int) for place, name in names.items()}
    written = {place: tokens for place, tokens in saved_tokens.items() if tokens is not None}
    done = dict(written)
    with Gates(layers).standing() as gates:
        outputs = _shared_outputs(base, gates, rows, distinct, settings, reporter, done, team)
        new = (output for output in outputs if (output.cut, output.prompt) not in done)
        for output in reporter.timed(new, "decoding", len(names) - len(done)):
            place = output.cut, output.prompt
            written[place] = saved.find(names[place], int, functools.partial(list, output.tokens))
        if base.dtype != torch.float32 and team.is_first:
            reporter.note(_rounding_note(base, gates, rows, settings, written, reporter))
    texts = {place: text_of(base, tokens) for place, tokens in written.items()}
    by_cut = {cut: [texts[cut, number] for number in range(len(prompts))] for cut in distinct}
    return {key: by_cut[cut] for key, cut in left.items()}


def _names(prompts: Sequence[Example], cuts: Sequence[Cut]) -> dict[tuple[Cut, int], str]:
    """Return the names under which the outputs for prompts under cuts are saved."""
    sample = run_key([list(prompt.ids) for prompt in prompts], [asdict(cut) for cut in cuts])
    places = itertools.product(enumerate(cuts), range(len(prompts)))
    return {(cut, n): f"{sample[:12]} output {number} {n}" for (number, cut), n in places}


def _shared_outputs(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    cuts: Sequence[Cut],
    settings: GenerationSettings,
    reporter: Reporter,
    done: Done,
    team: Team,
) -> Iterator[Output]:
    """Yield the outputs of `_outputs`; of several processes each decodes a share of the prompts.

    They exchange outputs after every few batches, so that the first can save them.
    """
    if team.count == 1:
        yield from _outputs(base, gates, prompts, cuts, settings, reporter, done)
        return
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))

    def decode_share(numbers: Sequence[int]) -> list[Output]:
        places = {number: place for place, number in enumerate(numbers)}
        known = {
            (cut, places[number]): tokens
            for (cut, number), tokens in done.items()
            if number in places
        }
        own = [prompts[number] for number in numbers]
        outputs = _outputs(base, gates, own, cuts, settings, reporter, known)
        return [output._replace(prompt=numbers[output.prompt]) for output in outputs]

    for numbers in in_batches(order, _BATCHES_A_ROUND * settings.batch_size * team.count):
        shares = [numbers[first :: team.count] for first in range(team.count)]
        for outputs in team.in_turn([share for share in shares if share], decode_share):
            yield from outputs


def _outputs(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    cuts: Sequence[Cut],
    settings: GenerationSettings,
    reporter: Reporter,
    done: Done,
) -> Iterator[Output]:
    """Yield the outputs under every cut, decoded together if the model allows it.

    Those that are `done` are left out, but where others were decoded with them.
    """
    if len(done) == len(prompts) * len(cuts):
        return
    batch_size = BatchSize(settings.batch_size, reporter.note)
    longest = max(map(len, prompts)) + settings.max_new_tokens
    if longest <= steady_positions(base.model) and can_pool(base, gates, prompts[0]):
        yield from _pooled(base, gates, prompts, cuts, settings.max_new_tokens, batch_size, done)
        return
    reporter.note(f"{base.name} cannot decode boundaries together: one after the other")
    for cut in cuts:
        if all((cut, number) in done for number in range(len(prompts))):
            continue
        for number, tokens in _decode_alone(base, gates, prompts, cut, settings, batch_size):
            yield Output(number, cut, tokens)


def _pooled(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    cuts: Sequence[Cut],
    max_new_tokens: int,
    batch_size: BatchSize,
    done: Done,
) -> Iterator[Output]:
    """Yield the outputs of a Pool; where memory runs out, a smaller one decodes what is left."""
    written = dict(done)
    while True:
        left = [n for n in range(len(prompts)) if any((cut, n) not in written for cut in cuts)]
        waiting = [prompts[number] for number in left]
        known = {
            (cut, place): written[cut, number]
            for place, number in enumerate(left)
            for cut in cuts
            if (cut, number) in written
        }
        try:
            pool = Pool(base, gates, waiting, max_new_tokens, batch_size.rows)
            for output in pool.run(cuts, known):
                number = left[output.prompt]
                if (output.cut, number) not in written:
                    written[output.cut, number] = output.tokens
                    yield output._replace(prompt=number)
            return
        except torch.OutOfMemoryError as error:
            batch_size.halve_(batch_size.rows, error)


def _decode_alone(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    cut: Cut,
    settings: GenerationSettings,
    batch_size: BatchSize,
) -> Iterator[tuple[int, list[int]]]:
    """Decode prompts under one cut as the command `generate` does; yield numbers and tokens."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))

    def decode_batch(numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        gates.set([cut])
        completions = complete(base, [prompts[number] for number in numbers], settings)
        return zip(numbers, completions, strict=True)

    for batch in batch_size.over(order, decode_batch):
        yield from batch


def _rounding_note(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    settings: GenerationSettings,
    written: Mapping[tuple[Cut, int], list[int]],
    reporter: Reporter,
) -> str:
    """Return a note on how many outputs differ from those of a boundary decoded alone.

    The first batch of prompts is decoded again at up to four cuts. `written` holds the tokens by
    cut and prompt.
    """
    cuts = sorted({cut for cut, _ in written})
    few = cuts[:: max(1, len(cuts) // 4)][:4]
    first = prompts[: settings.batch_size]
    batch_size = BatchSize(settings.batch_size, reporter.note)
    differ = sum(
        tokens != written[cut, number]
        for cut in few
        for number, tokens in _decode_alone(base, gates, first, cut, settings, batch_size)
    )
    return (
        f"in {str(base.dtype).removeprefix('torch.')} other batches round otherwise: {differ} of "
        f"{len(few) * len(first)} outputs differ from those of their boundary decoded alone"
    )

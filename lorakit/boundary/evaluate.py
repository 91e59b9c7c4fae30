"""The boundary layer by evaluation: which bottom k layers' LoRA alone scores best.

Every boundary's outputs are, in float32, those of greedy decoding with the adapter stripped there,
and their scores those of `score`. How they are decoded together is in decode.py; models that it
cannot treat so are decoded one boundary after the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.decode import Pool, Written, can_pool
from lorakit.boundary.gates import Gates, layers_on
from lorakit.errors import LorakitError
from lorakit.files import open_text_output
from lorakit.models.base import Base
from lorakit.models.generation import complete, text_of
from lorakit.models.lora import attach
from lorakit.models.predictions import encoder_of
from lorakit.models.tokens import Example, encode_all
from lorakit.records import Record, load_records, write_records
from lorakit.reporting import Reporter
from lorakit.scoring.cautions import find_cautions
from lorakit.scoring.metrics import METRICS, Score, score
from lorakit.scoring.texts import references_of
from lorakit.settings import BoundarySettings, GenerationSettings

Prompt = Sequence[int]


def draw_sample(data: str, *needed: str, sample: int, seed: int) -> list[Record]:
    """Return a seeded random sample of a file's records, in their order; all where there are fewer.

    Raises LorakitError naming file and line for a record that cannot be used.
    """
    records, _ = load_records(data, *needed)
    chosen = random.Random(f"sample:{seed}").sample(range(len(records)), min(sample, len(records)))
    return [records[place] for place in sorted(chosen)]


def pick_boundaries(asked: Sequence[int] | None, layers: int) -> list[int]:
    """Return the boundaries asked for, or 1 … L; LorakitError for one the model does not have."""
    chosen = sorted(asked or range(1, layers + 1))
    if chosen[0] < 1 or chosen[-1] > layers:
        raise LorakitError(
            f"the model has no boundary {chosen[-1]}; give boundaries within 1-{layers}"
        )
    return chosen


@dataclass(frozen=True)
class Evaluation:
    """The outputs and the score of every boundary, 0 (the base model) among them."""

    records: Sequence[Record]
    outputs: Mapping[int, Sequence[str]]
    scores: Mapping[int, Score]

    @property
    def best(self) -> int:
        """The boundary, never 0, that scores best; of equal ones the smallest."""
        sign = 1 if METRICS[self.scores[0].name].higher_is_better else -1
        return max((k for k in sorted(self.scores) if k), key=lambda k: sign * self.scores[k].value)

    def as_records(self) -> list[dict[str, Any]]:
        """Return a record for each boundary in order; `baseline` is the base model's score."""
        return [
            {
                "boundary": k,
                "score": one.value,
                "metric": one.name,
                "count": one.count,
                "baseline": self.scores[0].value,
                "signature": one.signature,
                "best": k == self.best,
            }
            for k, one in sorted(self.scores.items())
            if k
        ]

    def predictions(self) -> Iterator[dict[str, Any]]:
        """Yield the records of every boundary, 0 first, each with its `prediction`."""
        for k, texts in sorted(self.outputs.items()):
            for record, text in zip(self.records, texts, strict=True):
                fields = {"id": record.id, **record.fields, "prediction": text}
                yield {"boundary": k, **fields}

    @property
    def baseline_note(self) -> str:
        """What is to be said of the base model beside the best boundary."""
        base, best = self.scores[0], self.scores[self.best]
        told = f"baseline: the base model (boundary 0) scores {base.value:.2f} {base.name}"
        wins = base.value > best.value
        if not METRICS[base.name].higher_is_better:
            wins = base.value < best.value
        if not wins:
            return f"{told}, boundary {self.best} scores {best.value:.2f}"
        return f"{told}, better than every boundary ({best.value:.2f}): the adapter does not help"


def evaluate(
    base: Base,
    adapter: Adapter,
    data: str,
    *,
    settings: BoundarySettings,
    generation: GenerationSettings,
    reporter: Reporter,
    predictions: str | None = None,
) -> Evaluation:
    """Decode a sample of `data` at every boundary and score it; write the outputs if asked to.

    Raises LorakitError naming file and line for a record that cannot be used, and for an adapter or
    a boundary that does not fit the base.
    """
    boundaries = [0, *pick_boundaries(settings.boundaries, base.layers)]
    records = draw_sample(data, "prompt", sample=settings.sample, seed=generation.seed)
    references = [references_of(record) for record in records]
    for line in find_cautions(references, metrics=[settings.metric], lang=settings.lang):
        reporter.note(f"Warning: {line}")
    encoder, room = encoder_of(base, adapter, generation), generation.max_new_tokens
    prompts = encode_all(records, lambda record: encoder.prompt(record, room), reporter.note)
    outputs = decode(base, adapter, prompts, boundaries, generation, reporter)
    scores = {
        k: score(texts, references, metric=settings.metric, lang=settings.lang)
        for k, texts in outputs.items()
    }
    found = Evaluation(records, outputs, scores)
    if predictions:
        with open_text_output(predictions) as stream:
            write_records(found.predictions(), stream)
    reporter.note(found.baseline_note)
    return found


def decode(
    base: Base,
    adapter: Adapter,
    prompts: Sequence[Example],
    boundaries: Sequence[int],
    settings: GenerationSettings,
    reporter: Reporter,
) -> dict[int, list[str]]:
    """Return the greedy output for every prompt at every boundary, each boundary's in order.

    Boundaries that leave the same layers on are decoded once.
    """
    layers = attach(base, adapter)
    same = {layers_on(layers, k): k for k in sorted(boundaries, reverse=True)}
    apart, rows = list(same.values()), [prompt.ids for prompt in prompts]
    texts: dict[int, list[str]] = {k: [""] * len(prompts) for k in apart}
    sampled: dict[tuple[int, int], list[int]] = {}
    with Gates(layers).standing() as gates:
        made = _written(base, gates, rows, apart, settings, reporter)
        for one in reporter.timed(made, "decoding", len(apart) * len(prompts)):
            texts[one.boundary][one.prompt] = text_of(base, one.tokens)
            sampled[one.boundary, one.prompt] = one.tokens
        if base.dtype != torch.float32:
            reporter.note(_differing(base, gates, rows, settings, sampled))
    return {k: texts[same[layers_on(layers, k)]] for k in boundaries}


def _written(
    base: Base,
    gates: Gates,
    prompts: Sequence[Prompt],
    boundaries: Sequence[int],
    settings: GenerationSettings,
    reporter: Reporter,
) -> Iterator[Written]:
    if can_pool(base, gates, prompts[0]):
        pool = Pool(base, gates, prompts, settings.max_new_tokens, settings.batch_size)
        yield from pool.run(boundaries)
        return
    reporter.note(f"{base.name} cannot decode boundaries together: one after the other")
    for boundary in boundaries:
        for number, tokens in _alone(base, gates, prompts, boundary, settings):
            yield Written(number, boundary, tokens)


def _alone(
    base: Base,
    gates: Gates,
    prompts: Sequence[Prompt],
    boundary: int,
    settings: GenerationSettings,
) -> Iterator[tuple[int, list[int]]]:
    """Decode prompts at one boundary as `generate` does; yield their numbers and new tokens."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), settings.batch_size):
        numbers = order[start : start + settings.batch_size]
        gates.set([boundary])
        found = complete(base, [prompts[number] for number in numbers], settings)
        yield from zip(numbers, found, strict=True)


def _differing(
    base: Base,
    gates: Gates,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    written: Mapping[tuple[int, int], list[int]],
) -> str:
    """Decode a batch of prompts at a few boundaries alone; say how many outputs are others."""
    boundaries = sorted({k for k, _ in written})
    few = boundaries[:: max(1, len(boundaries) // 4)][:4]
    first = prompts[: settings.batch_size]
    differ = sum(
        tokens != written[k, number]
        for k in few
        for number, tokens in _alone(base, gates, first, k, settings)
    )
    return (
        f"in {str(base.dtype).removeprefix('torch.')} other batches round otherwise: {differ} of "
        f"{len(few) * len(first)} outputs differ from those of their boundary decoded alone"
    )

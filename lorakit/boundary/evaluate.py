"""Find the boundary by evaluation: the k at which the LoRA of the bottom k layers scores best.

The outputs of a boundary are, in float32, those of greedy decoding with the adapter stripped there,
and its score is what the command `score` gives them. How boundaries are decoded together is in
decode.py; models that it cannot handle are decoded one boundary after the other.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.boundary.decode import Output, Pool, can_pool
from lorakit.boundary.gates import Gates, layers_on
from lorakit.boundary.records import EvaluationRecord
from lorakit.errors import LorakitError
from lorakit.files import open_text_output
from lorakit.models.base import Base
from lorakit.models.generation import complete, text_of
from lorakit.models.lora import attach
from lorakit.models.predictions import encoder_of
from lorakit.models.tokens import Example, encode_all
from lorakit.records.jsonl import load_records, write_records
from lorakit.records.record import Record
from lorakit.reporting import Reporter
from lorakit.scoring.cautions import find_cautions
from lorakit.scoring.metrics import METRICS, Score, score
from lorakit.scoring.texts import references_of
from lorakit.settings import BoundarySettings, GenerationSettings

PromptTokens = Sequence[int]


def draw_sample(data: str, *needed: str, sample: int, seed: int) -> list[Record]:
    """Return a seeded random sample of a file's records in file order, or all if there are fewer.

    Each has the fields `needed`. Raises LorakitError naming file and line for a record that cannot
    be used.
    """
    records, _ = load_records(data, *needed)
    chosen = random.Random(f"sample:{seed}").sample(range(len(records)), min(sample, len(records)))
    return [records[index] for index in sorted(chosen)]


def pick_boundaries(requested: Sequence[int] | None, layers: int) -> list[int]:
    """Return the requested boundaries, sorted, or 1 … `layers` if there are none.

    Raises LorakitError for a boundary that the model does not have.
    """
    chosen = sorted(requested or range(1, layers + 1))
    if chosen[0] < 1 or chosen[-1] > layers:
        raise LorakitError(
            f"the model has no boundary {chosen[-1]}; give boundaries within 1-{layers}"
        )
    return chosen


@dataclass(frozen=True)
class Evaluation:
    """The outputs and the score of every boundary; boundary 0 is the base model."""

    records: Sequence[Record]
    outputs: Mapping[int, Sequence[str]]
    scores: Mapping[int, Score]

    @property
    def best(self) -> int:
        """The boundary that scores best, never 0; of equals the lowest."""
        sign = 1 if METRICS[self.scores[0].name].higher_is_better else -1
        return max((k for k in sorted(self.scores) if k), key=lambda k: sign * self.scores[k].value)

    def as_records(self) -> list[EvaluationRecord]:
        """Return a record for each boundary except 0, in order, with the base model's score."""
        return [
            {
                "boundary": k,
                "score": score.value,
                "metric": score.name,
                "count": score.count,
                "baseline": self.scores[0].value,
                "signature": score.signature,
                "best": k == self.best,
            }
            for k, score in sorted(self.scores.items())
            if k
        ]

    def predictions(self) -> Iterator[dict[str, object]]:
        """Yield the records once for every boundary, 0 first, each with its `prediction`."""
        for k, texts in sorted(self.outputs.items()):
            for record, text in zip(self.records, texts, strict=True):
                fields = {"id": record.id, **record.fields, "prediction": text}
                yield {"boundary": k, **fields}

    @property
    def baseline_note(self) -> str:
        """A line for the user that compares the base model with the best boundary."""
        base, best = self.scores[0], self.scores[self.best]
        line = f"baseline: the base model (boundary 0) scores {base.value:.2f} {base.name}"
        wins = base.value > best.value
        if not METRICS[base.name].higher_is_better:
            wins = base.value < best.value
        if not wins:
            return f"{line}, boundary {self.best} scores {best.value:.2f}"
        return f"{line}, better than every boundary ({best.value:.2f}): the adapter does not help"


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
    """Decode a sample of `data` at every boundary and score it.

    The outputs of all boundaries are written to the file `predictions`, if that is set.
    Raises LorakitError naming file and line for a record that cannot be used, and for an adapter or
    a boundary that does not fit the base.
    """
    boundaries = [0, *pick_boundaries(settings.boundaries, base.layers)]
    records = draw_sample(data, "prompt", sample=settings.sample, seed=generation.seed)
    references = [references_of(record) for record in records]
    for line in find_cautions(references, metrics=[settings.metric], lang=settings.lang):
        reporter.note(f"Warning: {line}")
    encoder, new = encoder_of(base, adapter, generation), generation.max_new_tokens
    prompts = encode_all(records, lambda record: encoder.prompt(record, new), reporter.note)
    outputs = decode(base, adapter, prompts, boundaries, generation, reporter)
    scores = {
        k: score(texts, references, metric=settings.metric, lang=settings.lang)
        for k, texts in outputs.items()
    }
    evaluation = Evaluation(records, outputs, scores)
    if predictions:
        with open_text_output(predictions) as stream:
            write_records(evaluation.predictions(), stream)
    reporter.note(evaluation.baseline_note)
    return evaluation


def decode(
    base: Base,
    adapter: Adapter,
    prompts: Sequence[Example],
    boundaries: Sequence[int],
    settings: GenerationSettings,
    reporter: Reporter,
) -> dict[int, list[str]]:
    """Return, by boundary, the greedy output for every prompt, in the order of the prompts.

    Boundaries that keep the LoRA of the same layers are decoded once.
    """
    layers = attach(base, adapter)
    model_of = {layers_on(layers, k): k for k in sorted(boundaries, reverse=True)}
    distinct, rows = list(model_of.values()), [prompt.ids for prompt in prompts]
    texts: dict[int, list[str]] = {k: [""] * len(prompts) for k in distinct}
    written: dict[tuple[int, int], list[int]] = {}
    with Gates(layers).standing() as gates:
        outputs = _outputs(base, gates, rows, distinct, settings, reporter)
        for output in reporter.timed(outputs, "decoding", len(distinct) * len(prompts)):
            texts[output.boundary][output.prompt] = text_of(base, output.tokens)
            written[output.boundary, output.prompt] = output.tokens
        if base.dtype != torch.float32:
            reporter.note(_rounding_note(base, gates, rows, settings, written))
    return {k: texts[model_of[layers_on(layers, k)]] for k in boundaries}


def _outputs(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    boundaries: Sequence[int],
    settings: GenerationSettings,
    reporter: Reporter,
) -> Iterator[Output]:
    """Yield the outputs of every boundary, decoded together if the model allows it."""
    if can_pool(base, gates, prompts[0]):
        pool = Pool(base, gates, prompts, settings.max_new_tokens, settings.batch_size)
        yield from pool.run(boundaries)
        return
    reporter.note(f"{base.name} cannot decode boundaries together: one after the other")
    for boundary in boundaries:
        for number, tokens in _decode_alone(base, gates, prompts, boundary, settings):
            yield Output(number, boundary, tokens)


def _decode_alone(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    boundary: int,
    settings: GenerationSettings,
) -> Iterator[tuple[int, list[int]]]:
    """Decode prompts at one boundary as the command `generate` does; yield numbers and tokens."""
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
    for start in range(0, len(order), settings.batch_size):
        numbers = order[start : start + settings.batch_size]
        gates.set([boundary])
        completions = complete(base, [prompts[number] for number in numbers], settings)
        yield from zip(numbers, completions, strict=True)


def _rounding_note(
    base: Base,
    gates: Gates,
    prompts: Sequence[PromptTokens],
    settings: GenerationSettings,
    written: Mapping[tuple[int, int], list[int]],
) -> str:
    """Return a note on how many outputs differ from those of a boundary decoded alone.

    The first batch of prompts is decoded again at up to four boundaries. `written` holds the tokens
    by boundary and prompt.
    """
    boundaries = sorted({k for k, _ in written})
    few = boundaries[:: max(1, len(boundaries) // 4)][:4]
    first = prompts[: settings.batch_size]
    differ = sum(
        tokens != written[k, number]
        for k in few
        for number, tokens in _decode_alone(base, gates, first, k, settings)
    )
    return (
        f"in {str(base.dtype).removeprefix('torch.')} other batches round otherwise: {differ} of "
        f"{len(few) * len(first)} outputs differ from those of their boundary decoded alone"
    )

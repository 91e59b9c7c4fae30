"""What a dry run says of training: lengths, steps, parameters, memory, and a measured step.

No weights are needed but for the time. Merges add to this in merging/plan.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence

import torch

from lorakit.models.base import Base
from lorakit.models.batches import cut_into_runs, epoch_batches, tokens_at_once
from lorakit.models.devices import device_name
from lorakit.models.estimate import (
    Part,
    Pass,
    activation_bytes,
    logit_bytes,
    lora_parameters,
    trained_parts,
    training_pass,
)
from lorakit.models.lengths import Reading, Row, cut_row, length_row, read_lengths
from lorakit.models.lora import inject, pick_modules
from lorakit.models.plan import (
    generation_parts,
    memory_rows,
    parameter_row,
    time_row,
    timed,
)
from lorakit.models.sharing import new_accelerator
from lorakit.models.skeleton import Skeleton
from lorakit.models.tokens import Encoder, Example
from lorakit.reporting import Reporter, Silent, StepReport
from lorakit.settings import (
    LOSS,
    GenerationSettings,
    LoraSettings,
    SelectionSettings,
    TrainingSettings,
)
from lorakit.training.train import Corpus, load_split, resolve_auto, targets_of
from lorakit.training.trainer import Trainer

_BATCHES_LOOKED_AT = 100_000  # in examples: the largest micro-batch of as many epochs
_TIMED_STEP = 2  # the first one warms up


def plan_adapter(
    skeleton: Skeleton,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    lora: LoraSettings,
    selection: SelectionSettings,
    reporter: Reporter,
    load: Callable[[], Base] | None = None,
) -> Iterator[Row]:
    """Yield what `train-adapter` would do: a line each; with `load` also the time.

    Raises LorakitError as `train_adapter` does, for records that are too long after the lines on
    their lengths.
    """
    base = skeleton.base
    settings = resolve_auto(settings, (), base, skeleton.device)
    encoder = base.encoder_for(settings)
    modules = pick_modules(base, targets_of(base, lora, reporter), lora.layers)
    ranks = dict.fromkeys(modules, lora.rank)
    corpus = yield from corpus_rows(data, val, encoder, settings, reporter)
    yield step_row(skeleton, corpus, settings)
    trained = lora_parameters(ranks, skeleton.shapes)
    yield parameter_row(skeleton, trained)
    yield from training_memory_rows(
        skeleton, ranks, corpus, settings, selection, lasting=trained_parts(trained)
    )
    if load is not None:
        loaded = load()
        torch.manual_seed(settings.seed)
        layers = inject(loaded, ranks, alpha=lora.alpha, dropout=settings.dropout)
        accelerator = new_accelerator(loaded.device.type)
        yield from time_rows(Trainer(loaded, layers, settings, accelerator=accelerator), corpus)


def corpus_rows(
    data: str, val: str | None, encoder: Encoder, settings: TrainingSettings, reporter: Reporter
) -> Generator[Row, None, Corpus]:
    """Yield the lines on lengths, and return the corpus that the run would train on."""
    training, validation, hashes = load_split(data, val, seed=settings.seed, reporter=reporter)
    reading = read_lengths([*training, *validation], encoder)
    yield from example_rows(reading)
    examples, count = reading.examples, len(training)
    return Corpus(examples[:count], examples[count:], validation, hashes)


def example_rows(reading: Reading) -> Iterator[Row]:
    """Yield the lines on the lengths of prompts and completions, and raise the run's error."""
    yield length_row("prompts", [length.prompt for length in reading.whole])
    yield length_row("completions", [length.completion for length in reading.whole])
    yield length_row("sequences", [length.total for length in reading.whole])
    yield cut_row(reading)
    reading.check()


def step_row(
    skeleton: Skeleton, corpus: Corpus, settings: TrainingSettings, merges: float = 1
) -> Row:
    """Return the line on optimiser steps; a search takes those of up to so many `merges`."""
    steps = math.ceil(len(corpus.train) / settings.batch_size)
    cuts = [
        micro_batches_of(batch, skeleton, settings) for batch in _batches(corpus.train, settings, 0)
    ]
    return {
        "section": "steps",
        "records": len(corpus.train),
        "validation_records": len(corpus.validation),
        "steps_an_epoch": steps,
        "epochs": settings.epochs,
        "steps": int(merges * steps * settings.epochs),
        "patience": None if settings.keep == "last" else settings.patience,
        "tokens_an_epoch": sum(len(example.ids) for example in corpus.train),
        "micro_batches_an_epoch": sum(map(len, cuts)),
    }


def training_memory_rows(
    skeleton: Skeleton,
    ranks: Mapping[str, int],
    corpus: Corpus,
    settings: TrainingSettings,
    selection: SelectionSettings,
    *,
    lasting: Sequence[Part],
) -> Iterator[Row]:
    """Yield the lines on memory: the base, what lasts, and the largest micro-batch.

    Where a metric decides, outputs are generated between epochs, when there are no activations.
    """
    phases = [micro_batch_parts(skeleton, ranks, corpus.train, settings)]
    if {selection.select_by, selection.search_metric} != {LOSS}:
        rows = GenerationSettings.batch_size
        prompts = sorted((example.start for example in corpus.validation), reverse=True)[:rows]
        phases.append(generation_parts(skeleton, prompts, selection.max_new_tokens))
    yield from memory_rows(skeleton, [skeleton.base_part(), *lasting], *phases)


def micro_batch_parts(
    skeleton: Skeleton,
    ranks: Mapping[str, int],
    examples: Sequence[Example],
    settings: TrainingSettings,
) -> list[Part]:
    """Return what the micro-batch that takes the most stores: activations, and logits."""
    decoder, precision = skeleton.decoder, skeleton.precision
    shapes, checkpointing = skeleton.shapes, settings.gradient_checkpointing

    def activations(size: Pass) -> int:
        return activation_bytes(
            decoder,
            precision,
            size,
            ranks,
            shapes,
            dropout=settings.dropout > 0,
            checkpointing=checkpointing,
        )

    def total(size: Pass) -> int:
        return activations(size) + logit_bytes(decoder, precision, size)

    largest = max(_passes(skeleton, examples, settings), key=total)
    what = f"{largest.positions} positions" + (", layers again one by one" * checkpointing)
    logits = f"{largest.logits} rows of {decoder.vocabulary}, and their gradient"
    return [
        Part("activations", activations(largest), what),
        Part("logits", logit_bytes(decoder, precision, largest), logits),
    ]


def _passes(
    skeleton: Skeleton, examples: Sequence[Example], settings: TrainingSettings
) -> set[Pass]:
    """Return the kinds of micro-batches of all epochs; of very many examples, of the first few."""
    epochs = min(settings.epochs, max(1, _BATCHES_LOOKED_AT // len(examples)))
    return {
        training_pass(rows, packed=skeleton.packs)
        for epoch in range(epochs)
        for batch in _batches(examples, settings, epoch)
        for rows in micro_batches_of(batch, skeleton, settings)
    }


def _batches(
    examples: Sequence[Example], settings: TrainingSettings, epoch: int
) -> Iterator[list[Example]]:
    return epoch_batches(examples, settings.batch_size, settings.seed, epoch + 1)


def micro_batches_of(
    batch: Sequence[Example], skeleton: Skeleton, settings: TrainingSettings
) -> list[list[Example]]:
    """Return the micro-batches in which a run would read examples, as far as a dry run knows."""
    tokens = tokens_at_once(settings.micro_batch_tokens, skeleton.device)
    return cut_into_runs(batch, tokens, packed=skeleton.packs)


# — time —


class _Speed(Silent):
    """A reporter that remembers the speed of the last step, in tokens a second."""

    def step(self, report: StepReport) -> None:
        self.tokens_per_second = report.tokens_per_second


def time_rows(trainer: Trainer, corpus: Corpus, merges: float = 1) -> Iterator[Row]:
    """Take two steps, measure the second and a validation pass, and extrapolate both by tokens.

    The trainer's weights change. Validation runs on one micro-batch alone here; outputs for a
    metric are not counted.
    """
    few, speed = trainer.losses.micro_batches(corpus.validation)[0], _Speed()
    trainer.begin(corpus.train, few, speed)
    trainer.advance(_TIMED_STEP)
    of_token = timed(lambda: trainer.validate(few)) / _tokens(few)
    epochs, where = trainer.settings.epochs, device_name(trainer.base.device)
    step = _tokens(corpus.train) / speed.tokens_per_second * epochs / trainer.steps
    validation = of_token * _tokens(corpus.validation)
    seconds = merges * (trainer.steps * step + (epochs + 1) * validation)
    rate = f"{speed.tokens_per_second:.0f} tokens a second"
    yield time_row("step", step, f"measured on {where}: one step, {rate}, at the mean length")
    yield time_row("validation", validation, f"measured on {where}: one micro-batch, by tokens")
    yield time_row("run", seconds, f"extrapolated to all {epochs} epochs, each validated")


def _tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) for example in examples)

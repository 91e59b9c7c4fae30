"""From records to a trained adapter: `train-adapter`, and what `merge` shares with it.

Here data is read, encoded and partly held out, the trainer runs with a checkpoint, and the header
of the result is written. Stacks and pruning are not known here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from lorakit.adapters.adapter import Adapter, Factors, tensors_of
from lorakit.adapters.blocks import BlockFields
from lorakit.adapters.history import Header, HistoryEntry, new_entry, new_header
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.batches import epoch_batches, tokens_at_once
from lorakit.models.chat import CHAT_DATE, following
from lorakit.models.lora import default_targets, inject, is_transposed, pick_modules, projections
from lorakit.models.sharing import Team, new_accelerator, team_of
from lorakit.models.tokens import Encoder, Example, encode_all
from lorakit.records.jsonl import load_records
from lorakit.records.record import Record
from lorakit.reporting import Reporter
from lorakit.runs.resume import completing
from lorakit.runs.sole_writer import sole_writer
from lorakit.settings import HOLD_OUT, LoraSettings, SelectionSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint, checkpoint_of
from lorakit.training.progress import Progress
from lorakit.training.selection import measure_of
from lorakit.training.trainer import Trainer, Weights
from lorakit.versions import version_of

_PACKAGES = ("lorakit", "torch", "transformers", "peft")


@dataclass(frozen=True)
class Corpus:
    """The encoded data of a run, and the SHA-256 of the files that it came from."""

    train: Sequence[Example]
    validation: Sequence[Example]
    records: Sequence[Record]  # those of the validation examples
    hashes: Mapping[str, str]


def load_corpus(
    data: str, val: str | None, encoder: Encoder, *, seed: int, reporter: Reporter
) -> Corpus:
    """Read and encode the training and the validation records.

    Without `val`, a seeded 20 % of the data, but at least one record, is held out, and a note says
    so. Raises LorakitError if there is only one record.
    """
    training, validation, hashes = load_split(data, val, seed=seed, reporter=reporter)
    encoded = encode_all([*training, *validation], encoder.example, reporter.note)
    count = len(training)
    return Corpus(encoded[:count], encoded[count:], validation, hashes)


def load_split(
    data: str, val: str | None, *, seed: int, reporter: Reporter
) -> tuple[list[Record], list[Record], dict[str, str]]:
    """Read the records to train on, those to validate on, and the SHA-256 of their files.

    They are shared out as in `load_corpus`.
    """
    records, digest = load_records(data, "prompt", "completion")
    hashes = {"data": digest}
    if val is None:
        training, validation = hold_out(records, seed)
        reporter.note(
            f"no --val: {len(validation)} of {len(records)} records are held out to validate"
        )
    else:
        training = records
        validation, hashes["val"] = load_records(val, "prompt", "completion")
    return training, validation, hashes


def hold_out(records: Sequence[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """Return the records to train on and a seeded share HOLD_OUT to validate on, in file order."""
    if len(records) < 2:
        raise LorakitError(
            f"{records[0].where}: one record cannot be held out and trained on; give --val"
        )
    count = max(1, int(HOLD_OUT * len(records)))
    order = list(range(len(records)))
    random.Random(f"hold-out:{seed}").shuffle(order)
    held_out = set(order[:count])
    return (
        [record for index, record in enumerate(records) if index not in held_out],
        [records[index] for index in sorted(held_out)],
    )


def train_and_save(
    trainer: Trainer,
    corpus: Corpus,
    reporter: Reporter,
    *,
    checkpoint: Checkpoint,
    resume: bool,
    export: Callable[[Weights], Adapter],
    output: str,
    checkpoint_every: int | None = None,
) -> None:
    """Train, saving a checkpoint after every epoch; write the best epoch's adapter to `output`.

    A checkpoint is also saved after every `checkpoint_every` steps, and where Ctrl-C, SIGTERM or
    SIGHUP ends the run. Of several processes only the main one writes. Raises LorakitError where
    another run writes `output`.
    """
    main = trainer.accelerator.is_main_process
    with sole_writer(output, writes=main, adapter=True):
        if main and not resume:
            checkpoint.remove()  # another run's, which --resume is not to take for this one's
        if resume and checkpoint.restore_(trainer):
            reporter.note(f"going on after {_place(trainer.progress)}")
        check_same_run(trainer.losses.team, checkpoint.key, trainer.progress.step)
        if note := idle_note(trainer, corpus.train):
            reporter.note(note)
        steps = trainer.train(corpus.train, corpus.validation, reporter, every=checkpoint_every)
        with checkpoint.saving_at_end_of(trainer):
            for _ in steps:
                checkpoint.save(trainer)
        if main:
            with completing(output, checkpoint.remove):
                save_adapter(export(trainer.best), output)


def check_same_run(team: Team, key: str, step: int) -> None:
    """Raise LorakitError unless all processes train the same run, from the same step on."""
    if len(set(team.exchange((key, step)))) > 1:
        raise LorakitError(
            "the processes have read different data, adapters or checkpoints; put those, and -o, "
            "in folders that all machines share"
        )


def idle_note(trainer: Trainer, examples: Sequence[Example]) -> str | None:
    """Return a note where the batches have too few micro-batches for several processes."""
    losses, settings = trainer.losses, trainer.settings
    processes = losses.team.count
    if processes == 1:
        return None
    batches = epoch_batches(examples, settings.batch_size, settings.seed, 1)
    most = max(len(losses.micro_batches(batch)) for batch in batches)
    if most >= processes:
        return None
    return (
        f"{processes} processes share batches of at most {most} "
        f"micro-batch{'es' if most > 1 else ''}; --micro-batch-tokens below {losses.tokens} gives "
        "all of them work"
    )


def _place(progress: Progress) -> str:
    """Return how a note names where a run had stopped."""
    return f"step {progress.step}" if progress.targets else f"epoch {progress.epoch}"


def trained_factors(weights: Weights) -> Factors:
    """Return A and B by module as arrays, where they are what was trained."""
    return {name: (a.numpy(), b.numpy()) for name, (a, b) in weights.items()}


def train_adapter(
    base: Base,
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    lora: LoraSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    checkpoint_every: int | None = None,
    selection: SelectionSettings | None = None,
) -> None:
    """Train a new adapter on records and write it to `output`, in float32.

    Raises LorakitError for records, modules, layers or settings that cannot be used.
    """
    selection = selection or SelectionSettings()
    settings = resolve_auto(settings, (), base)
    encoder = base.encoder_for(settings)
    targets = targets_of(base, lora, reporter)
    modules = pick_modules(base, targets, lora.layers)
    corpus = load_corpus(data, val, encoder, seed=settings.seed, reporter=reporter)
    lora_fields = {**asdict(lora), "target_modules": targets}
    entry = new_entry(
        "train-adapter",
        versions=versions(),
        settings={**settings.history_fields(), **selection.history_fields(), **lora_fields},
        hashes=corpus.hashes,
    )
    reporter.describe(entry)
    ranks = dict.fromkeys(modules, lora.rank)
    config = peft_config(
        ranks,
        base=base.name,
        dropout=settings.dropout,
        alpha=lora.alpha,
        transposed=is_transposed(base, modules),
        projections=projections(base.model),
    )
    torch.manual_seed(settings.seed)
    layers = inject(base, ranks, alpha=lora.alpha, dropout=settings.dropout)
    accelerator, metric = new_accelerator(base.device.type), selection.select_by
    train_and_save(
        Trainer(
            base,
            layers,
            settings,
            accelerator=accelerator,
            measure=measure_of(
                metric, base, encoder, corpus.records, selection, team_of(accelerator)
            ),
        ),
        corpus,
        reporter,
        checkpoint=checkpoint_of(output, entry, base.record),
        resume=resume,
        checkpoint_every=checkpoint_every,
        export=lambda best: Adapter(
            tensors_of(trained_factors(best)), config, trained_header(base, settings, entry)
        ),
        output=output,
    )


def targets_of(base: Base, lora: LoraSettings, reporter: Reporter) -> list[str]:
    """Return the requested target modules, else the family's query and value projections."""
    if lora.target_modules is not None:
        return sorted(lora.target_modules)
    targets, note = default_targets(base)
    if note:
        reporter.note(note)
    return targets


def trained_header(
    base: Base,
    settings: TrainingSettings,
    entry: HistoryEntry,
    *,
    parents: Iterable[Adapter] = (),
    blocks: Sequence[BlockFields] = (),
) -> Header:
    """Return the header of a trained adapter: its base, chat choice, blocks and history.

    The history is that of the parents, without repeated entries, followed by `entry`.
    """
    chat: dict[str, object] = {"chat": settings.chat}
    if settings.chat == "on":
        chat["chat_date"] = str(CHAT_DATE)
    if settings.system is not None:
        chat["system"] = settings.system
    if settings.chat_args:
        chat["chat_args"] = dict(settings.chat_args)
    headers = [parent.header for parent in parents]
    return new_header(entry, parents=headers, base=base.record, chat=chat, blocks=blocks)


def versions() -> dict[str, str]:
    """Return the versions of lorakit and of the packages that it computes with."""
    return {name: version_of(name) for name in _PACKAGES}


def resolve_auto(
    settings: TrainingSettings,
    parents: Sequence[Adapter],
    base: Base,
    device: torch.device | None = None,
) -> TrainingSettings:
    """Return the settings with `auto` resolved: the base's dtype, and chat `on` or `off`.

    Likewise the tokens of a micro-batch, which suit the device, by default the base's. Chat, system
    turn and arguments are those asked for, else those the parents were trained with; chat is else
    `on` where the tokenizer has a template. Raises LorakitError where the parents do not agree.
    """
    settings = following(settings, [parent.header for parent in parents])
    chat = "on" if base.uses_chat(settings.chat) else "off"
    return replace(
        settings,
        chat=chat,
        dtype=str(base.dtype).removeprefix("torch."),
        micro_batch_tokens=tokens_at_once(settings.micro_batch_tokens, device or base.device),
    )

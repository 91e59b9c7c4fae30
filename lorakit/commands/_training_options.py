"""Options of the commands that train, `train-adapter` and `merge`; see _options.py."""

from __future__ import annotations

from collections.abc import Callable

import click

from lorakit.commands import _options
from lorakit.commands._options import F
from lorakit.commands._text_types import MetricName
from lorakit.commands._trackers import TRACKERS
from lorakit.commands._types import ParamType, Real, Whole
from lorakit.runs.processes import process_count
from lorakit.settings import LOSS, SCHEDULES, ModelSettings, SelectionSettings, TrainingSettings

POSITIVE = Real(min=0, min_open=True)
_SHARE = Real(min=0, max=1, max_open=True)


def _training_option(field: str, type: ParamType, help: str) -> Callable[[F], F]:
    return _options.field_option(TrainingSettings, field, type, help)


val = click.option(
    "--val", metavar="FILE", help="Records to validate on. [default: a fifth of --data, held out]"
)

training = _options.together(
    _training_option("lr", POSITIVE, "Highest learning rate."),
    _training_option("epochs", Whole(1), "Most passes over the data."),
    _training_option("patience", Whole(1), "Epochs without a lower loss before stopping."),
    _training_option(
        "keep",
        click.Choice(["best", "last"]),
        "The epoch to save: the best on the validation set, or the last, with no early stop.",
    ),
    _training_option("batch_size", Whole(1), "Examples an optimiser step."),
    _training_option(
        "micro_batch_tokens",
        Whole(1),
        "Tokens that are computed together. [default: 2048, on one GPU 8192]",
    ),
    _training_option("dropout", _SHARE, "Dropout on LoRA's input."),
    _training_option("warmup", _SHARE, "Share of the steps in which the learning rate rises."),
    _training_option("schedule", click.Choice(SCHEDULES), "How the learning rate falls."),
    _training_option("weight_decay", Real(min=0), "AdamW's weight decay."),
    _training_option(
        "max_grad_norm",
        Real(min_open=True, infinite=True),
        "Gradient norm above which it is clipped; inf: never.",
    ),
    click.option(
        "--gradient-checkpointing", is_flag=True, help="Compute activations twice to save memory."
    ),
    click.option(
        "--shard",
        is_flag=True,
        help="Give each of several processes a part of the base, for one too large for a device.",
    ),
    _options.max_length,
    _options.truncate,
    _options.seed,
)


def check_shard(model: ModelSettings) -> None:
    """Raise a usage error for --shard in a single process, or of weights that it cannot shard."""
    if model.shard and process_count() == 1:
        raise click.UsageError(
            "--shard needs several processes: torchrun --nproc-per-node N -m lorakit …"
        )
    if model.shard and model.load_in is not None:
        raise click.UsageError("--shard and --load-in do not go together: leave one out.")


def check_keep(keep: str) -> None:
    """Raise a usage error where --patience is written out for a run that does not stop early."""
    if keep == "last" and "patience" in _options.options_on_command_line():
        raise click.UsageError("--patience has no effect with --keep last, which runs all epochs.")


selection = _options.together(
    _options.field_option(
        SelectionSettings,
        "select_by",
        MetricName(LOSS),
        "What decides on the validation set when to stop and which epoch to keep.",
        metavar=f"{LOSS}|METRIC",
    ),
    _options.field_option(
        SelectionSettings,
        "max_new_tokens",
        Whole(1),
        "Longest output, where a metric decides.",
    ),
    _options.lang,
)

run = _options.together(
    click.option(
        "--resume", is_flag=True, help="Go on where a killed run of the same command stopped."
    ),
    click.option(
        "--checkpoint-every",
        type=Whole(1),
        metavar="N",
        help="Save what --resume needs every N steps too. [default: every epoch, and when stopped]",
    ),
    click.option("--log", metavar="FILE", help="Write a line of JSON for every step and epoch."),
    click.option(
        "--track",
        type=click.Choice(list(TRACKERS)),
        help="Feed these lines to a tracker, locally unless its own settings say otherwise.",
    ),
    _options.quiet,
)

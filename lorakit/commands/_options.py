"""Options that more than one command takes, as plain values: `@options.model`.

Each option has one name here, in the library and in the records; defaults stand in settings.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any, TypeVar

import click

from lorakit.commands._types import Amounts, Density, Layers, MetricName, Names, Numbers
from lorakit.merging.criteria import CRITERIA, VALUES
from lorakit.settings import (
    LOSS,
    SCHEDULES,
    GenerationSettings,
    LoraSettings,
    PruningSettings,
    SelectionSettings,
    StaticSettings,
    TrainingSettings,
)

F = TypeVar("F", bound=Callable[..., Any])
S = TypeVar("S")


def together(*chosen: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator for several options, shown in the order given."""

    def decorate(command: F) -> F:
        for option in reversed(chosen):
            command = option(command)
        return command

    return decorate


def settings_of(kind: type[S], given: dict[str, Any]) -> S:
    """Take the fields of a settings class out of a command's arguments and return the settings."""
    names = [f.name for f in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: given.pop(name) for name in names if name in given})


def output(default: str, what: str) -> Callable[[F], F]:
    """Return the `-o` option of a command that writes `what`, by default to `default`."""
    return click.option(
        "-o",
        "--output",
        default=default,
        show_default=True,
        metavar="FILE",
        help=f"Where to write {what}; `-` is stdout.",
    )


quiet = click.option("-q", "--quiet", is_flag=True, help="Say nothing but errors on stderr.")
data = click.option("--data", required=True, metavar="FILE", help="Records (JSONL); `-` is stdin.")
val = click.option(
    "--val", metavar="FILE", help="Records to validate on. [default: a fifth of --data, held out]"
)
seed = click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=TrainingSettings.seed,
    show_default=True,
    help="Seed of all randomness.",
)
lang = click.option(
    "--lang",
    type=click.Choice(["en", "ja", "zh"]),
    default="en",
    show_default=True,
    help="Language of the texts.",
)
truncate = click.option(
    "--truncate", is_flag=True, help="Cut the end of a prompt that is too long, instead of failing."
)
max_length = click.option(
    "--max-length",
    type=click.IntRange(min=2),
    metavar="N",
    help="Longest sequence in tokens. [default: the model's context]",
)

model = together(
    click.option(
        "--model",
        metavar="NAME",
        help="Base model: a folder or hub id. [default: the adapter's, $LORAKIT_MODEL, or tiny]",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the code that comes with the model."
    ),
    click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda", "mps"]),
        default=TrainingSettings.device,
        show_default=True,
        help="Where to compute.",
    ),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default=TrainingSettings.dtype,
        show_default=True,
        help="Number format of the base; LoRA weights are trained in float32.",
    ),
    click.option(
        "--chat",
        type=click.Choice(["auto", "on", "off"]),
        default=TrainingSettings.chat,
        show_default=True,
        help="Apply the chat template; auto: as the adapter says, else where there is one.",
    ),
)

pruning = together(
    click.option(
        "--prune-ratio",
        type=Amounts("ratio", below=1),
        metavar="R|R1,R2,…|auto",
        help="Share of each group's parameters reset after every step; of several, or of 0, 0.1, … "
        "0.9 (auto), the best on the validation set is kept. [default: 0]",
    ),
    click.option(
        "--importance",
        type=click.Choice(list(CRITERIA)),
        default=PruningSettings.importance,
        show_default=True,
        help="What makes a parameter important.",
    ),
    click.option(
        "--unit",
        type=click.Choice(["parameter", "module"]),
        default=PruningSettings.unit,
        show_default=True,
        help="What is reset: parameters, or whole A/B pairs of one adapter at one projection.",
    ),
    click.option(
        "--prune-threshold",
        type=Amounts("threshold"),
        metavar="T|T1,T2,…|auto",
        help="With --unit module: the mean importance below which a pair is reset; auto tries the "
        "tenths of its distribution, which it prints.",
    ),
    click.option(
        "--prune-value",
        type=click.Choice(list(VALUES)),
        default=PruningSettings.prune_value,
        show_default=True,
        help="What it is reset to: zero, its value at the start, or a fresh LoRA initialisation.",
    ),
    click.option(
        "--calibrate-every",
        type=click.IntRange(min=1),
        metavar="N",
        help="Refresh the input norms every N steps. [default: every epoch]",
    ),
)


def _selection(name: str, text: str, **more: Any) -> Callable[[F], F]:
    return click.option(
        f"--{name}", type=MetricName(LOSS), metavar=f"{LOSS}|METRIC", help=text, **more
    )


selection = together(
    _selection(
        "select-by",
        "What decides on the validation set when to stop and which epoch to keep.",
        default=SelectionSettings.select_by,
        show_default=True,
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=SelectionSettings.max_new_tokens,
        show_default=True,
        help="Longest output, where a metric decides.",
    ),
    lang,
)
metric = _selection(
    "metric", "What decides between several ratios or thresholds. [default: --select-by]"
)

_POSITIVE = click.FloatRange(min=0, min_open=True)
_SHARE = click.FloatRange(min=0, max=1, max_open=True)


def _training(name: str, kind: Any, text: str, **more: Any) -> Callable[[F], F]:
    default = getattr(TrainingSettings, name)
    return click.option(
        f"--{name.replace('_', '-')}",
        type=kind,
        default=default,
        show_default=True,
        help=text,
        **more,
    )


training = together(
    _training("lr", _POSITIVE, "Highest learning rate."),
    _training("epochs", click.IntRange(min=1), "Most passes over the data."),
    _training("patience", click.IntRange(min=1), "Epochs without a lower loss before stopping."),
    _training("batch_size", click.IntRange(min=1), "Examples an optimiser step."),
    _training("micro_batch_tokens", click.IntRange(min=1), "Tokens that are computed together."),
    _training("dropout", _SHARE, "Dropout on LoRA's input."),
    _training("warmup", _SHARE, "Share of the steps in which the learning rate rises."),
    _training("schedule", click.Choice(SCHEDULES), "How the learning rate falls."),
    _training("weight_decay", click.FloatRange(min=0), "AdamW's weight decay."),
    _training("max_grad_norm", _POSITIVE, "Gradient norm above which it is clipped."),
    click.option(
        "--gradient-checkpointing", is_flag=True, help="Compute activations twice to save memory."
    ),
    max_length,
    truncate,
    seed,
)

decoding = together(
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=GenerationSettings.max_new_tokens,
        show_default=True,
        help="Longest completion in tokens.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        default=GenerationSettings.batch_size,
        show_default=True,
        help="Records decoded together.",
    ),
)
generation = together(
    decoding,
    click.option(
        "--temperature",
        type=click.FloatRange(min=0),
        default=GenerationSettings.temperature,
        show_default=True,
        help="Sample at this temperature; 0 is greedy decoding.",
    ),
    click.option(
        "--top-p",
        type=click.FloatRange(min=0, min_open=True, max=1),
        default=GenerationSettings.top_p,
        show_default=True,
        help="Sample from the most probable tokens that make up this share.",
    ),
    max_length,
    truncate,
    seed,
)


def plot(what: str) -> Callable[[F], F]:
    """Return the `--plot` option of a command that can draw `what`."""
    return click.option(
        "--plot",
        metavar="FILE",
        help=f"Draw {what} (.png or .svg); its data go to FILE.jsonl.",
    )


run = together(
    click.option(
        "--resume", is_flag=True, help="Go on where a killed run of the same command stopped."
    ),
    click.option("--log", metavar="FILE", help="Write a line of JSON for every step and epoch."),
    quiet,
)

lora = together(
    click.option(
        "--rank", type=click.IntRange(min=1), default=LoraSettings.rank, show_default=True
    ),
    click.option("--alpha", type=_POSITIVE, default=LoraSettings.alpha, show_default=True),
    click.option(
        "--target-modules",
        type=Names(),
        metavar="NAMES",
        help="Projections to adapt, or all-linear. [default: query and value]",
    ),
    click.option(
        "--layers", type=Layers(), metavar="LAYERS", help="Layers to adapt: 0-19. [default: all]"
    ),
)


static = together(
    click.option(
        "--weights",
        type=Numbers(),
        metavar="W,…",
        help="A factor for each adapter's change ΔW; may be negative. [default: 1 each]",
    ),
    click.option(
        "--density",
        type=Density(),
        default=str(StaticSettings.density),
        show_default=True,
        metavar="D",
        help="Share of each ΔW's parameters that is kept, in each module.",
    ),
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        metavar="R",
        help="Rank of the result, in each module. [default: the adapters' largest]",
    ),
)

portable = click.option(
    "--portable",
    is_flag=True,
    help="Write it as PEFT, vLLM and llama.cpp read alike: one rank and alpha, zero-padded.",
)


def one_pipe(*paths: str | None) -> None:
    """Raise a usage error where one pipe cannot carry what is asked of it.

    Two inputs are `-`, or several processes (torchrun) would read the one stdin.
    """
    if "-" in paths and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError("Several processes cannot share stdin: give files, not '-'.")
    if paths.count("-") > 1:
        raise click.UsageError("Only one input can be '-', since there is one stdin.")

"""Options that several commands take, as plain values (`@_options.data`), and how they are read.

Each option has one name here, in the library and in the records; defaults are in settings.py. A
command gets its options as frozen settings, by `@_options.settings`. Training's options are in
_training_options.py; the options of one command are in its own file or, where they are many, in a
file beside it: _methods.py for `merge`, _recipe_options.py for `build-dataset`, and so on.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from typing import TYPE_CHECKING, TypeVar

import click

from lorakit.commands._text_types import NamedValue
from lorakit.commands._types import ParamType, Real, Whole
from lorakit.files import STDIO
from lorakit.runs.processes import process_count
from lorakit.settings import AskingSettings, GenerationSettings, SelectionSettings, TrainingSettings

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

F = TypeVar("F", bound=Callable[..., object])
S = TypeVar("S", bound="DataclassInstance")


def settings(**kinds: type[DataclassInstance]) -> Callable[[F], Callable[..., None]]:
    """Return a decorator that collects a command's parameters into frozen settings.

    Write it below the options. Every parameter goes, by its name, into the settings that have a
    field of that name, unless the command takes it itself:

        @click.option("--rank") @click.option("--lr") @click.option("--output")
        @settings(lora=LoraSettings, training=TrainingSettings)
        def train(output: str, lora: LoraSettings, training: TrainingSettings) -> None: ...
    """

    def decorate(command: F) -> Callable[..., None]:
        own = signature(command).parameters.keys() - kinds.keys()
        collected = {field for kind in kinds.values() for field in _field_names(kind)} - own

        @functools.wraps(command)
        def collect_and_call(**parameters: object) -> None:
            fields = {name: value for name, value in parameters.items() if name in collected}
            others = {name: value for name, value in parameters.items() if name not in collected}
            command(**others, **{name: settings_of(kind, fields) for name, kind in kinds.items()})

        return collect_and_call

    return decorate


def settings_of(kind: type[S], parameters: Mapping[str, object]) -> S:
    """Return settings whose fields are the parameters of the same names, ignoring the others."""
    return kind(**{name: parameters[name] for name in _field_names(kind) if name in parameters})


def _field_names(kind: type[DataclassInstance]) -> list[str]:
    return [field.name for field in fields(kind)]


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Return one decorator for several options, which the help shows in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def field_option(
    kind: type[DataclassInstance],
    field: str,
    type: ParamType,
    help: str,
    metavar: str | None = None,
) -> Callable[[F], F]:
    """Return the option of one field of a settings class, with that field's default."""
    return click.option(
        f"--{field.replace('_', '-')}",
        type=type,
        default=getattr(kind, field),
        show_default=True,
        metavar=metavar,
        help=help,
    )


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


def layout(help: str) -> Callable[[F], F]:
    """Return the `--format` option of a command that can write a table; see `wants_table`."""
    return click.option(
        "--format",
        "layout",
        type=click.Choice(["auto", "table", "json"]),
        default="auto",
        show_default=True,
        help=help,
    )


def wants_table(layout: str, output: str) -> bool:
    """Return whether `--format` asks for a table; auto asks for one where a terminal shows it."""
    if layout == "auto":
        return output == STDIO and sys.stdout.isatty()
    return layout == "table"


def plot(what: str) -> Callable[[F], F]:
    """Return the `--plot` option of a command that can draw `what`."""
    return click.option(
        "--plot",
        metavar="FILE",
        help=f"Draw {what} (.png or .svg); its data go to FILE.jsonl.",
    )


def _silence_downloads(ctx: click.Context, param: click.Parameter, value: bool) -> bool:
    """Tell the hub's library, not yet imported, to say only errors where the command is quiet."""
    if value:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    return value


quiet = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    callback=_silence_downloads,
    help="Say nothing but errors on stderr.",
)
resume = click.option("--resume", is_flag=True, help="Go on where a killed run stopped; needs -o.")
data = click.option("--data", required=True, metavar="FILE", help="Records (JSONL); `-` is stdin.")
seed = field_option(TrainingSettings, "seed", Whole(0), "Seed of all randomness.")
lang = field_option(
    SelectionSettings, "lang", click.Choice(["en", "ja", "zh"]), "Language of the texts."
)
truncate = together(
    click.option(
        "--truncate", is_flag=True, help="Cut a prompt that is too long, instead of failing."
    ),
    field_option(
        TrainingSettings,
        "cut",
        click.Choice(["auto", "start", "middle", "end"]),
        "Where --truncate cuts; auto: the end of the record's document, else the middle.",
    ),
)
max_length = click.option(
    "--max-length",
    type=Whole(2),
    metavar="N",
    help="Longest sequence in tokens. [default: the model's context]",
)

base_name = together(
    click.option(
        "--model",
        metavar="NAME",
        help="Base model: a folder or hub id. [default: the adapter's, $LORAKIT_MODEL, or tiny]",
    ),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
)
base_model = together(
    base_name,
    click.option(
        "--trust-remote-code", is_flag=True, help="Run the code that comes with the model."
    ),
)
device = field_option(
    TrainingSettings, "device", click.Choice(["auto", "cpu", "cuda", "mps"]), "Where to compute."
)
model = together(
    base_model,
    click.option(
        "--load-in",
        type=click.Choice(["4bit", "8bit"]),
        help="Quantise the base's weights as they are loaded; needs bitsandbytes (lorakit[quant]).",
    ),
    device,
    field_option(
        TrainingSettings,
        "dtype",
        click.Choice(["auto", "float32", "bfloat16", "float16"]),
        "Number format of the base; LoRA weights are trained in float32.",
    ),
    field_option(
        TrainingSettings,
        "chat",
        click.Choice(["auto", "on", "off"]),
        "Apply the chat template; auto: as the adapter says, else where there is one.",
    ),
    click.option(
        "--system",
        metavar="TEXT",
        help="System turn of conversations without one. [default: the adapter's, if any]",
    ),
    click.option(
        "--chat-arg",
        "chat_args",
        type=NamedValue(),
        multiple=True,
        metavar="NAME=VALUE",
        help="A value for the chat template: enable_thinking=false. [default: the adapter's]",
    ),
)

decoding = together(
    field_option(GenerationSettings, "max_new_tokens", Whole(1), "Longest completion in tokens."),
    field_option(GenerationSettings, "batch_size", Whole(1), "Records decoded together."),
)

asking = together(
    field_option(AskingSettings, "concurrency", Whole(1, most=1000), "Questions asked at a time."),
    field_option(
        AskingSettings,
        "timeout",
        Real(min_open=True, most=1e6),
        "Seconds of silence after which a question is asked again.",
    ),
    field_option(AskingSettings, "retries", Whole(0), "How often a question is asked again."),
)


def check_stdin(*paths: str | None) -> None:
    """Raise a usage error where two inputs would share one stdin.

    Either several are `-`, or several processes (torchrun) would read the same pipe.
    """
    if "-" in paths and process_count() > 1:
        raise click.UsageError("Several processes cannot share stdin: give files, not '-'.")
    if paths.count("-") > 1:
        raise click.UsageError("Only one input can be '-', since there is one stdin.")


def adapter_source(adapter: str | None) -> str:
    """Return where an adapter is read from: stdin where none is named, unless it is a terminal."""
    if adapter is None and sys.stdin.isatty():
        raise click.UsageError("Missing argument '[ADAPTER]': stdin is a terminal, not a pipe.")
    return STDIO if adapter is None else adapter


def check_resume(resume: bool, output: str) -> None:
    """Raise a usage error where --resume is set for a run that writes to a pipe."""
    if resume and output == STDIO:
        raise click.UsageError("--resume needs -o FILE: a pipe keeps nothing to go on from.")


def options_on_command_line() -> dict[str, str]:
    """Return the options that were written out, not left at their defaults: names to long forms."""
    context = click.get_current_context()
    unwritten = (click.core.ParameterSource.DEFAULT, None)
    return {
        option.name: option.opts[-1]
        for option in context.command.params
        if isinstance(option, click.Option)
        and option.name
        and context.get_parameter_source(option.name) not in unwritten
    }

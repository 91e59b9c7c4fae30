"""The methods of `merge`: their list for the help, the options that only `merge` has, their checks.

To add a method without data, add a line to METHODS in merging/methods.py; for one that trains, add
a line to TRAINED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any  # click gives options' values untyped

import click

from lorakit.commands import _options
from lorakit.commands._text_types import MetricName
from lorakit.commands._types import RANK, Amounts, Density, StepsOrEpoch, Weights, Whole
from lorakit.merging.criteria import CRITERIA, VALUES
from lorakit.merging.groups import GROUPS, PAIR_GROUPS
from lorakit.merging.methods import METHODS
from lorakit.settings import (
    LEARNED_WEIGHTS_LR,
    LOSS,
    PruningSettings,
    PruningValues,
    StaticSettings,
    TrainingSettings,
)

TRAINED = {
    "adaptive": "train jointly on --data, pruning at every step (the default with --data)",
    "lorahub": "weights found on --data without gradients, for A and for B",
    "learned-weights": "a weight for each adapter and module, learned on --data; nothing else is",
}
HELP = {**TRAINED, **{name: method.help for name, method in METHODS.items()}}
EPILOG = "\b\nMethods:\n" + "\n".join(f"  {name:<15}  {text}" for name, text in HELP.items())

# Options by the methods that read them; adaptive reads all but those of _STATIC, learned-weights
# also not those of _PRUNING.
_STATIC = ("density", "rank", "keep_energy", "max_rank", "weights", "weights_by_layer")
_PRUNING = (*(field.name for field in fields(PruningSettings)), "metric", "plot")
_EVERY_METHOD = ("approximate", "method", "output", "portable", "quiet")
_BASE = ("model", "revision", "trust_remote_code")  # read by every method with --approximate
_LORAHUB = (
    "data",
    "log",
    "track",
    "resume",
    "model",
    "revision",
    "trust_remote_code",
    "load_in",
    "device",
    "dtype",
    "chat",
    "chat_args",
    "cut",
    "system",
    "max_length",
    "truncate",
    "micro_batch_tokens",
    *("dry_run", "measure", "layout"),
)

method = click.option(
    "--method",
    type=click.Choice(list(HELP)),
    help="How to merge, see below. [default: adaptive with --data; svd with --keep-energy, or for "
    "one adapter and --rank]",
)

static = _options.together(
    click.option(
        "--weights",
        type=Weights(),
        multiple=True,
        metavar="W,…|NAME=LAYERS:W,…",
        help="A factor for each adapter's change ΔW; may be negative. Or, repeatable, an adapter's "
        "by layer: xs=0-9:1,10-:0.5; 0-29:0..1 is on a line. [default: 1]",
    ),
    click.option(
        "--weights-by-layer",
        metavar="FILE",
        help='Factors by layer, as lines {"adapter": "xs", "layers": "0-9", "weight": 0.5}.',
    ),
    click.option(
        "--density",
        type=Density(),
        default=str(StaticSettings.density),
        show_default=True,
        metavar="D",
        help="Share of each ΔW's parameters that is kept, in each module; tsv: of its singular "
        "components.",
    ),
    click.option(
        "--rank",
        type=Whole(1, most=RANK),
        metavar="R",
        help="Rank of the result, in each module. [default: the adapters' largest]",
    ),
    click.option(
        "--keep-energy",
        type=Density("energy"),
        metavar="E",
        help="In place of --rank: the lowest rank, in each module, that keeps this share of ‖ΔW‖²; "
        "a note a layer says the ranks and the error.",
    ),
    click.option(
        "--max-rank", type=Whole(1, most=RANK), metavar="R", help="Highest rank of --keep-energy."
    ),
)

portable = click.option(
    "--portable",
    is_flag=True,
    help="Write it as PEFT, vLLM and llama.cpp read alike: one rank and alpha, zero-padded.",
)

approximate = click.option(
    "--approximate",
    type=click.Choice(["dora"]),
    help="Take an adapter of DoRA as the LoRA nearest to what it makes of the base (--model), of "
    "its rank or --rank; a note a layer says the error.",
)

pruning = _options.together(
    click.option(
        "--prune-ratio",
        type=Amounts("ratio", below=1),
        metavar="R|R1,R2,…|auto",
        help="Share of each group's parameters reset after every step; of several, or of 0, 0.1, … "
        "0.9 (auto, at the cost of 4.5 merges), the best on the validation set is kept, and a note "
        "says whether it differs from no pruning. [default: 0]",
    ),
    _options.field_option(
        PruningSettings,
        "prune_every",
        StepsOrEpoch(),
        "Prune after every N steps and after the last of an epoch, or after that alone (epoch).",
        metavar="N|epoch",
    ),
    _options.field_option(
        PruningSettings,
        "group",
        click.Choice(list(GROUPS)),
        "Where the share is counted: in each A and each B of an adapter at a projection; in both "
        "together (pair); in each row of A and of B, one output (row); in a whole adapter; in all.",
    ),
    _options.field_option(
        PruningSettings,
        "importance",
        click.Choice(list(CRITERIA)),
        "What makes a parameter important.",
    ),
    _options.field_option(
        PruningSettings,
        "unit",
        click.Choice(["parameter", "module"]),
        "What is reset: parameters, or whole A/B pairs of one adapter at one projection, the least "
        "important on average, up to the share --prune-ratio of all parameters.",
    ),
    click.option(
        "--prune-threshold",
        type=Amounts("threshold"),
        metavar="T|T1,T2,…|auto",
        help="With --unit module, in place of a ratio: the mean importance below which a pair is "
        "reset; auto tries the tenths of its distribution, which it prints.",
    ),
    _options.field_option(
        PruningSettings,
        "prune_value",
        click.Choice(list(VALUES)),
        "What it is reset to: zero, its value at the start, or a fresh LoRA initialisation.",
    ),
    click.option(
        "--calibrate-every",
        type=Whole(1),
        metavar="N",
        help="Refresh the input norms every N steps. [default: every epoch]",
    ),
)

metric = click.option(
    "--metric",
    type=MetricName(LOSS),
    metavar=f"{LOSS}|METRIC",
    help="What decides between several ratios or thresholds. [default: --select-by]",
)


def choose_method(
    method: str | None, data: str | None, static: StaticSettings, adapters: Sequence[str]
) -> str:
    """Return the method: the one named, adaptive with --data, or svd by what only it can mean.

    That is --keep-energy, or --rank for one adapter. Raises a usage error that lists the methods
    where none of these applies.
    """
    refits = static.keep_energy is not None or (static.rank is not None and len(adapters) == 1)
    if method is None and data is None and refits:
        return "svd"
    if data is None and (method is None or method in TRAINED):
        methods = ", ".join(f"{name} ({text})" for name, text in HELP.items())
        other = "" if method else " or '--method'"
        raise click.UsageError(f"Missing option '--data'{other}. Methods: {methods}.")
    return method or "adaptive"


def check_options(method: str) -> None:
    """Raise a usage error for an option on the command line that the method does not read."""
    for name, option in sorted(_options.options_on_command_line().items()):
        if not _reads(method, name):
            readers = [other for other in HELP if _reads(other, name)]
            raise click.UsageError(
                f"{option} does not belong to --method {method}, but to {', '.join(readers)}."
            )


def _reads(method: str, option: str) -> bool:
    """Return whether a method reads an option."""
    if method in ("adaptive", "learned-weights"):
        return option not in _STATIC and (method == "adaptive" or option not in _PRUNING)
    own = _LORAHUB if method == "lorahub" else METHODS[method].settings
    if option in _BASE and "approximate" in _options.options_on_command_line():
        return True
    option = "weights" if option == "weights_by_layer" else option
    return option in own or option in _EVERY_METHOD


def with_own_learning_rate(method: str, training: TrainingSettings) -> TrainingSettings:
    """Return the settings with the default --lr of the method, unless --lr is written out."""
    if method == "learned-weights" and "lr" not in _options.options_on_command_line():
        return replace(training, lr=LEARNED_WEIGHTS_LR)
    return training


def with_weights(
    static: StaticSettings, values: Sequence[Any], file: str | None, adapters: Sequence[str]
) -> StaticSettings:
    """Return the settings with the values of --weights, and with --weights-by-layer's file.

    Raises a usage error where there is not one weight for each adapter, or where both forms, or
    two weights for one adapter, are given; LorakitError for the file.
    """
    lists = [value for value in values if not _is_by_layer(value)]
    by_layer = [value for value in values if _is_by_layer(value)]
    if len(lists) + bool(by_layer) + bool(file) > 1:
        raise click.UsageError("Give one list of --weights, or weights by layer, once.")
    if lists and len(lists[0]) != len(adapters):
        raise click.UsageError(f"--weights has {len(lists[0])} for {len(adapters)} adapters.")
    if len(dict(by_layer)) < len(by_layer):
        raise click.UsageError("--weights names an adapter twice; join its layers by commas.")
    if file:
        from lorakit.merging.layer_weights import read_layer_weights

        by_layer = list(read_layer_weights(file).items())
    return replace(
        static, weights=lists[0] if lists else (), weights_by_layer=tuple(by_layer) or None
    )


def check_rank(static: StaticSettings) -> None:
    """Raise a usage error for options of the rank that do not go together."""
    if static.keep_energy is not None and static.rank is not None:
        raise click.UsageError("Give --rank or --keep-energy; --max-rank bounds the latter.")
    if static.max_rank is not None and static.keep_energy is None:
        raise click.UsageError("--max-rank needs --keep-energy; --rank sets the rank itself.")


def _is_by_layer(value: Sequence[object]) -> bool:
    """Return whether a value of --weights is an adapter's name with its runs."""
    return isinstance(value[0], str)


def with_values(
    pruning: PruningSettings, ratios: PruningValues | None, thresholds: PruningValues | None
) -> tuple[PruningSettings, PruningValues]:
    """Return the settings and the ratios or thresholds to try with them; () leaves them as set.

    Raises a usage error for options that do not go together.
    """
    if pruning.unit == "parameter":
        if thresholds is not None:
            raise click.UsageError("--prune-threshold is for --unit module only.")
        return pruning, () if ratios is None else ratios
    if (ratios is None) == (thresholds is None):
        raise click.UsageError("--unit module needs one of --prune-ratio and --prune-threshold.")
    if "group" in _options.options_on_command_line():
        if thresholds is not None:
            raise click.UsageError("--group counts a ratio; --prune-threshold has none.")
        if pruning.group not in PAIR_GROUPS:
            groups = " or ".join(PAIR_GROUPS)
            raise click.UsageError(f"--unit module takes --group {groups}, not {pruning.group}.")
    if thresholds is not None:
        return replace(pruning, prune_threshold=Decimal(0)), thresholds
    return pruning, ratios or ()


def check_search(values: PruningValues, *, plot: str | None, metric: str | None) -> None:
    """Raise a usage error for options of a search where there are not several values to try."""
    if values == "auto" or len(values) > 1:
        return
    for name, value in {"--plot": plot, "--metric": metric}.items():
        if value:
            raise click.UsageError(f"{name} needs several ratios or thresholds, or auto.")

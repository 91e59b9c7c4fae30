"""The methods of `merge`: their list for the help, the options that only `merge` has, their checks.

To add a method without data, add a line to METHODS in merging/methods.py; for one that trains, add
a line to TRAINED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from decimal import Decimal

import click

from lorakit.commands import _options
from lorakit.commands._types import (
    RANK,
    Amounts,
    Density,
    MetricName,
    Numbers,
    StepsOrEpoch,
    Whole,
)
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
_STATIC = ("density", "rank", "weights")
_PRUNING = (*(field.name for field in fields(PruningSettings)), "metric", "plot")
_EVERY_METHOD = ("method", "output", "portable", "quiet")
_LORAHUB = (
    "data",
    "log",
    "track",
    "resume",
    "model",
    "revision",
    "trust_remote_code",
    "device",
    "dtype",
    "chat",
    "chat_args",
    "cut",
    "system",
    "max_length",
    "truncate",
    "micro_batch_tokens",
)

method = click.option(
    "--method",
    type=click.Choice(list(HELP)),
    help="How to merge, see below. [default: adaptive with --data; svd for one adapter and --rank]",
)

static = _options.together(
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
        help="Share of each ΔW's parameters that is kept, in each module; tsv: of its singular "
        "components.",
    ),
    click.option(
        "--rank",
        type=Whole(1, most=RANK),
        metavar="R",
        help="Rank of the result, in each module. [default: the adapters' largest]",
    ),
)

portable = click.option(
    "--portable",
    is_flag=True,
    help="Write it as PEFT, vLLM and llama.cpp read alike: one rank and alpha, zero-padded.",
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
    method: str | None, data: str | None, rank: int | None, adapters: Sequence[str]
) -> str:
    """Return the method: the one named, adaptive with --data, or svd for one adapter and --rank.

    Raises a usage error that lists the methods where none of these applies.
    """
    if method is None and data is None and rank is not None and len(adapters) == 1:
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
    return option in own or option in _EVERY_METHOD


def with_own_learning_rate(method: str, training: TrainingSettings) -> TrainingSettings:
    """Return the settings with the default --lr of the method, unless --lr is written out."""
    if method == "learned-weights" and "lr" not in _options.options_on_command_line():
        return replace(training, lr=LEARNED_WEIGHTS_LR)
    return training


def check_weights(weights: Sequence[float] | None, adapters: Sequence[str]) -> None:
    """Raise a usage error where there is not one weight for each adapter."""
    if weights is not None and len(weights) != len(adapters):
        raise click.UsageError(f"--weights has {len(weights)} for {len(adapters)} adapters.")


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

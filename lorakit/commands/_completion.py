"""What `<TAB>` offers for the values of options and arguments.

click completes commands, options and choices by itself. The rest is decided here by the name of a
parameter (VALUES); any other argument, and an option whose value is shown as FILE or FOLDER,
completes files. This is read only while a shell completes, so commands need not know of it.

To complete the values of one more option: a function and a line in VALUES.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands._text_types import MetricName
from lorakit.commands._types import ParamType

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# From the context, the parameter and the incomplete word: the values that could stand there.
Values = Callable[[click.Context, click.Parameter, str], Iterable[str]]

_FILES = ("FILE", "FOLDER", "OUT")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer")


class Completed(ParamType):
    """A plain text with the values that complete it; files where there are none that fit."""

    name = "text"

    def __init__(self, values: Values | None = None, *, files: bool = False) -> None:
        self._values, self._files = values, files

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        values = self._values(ctx, param, incomplete) if self._values else ()
        items = [CompletionItem(value) for value in values if value.startswith(incomplete)]
        if self._files and not items:
            return [CompletionItem(incomplete, type="file")]
        return items


def complete_values_(command: click.Command) -> click.Command:
    """Change the types of a command's parameters to those that complete; return the command."""
    for param in command.params:
        if param.name in VALUES and not isinstance(param.type, click.Choice):
            values, files = VALUES[param.name]
            param.type = Completed(_bound(values, param.type), files=files)
        elif param.type is click.STRING and _names_file(param):
            param.type = Completed(files=True)
    return command


def _bound(values: Callable[[ParamType], Values], kind: ParamType) -> Values:
    return values(kind)


def _names_file(param: click.Parameter) -> bool:
    """Return whether a parameter is an argument, or an option whose value is shown as a file."""
    if isinstance(param, click.Argument):
        return True
    return any(word in (param.metavar or "") for word in _FILES)


def _models(kind: ParamType) -> Values:
    def values(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        from lorakit.reach import TINY, cached_models

        return [TINY, *cached_models()]

    return values


def _metrics(kind: ParamType) -> Values:
    """Complete the metrics that the option takes, where it takes a list of them each in turn."""

    def values(ctx: click.Context, param: click.Parameter, incomplete: str) -> Iterator[str]:
        from lorakit.scoring.metrics import METRICS

        names = kind.names() if isinstance(kind, MetricName) else list(METRICS)
        takes_list = not isinstance(kind, MetricName)
        return _in_list(names, incomplete) if takes_list else iter(names)

    return values


def _in_list(names: Iterable[str], incomplete: str) -> Iterator[str]:
    """Yield a list of names with its last one completed, none of them twice."""
    before = incomplete.split(",")[:-1]
    for name in names:
        if name not in before:
            yield ",".join([*before, name])


def _listed(*names: str) -> Callable[[ParamType], Values]:
    def bind(kind: ParamType) -> Values:
        return lambda ctx, param, incomplete: _in_list(names, incomplete)

    return bind


def _numbers(first: int) -> Callable[[ParamType], Values]:
    """Complete layers, the lowest numbered `first`, as far as the base or the adapter has them."""

    def bind(kind: ParamType) -> Values:
        def values(ctx: click.Context, param: click.Parameter, incomplete: str) -> Iterator[str]:
            last = _layer_count(ctx) - 1 + first
            start, dash, _ = incomplete.rpartition(",")[2].partition("-")
            if dash and start.isdigit():
                names = [f"{start}-{number}" for number in range(int(start) + 1, last + 1)]
            else:
                names = [str(number) for number in range(first, last + 1)]
            return _in_list(names, incomplete)

        return values

    return bind


def _tasks(kind: ParamType) -> Values:
    """Complete the tasks of microworld; the sources of other recipes are files."""

    def values(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        if ctx.params.get("recipe") != "microworld":
            return []
        from lorakit.recipes.microworld.world import TASKS

        return list(TASKS)

    return values


# By the name of a parameter: what completes it, and whether files do where nothing of that fits.
VALUES: dict[str, tuple[Callable[[ParamType], Values], bool]] = {
    "model": (_models, True),
    "bertscore_model": (_models, True),
    "metric": (_metrics, False),
    "select_by": (_metrics, False),
    "target_modules": (_listed("all-linear", "q_proj", "k_proj", "v_proj", "o_proj"), False),
    "layers": (_numbers(0), False),
    "keep": (_numbers(0), False),
    "boundary": (_numbers(1), True),
    "from_layer": (_numbers(0), True),
    "boundaries": (_numbers(1), False),
    "compare": (_numbers(1), False),
    "prune_ratio": (_listed("auto"), False),
    "prune_threshold": (_listed("auto"), False),
    "sources": (_tasks, True),
}


def _layer_count(ctx: click.Context) -> int:
    """Return how many layers the adapter has, or else the base model; 0 where neither is known."""
    # Behind an option that still lacks its value, click leaves arguments unread in `args`.
    for adapter in (ctx.params.get("adapter"), *ctx.args):
        if isinstance(adapter, str) and os.path.exists(adapter):
            return _layers_of_adapter(adapter)
    from lorakit.reach import TINY

    return _layers_of_model(ctx.params.get("model") or os.environ.get("LORAKIT_MODEL") or TINY)


def _layers_of_adapter(source: str) -> int:
    from lorakit.adapters.storage import load_adapter
    from lorakit.errors import LorakitError

    try:
        modules = load_adapter(source, check_values=False, plain=False).modules()
    except LorakitError:
        return 0
    return max((module.layer + 1 for module in modules if module.layer is not None), default=0)


def _layers_of_model(name: str) -> int:
    """Return the number of layers in the config of a folder, of tiny or of a cached model."""
    from lorakit.reach import config_paths

    for path in config_paths(name):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(config, dict):
            return _first_count([config, config.get("text_config")])
    return 0


def _first_count(configs: Sequence[object]) -> int:
    for config in configs:
        for key in _LAYER_COUNTS if isinstance(config, dict) else ():
            if isinstance(config.get(key), int):  # type: ignore[attr-defined]
                return int(config[key])  # type: ignore[index]
    return 0

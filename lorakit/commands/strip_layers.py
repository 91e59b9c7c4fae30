"""`lorakit strip-layers`: an adapter without the LoRA of its upper, or less important, layers."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.commands._text_types import Layers
from lorakit.commands._types import Density
from lorakit.files import STDIO
from lorakit.reach import check_model
from lorakit.settings import LayerChoiceSettings, ModelSettings, TrainingSettings

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.boundary.layer_choice import LayerChoice
    from lorakit.commands._progress import TerminalReporter

_NUMBER = re.compile(r"[0-9]{1,9}")
_OF_EVERY_CHOICE = ("boundary", "keep", "by", "output", "quiet")


@click.command("strip-layers")
@click.argument("adapter", required=False)
@click.option(
    "--boundary",
    metavar="K",
    help="Keep LoRA on the bottom K layers: a number, or find-boundary's records (a file or `-`).",
)
@click.option("--keep", type=Layers(), metavar="LAYERS", help="Keep LoRA on these layers: 0-9,12.")
@click.option(
    "--by",
    type=click.Choice(["importance", "output"]),
    help="Keep the layers of the largest |weight| · ‖input‖, or LoRA output, on --data.",
)
@click.option(
    "--share",
    type=Density("share"),
    metavar="P",
    help="With --by: the share of the layers with LoRA that keep it; 0.5: as many as at K = L/2.",
)
@click.option(
    "--threshold",
    type=Density("threshold"),
    metavar="T",
    help="With --by: keep as few layers as have this share of the importance (LoRA-drop: 0.9).",
)
@click.option("--data", metavar="FILE", help="Records (JSONL) for --by; `-` is stdin.")
@_options.model
@_options.max_length
@_options.truncate
@_options.output("stripped.safetensors", "the stripped adapter")
@_options.quiet
@_options.settings(model=ModelSettings, training=TrainingSettings)
def strip_layers(
    adapter: str | None,
    boundary: str | None,
    keep: tuple[int, ...] | None,
    by: str | None,
    share: Decimal | None,
    threshold: Decimal | None,
    data: str | None,
    output: str,
    quiet: bool,
    model: ModelSettings,
    training: TrainingSettings,
) -> None:
    """Take the LoRA off all layers from --boundary on, tensors and config together.

    ADAPTER is a file, a PEFT folder, `-` (the default: a pipe) or hf://owner/name[@revision]. What
    is kept stays byte for byte. Modules outside the layers, such as an output head, are kept.

    --keep names the layers to keep; --by chooses the most important on --data, which runs the base
    model. `output` is the mean of ‖ΔW·x‖² over the tokens (LoRA-drop), `importance` that of
    |weight| · ‖input‖ over the parameters, as `inspect --importance` shows it. A projection's
    importances are divided by their sum over the layers; a layer's is the mean of its projections'.

    \b
    lorakit strip-layers merged.safetensors --boundary 15 -o final.safetensors
    lorakit strip-layers merged.safetensors --by output --share 0.5 --data val.jsonl
    """
    if [boundary, keep, by].count(None) != 2:
        raise click.UsageError("Give either --boundary or --keep or --by.")
    if boundary is not None and re.fullmatch(r"-[0-9]+", boundary):
        raise click.BadParameter(f"{boundary} is below 0.", param_hint="'--boundary'")
    _check_choice(by, share, threshold, data)
    source = _options.adapter_source(adapter)
    _options.check_stdin(source, boundary, data)
    from lorakit.adapters.storage import load_adapter
    from lorakit.boundary.records import read_cut
    from lorakit.boundary.strip import write_stripped
    from lorakit.commands._progress import TerminalReporter
    from lorakit.files import check_adapter_output, refuse_terminal

    if output == STDIO:
        refuse_terminal("an adapter")
    if by is not None:
        check_adapter_output(output)
        check_model(model.model, model.revision)
    reporter = TerminalReporter(quiet=quiet)
    layer = choice = None
    if boundary is not None and _NUMBER.fullmatch(boundary):
        layer = int(boundary)
    elif boundary is not None:
        layer, keep = read_cut(boundary)
    loaded = load_adapter(source, check_values=by is not None, plain=False)
    if by is not None and data is not None:
        wanted = LayerChoiceSettings(by, share, threshold)
        choice = _choose(loaded, data, wanted, model, training, reporter)
    stripped = write_stripped(loaded, output, boundary=layer, keep=keep, choice=choice)
    reporter.note(_summary(len(loaded.modules()), len(stripped.modules())))
    if any(module.layer is None for module in stripped.modules()):
        reporter.note("modules outside the layers keep their LoRA")
    reporter.note(f"wrote {output}")


def _check_choice(
    by: str | None, share: Decimal | None, threshold: Decimal | None, data: str | None
) -> None:
    """Raise a usage error for --by without what it needs, and for what it alone reads."""
    if by is None:
        written = _options.options_on_command_line().items()
        for option in (option for name, option in written if name not in _OF_EVERY_CHOICE):
            raise click.UsageError(f"{option} is for --by only.")
    elif (share is None) == (threshold is None):
        raise click.UsageError("--by needs either --share or --threshold.")
    elif data is None:
        raise click.UsageError("--by needs --data.")


def _choose(
    adapter: Adapter,
    data: str,
    choice: LayerChoiceSettings,
    model: ModelSettings,
    training: TrainingSettings,
    reporter: TerminalReporter,
) -> LayerChoice:
    """Return the layers that keep their LoRA by their importance on the records, and say which."""
    from lorakit.boundary.strip import check_one_list_of_layers
    from lorakit.commands._opening import open_base_and_adapters
    from lorakit.merging.layer_importance import choose_by_importance

    check_one_list_of_layers(adapter)
    base, (adapter,) = open_base_and_adapters(
        model, [adapter], training.device, training.dtype, reporter.note, training=False
    )
    chosen = choose_by_importance(
        base, adapter, data, choice=choice, settings=training, reporter=reporter
    )
    share = sum(chosen.shares[layer] for layer in chosen.layers)
    listed = ",".join(map(str, chosen.layers))
    reporter.note(f"layers {listed} keep their LoRA: {share:.0%} of the {choice.by}")
    return chosen


def _summary(before: int, after: int) -> str:
    """Return a note on how many modules are left."""
    if before == after:
        return "no LoRA on the layers to strip: every tensor is kept"
    return f"kept {after} of {before} modules"

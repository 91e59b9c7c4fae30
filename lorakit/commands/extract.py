"""`lorakit extract`: two models to the adapter between them."""

from __future__ import annotations

import click

from lorakit.commands import _options
from lorakit.commands._text_types import Layers, Names
from lorakit.commands._types import RANK, Density, Whole
from lorakit.reach import check_model
from lorakit.settings import ExtractSettings, ModelSettings


@click.command()
@click.option("--base", required=True, metavar="NAME", help="The base model: a folder or hub id.")
@click.option("--tuned", required=True, metavar="NAME", help="The model that was tuned from it.")
@click.option("--rank", type=Whole(1, most=RANK), metavar="R", help="Rank of every module.")
@click.option(
    "--keep-energy",
    type=Density("energy"),
    metavar="E",
    help="In place of --rank: the lowest rank, in each module, that keeps this share of ‖ΔW‖².",
)
@click.option(
    "--max-rank", type=Whole(1, most=RANK), metavar="R", help="Highest rank of --keep-energy."
)
@click.option(
    "--target-modules",
    type=Names(),
    default=ExtractSettings.target_modules,
    show_default="all-linear",
    metavar="NAMES",
    help="Projections to take the difference of, or all-linear.",
)
@click.option("--layers", type=Layers(), metavar="LAYERS", help="Layers: 0-19. [default: all]")
@click.option("--trust-remote-code", is_flag=True, help="Run the code that comes with the models.")
@_options.output("extracted.safetensors", "the adapter")
@_options.quiet
@_options.settings(extraction=ExtractSettings)
def extract(
    base: str,
    tuned: str,
    trust_remote_code: bool,
    output: str,
    quiet: bool,
    extraction: ExtractSettings,
) -> None:
    """Extract a LoRA adapter from the difference of a base model and one tuned from it.

    Every projection of the decoder layers that differs gets factors near the difference (truncated
    SVD); a note a layer says the ranks, and the error as a share of ‖ΔW‖. Other tensors that
    differ, such as norms and embeddings, are left as in the base, and a warning says so. Weights
    are read one tensor at a time.

    \b
    lorakit extract --base base/ --tuned tuned/ --rank 16
    lorakit extract --base base/ --tuned tuned/ --keep-energy 0.9 --max-rank 64 -o tuned.safetensors
    """
    if (extraction.rank is None) == (extraction.keep_energy is None):
        raise click.UsageError("Give either --rank or --keep-energy.")
    if extraction.max_rank is not None and extraction.keep_energy is None:
        raise click.UsageError("--max-rank needs --keep-energy; --rank sets the rank itself.")
    for name in (base, tuned):
        check_model(name)
    from lorakit.adapters.storage import save_adapter
    from lorakit.commands._progress import TerminalReporter
    from lorakit.export.model_folder import open_model_folder
    from lorakit.files import check_adapter_output
    from lorakit.merging.extract import extract as extract_adapter

    check_adapter_output(output)
    reporter = TerminalReporter(quiet=quiet)
    models = [
        open_model_folder(ModelSettings(name, trust_remote_code=trust_remote_code), name)
        for name in (base, tuned)
    ]
    adapter = extract_adapter(*models, settings=extraction, reporter=reporter)
    save_adapter(adapter, output)
    reporter.note(f"wrote {output}")

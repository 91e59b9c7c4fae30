"""`lorakit generate`: records to records with predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from lorakit.commands import _dry_run, _options
from lorakit.commands._text_types import ServerUrl, StopText
from lorakit.commands._types import Real, Whole
from lorakit.files import STDIO
from lorakit.reach import check_model
from lorakit.runs.processes import is_first_process
from lorakit.settings import (
    AskingSettings,
    DryRunSettings,
    GenerationSettings,
    ModelSettings,
)

if TYPE_CHECKING:
    from lorakit.adapters.adapter import Adapter
    from lorakit.commands._progress import TerminalReporter
    from lorakit.records.few_shot import FewShot

NAME = "{name}"  # in -o: the adapter's
ZERO_SHOT = "zero-shot"
_OF_A_SERVER = ("served_model", "key_variable", "concurrency", "timeout", "retries")
_OF_A_LOADED_BASE = (
    *("model", "revision", "trust_remote_code", "load_in", "device", "dtype"),
    *("batch_size", "max_length", "truncate", "cut", "dry_run"),
)

sampling = _options.together(
    _options.field_option(
        GenerationSettings,
        "temperature",
        Real(least=1e-5),
        "Sample at this temperature; 0 is greedy decoding.",
    ),
    _options.field_option(
        GenerationSettings,
        "top_p",
        Real(min=0, min_open=True, max=1),
        "Sample from the most probable tokens that make up this share.",
    ),
    _options.field_option(
        GenerationSettings,
        "top_k",
        Whole(0),
        "Sample from so many of the most probable tokens; 0: from all.",
    ),
    _options.field_option(
        GenerationSettings,
        "samples",
        Whole(1),
        "Completions of each record, as a list in `predictions`; needs --temperature.",
    ),
)

few_shot_examples = _options.together(
    click.option(
        "--few-shot", metavar="FILE", help="Records (JSONL) shown as examples before each prompt."
    ),
    click.option(
        "--shots",
        type=Whole(1),
        metavar="K",
        help="How many of --few-shot's records, drawn by --seed. [default: all]",
    ),
)

server = _options.together(
    click.option(
        "--endpoint",
        type=ServerUrl(),
        metavar="URL",
        help="OpenAI-compatible server, up to and with /v1, that completes the records.",
    ),
    click.option("--served-model", metavar="NAME", help="The model's name on that server."),
    click.option(
        "--key-variable",
        default="OPENAI_API_KEY",
        show_default=True,
        metavar="NAME",
        help="Environment variable of the server's API key.",
    ),
    _options.asking,
)


@click.command()
@click.argument("adapters", nargs=-1, metavar="[ADAPTER]...")
@_options.data
@_options.model
@_options.decoding
@click.option(
    "--stop",
    type=StopText(),
    multiple=True,
    metavar="TEXT",
    help="End a completion before this text (\\n: a line end); may be repeated.",
)
@sampling
@few_shot_examples
@_options.max_length
@_options.truncate
@_options.seed
@server
@_options.output(STDIO, f"the records (with {NAME}, the adapter's name)")
@_options.resume
@_options.quiet
@_dry_run.options
@_options.settings(
    model=ModelSettings,
    generation=GenerationSettings,
    asking=AskingSettings,
    dry_run=DryRunSettings,
)
def generate(
    adapters: tuple[str, ...],
    data: str,
    few_shot: str | None,
    endpoint: str | None,
    served_model: str | None,
    key_variable: str,
    output: str,
    resume: bool,
    quiet: bool,
    model: ModelSettings,
    generation: GenerationSettings,
    asking: AskingSettings,
    dry_run: DryRunSettings,
) -> None:
    """Write a completion for every record, greedily by default, as its field `prediction`.

    Records come out in the order they went in. Without ADAPTER the base model answers (zero-shot);
    several ADAPTERs answer one after the other, each into its own file. With --endpoint a server's
    model answers, and none is loaded; with --chat off, too, it gets plain texts (/completions).

    \b
    lorakit generate merged.safetensors --data test.jsonl | lorakit score -
    lorakit generate xs.safetensors wl.safetensors --data test.jsonl -o '{name}.jsonl'
    """
    _options.check_stdin(*adapters, data, few_shot)
    _options.check_resume(resume, output)
    _check_samples(generation, few_shot)
    _check_adapters(adapters, data, output)
    _check_server(endpoint, served_model, adapters)
    _check_plain(endpoint, generation)
    _dry_run.check_options(dry_run)
    from lorakit.commands._progress import TerminalReporter
    from lorakit.records.few_shot import load_few_shot

    reporter = TerminalReporter(quiet=quiet)
    if endpoint is not None and served_model is not None:
        if not is_first_process():
            return
        from lorakit.judging.opening import open_endpoint
        from lorakit.judging.served import write_served_predictions

        write_served_predictions(
            open_endpoint("generate --endpoint", endpoint, key_variable, asking),
            served_model,
            data,
            settings=generation,
            asking=asking,
            output=output.replace(NAME, served_model.rstrip("/").rpartition("/")[2]),
            resume=resume,
            reporter=reporter,
            few_shot=load_few_shot(few_shot, generation.shots, generation.seed),
        )
        return
    check_model(model.model, model.revision)
    if dry_run.dry_run:
        examples = load_few_shot(few_shot, generation.shots, generation.seed)
        _plan(adapters, data, model, generation, examples, reporter, dry_run)
        return
    from lorakit.adapters.storage import load_adapter
    from lorakit.commands._opening import open_base
    from lorakit.models.predictions import write_predictions, write_predictions_of_each
    from lorakit.models.sharing import new_team
    from lorakit.runs.sole_writer import refuse_second_writer

    examples = load_few_shot(few_shot, generation.shots, generation.seed)
    if NAME not in output:
        refuse_second_writer(output, writes=is_first_process())
    loaded = [load_adapter(adapter, plain=False) for adapter in adapters]
    if not loaded:
        reporter.note("no ADAPTER: the base model answers zero-shot")
    base = open_base(
        model, loaded, generation.device, generation.dtype, reporter.note, training=False
    )
    outputs, team = _outputs(output, loaded), new_team(base.device.type)
    if len(loaded) > 1:
        write_predictions_of_each(
            base,
            loaded,
            data,
            settings=generation,
            outputs=outputs,
            resume=resume,
            reporter=reporter,
            few_shot=examples,
            team=team,
        )
        return
    write_predictions(
        base,
        loaded[0] if loaded else None,
        data,
        settings=generation,
        output=outputs[0],
        resume=resume,
        reporter=reporter,
        few_shot=examples,
        team=team,
    )


def _plan(
    adapters: Sequence[str],
    data: str,
    model: ModelSettings,
    generation: GenerationSettings,
    examples: FewShot,
    reporter: TerminalReporter,
    dry_run: DryRunSettings,
) -> None:
    """Say what would be generated, by a model that is loaded."""
    from lorakit.adapters.storage import load_adapter
    from lorakit.models.plan import plan_generation

    loaded = [load_adapter(adapter, plain=False) for adapter in adapters]
    skeleton, load = _dry_run.open_bases(dry_run, model, loaded, generation, reporter.note)
    rows = plan_generation(
        skeleton, loaded, data, settings=generation, few_shot=examples, load=load
    )
    _dry_run.show(rows, dry_run.layout)


def _outputs(output: str, adapters: Sequence[Adapter]) -> list[str]:
    """Return where the predictions of each adapter go, or those of the base without any."""
    from lorakit.adapters.blocks import block_names

    names = block_names(adapter.name for adapter in adapters) or [ZERO_SHOT]
    return [output.replace(NAME, name) for name in names]


def _check_samples(generation: GenerationSettings, few_shot: str | None) -> None:
    """Raise a usage error for samples that would all be alike, and for shots from no file."""
    if generation.samples > 1 and not generation.temperature:
        raise click.UsageError("--samples needs --temperature: greedy completions are all alike.")
    if generation.shots is not None and few_shot is None:
        raise click.UsageError("--shots needs --few-shot FILE.")


def _check_adapters(adapters: Sequence[str], data: str, output: str) -> None:
    """Raise a usage error where several adapters would share a pipe or an output."""
    if len(adapters) < 2:
        return
    if NAME not in output:
        raise click.UsageError(f"Several adapters need a file each: give -o '{NAME}.jsonl'.")
    if data == STDIO:
        raise click.UsageError("Several adapters read --data several times: give a file, not '-'.")


def _check_server(endpoint: str | None, model: str | None, adapters: Sequence[str]) -> None:
    """Raise a usage error for options of a server without one, and of a base where none is loaded.

    The model that a server answers with has to be named.
    """
    written = _options.options_on_command_line()
    if endpoint is None:
        for name in _OF_A_SERVER:
            if name in written:
                raise click.UsageError(f"{written[name]} needs --endpoint URL.")
        return
    if model is None:
        raise click.UsageError("Missing option '--served-model', which --endpoint needs.")
    if adapters:
        raise click.UsageError(
            "--endpoint takes no ADAPTER: have the server load it and name it by --served-model."
        )
    for name in _OF_A_LOADED_BASE:
        if name in written:
            raise click.UsageError(f"{written[name]} is for a base that is loaded, not --endpoint.")


def _check_plain(endpoint: str | None, generation: GenerationSettings) -> None:
    """Raise a usage error for what only a chat template reads, where a server gets plain texts."""
    if endpoint is None or generation.chat != "off":
        return
    for option, value in (("--system", generation.system), ("--chat-arg", generation.chat_args)):
        if value:
            raise click.UsageError(f"{option} is for a chat template, and --chat off applies none.")

"""The program: its commands, each imported only when it runs, and how errors reach the user."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from lorakit.errors import LorakitError
from lorakit.foreign_text import printable, printable_lines
from lorakit.runs.processes import (
    LostProcessError,
    is_first_process,
    keep_silent,
    leave_others,
    process_count,
    signed,
    start_all_of_accelerate,
    wait_for_first,
)
from lorakit.runs.signals import Terminated, terminating

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE


# Each command with the first sentence of its help; a command's module and function bear its name.
COMMANDS = {
    "build-dataset": (
        "Turn raw data into records: lines of JSON with id, prompt and completion, or messages."
    ),
    "train-adapter": (
        "Train a LoRA adapter on records; the best epoch on the validation set is kept."
    ),
    "merge": (
        "Merge adapters into one: trained jointly on a few target examples, or "
        "from the files alone."
    ),
    "find-boundary": "Find the layer above which an adapter's LoRA can be dropped.",
    "strip-layers": "Take the LoRA off all layers from --boundary on, tensors and config together.",
    "scale-layers": "Multiply what the LoRA of all layers from --from on changes by --factor.",
    "generate": (
        "Write a completion for every record, greedily by default, as its field `prediction`."
    ),
    "show": "Show records as the model sees them: special tokens, what is learnt, what was cut.",
    "score": "Score records that hold a prediction: one line per file or --system.",
    "compare": "Show where two systems' predictions differ, side by side.",
    "judge": (
        "Let language models rate predictions from 0 to 10 (GPT-Score), or choose (--against)."
    ),
    "inspect": "Show what is in an adapter: config, layers, blocks and history.",
    "convert": (
        "Write an adapter as a single file or as a folder, of PEFT's, MLX's or vLLM's, or as GGUF."
    ),
    "fuse": (
        "Fuse an adapter into its base: W0 + ΔW in float32, rounded once to the base's format."
    ),
    "extract": "Extract a LoRA adapter from the difference of a base model and one tuned from it.",
    "push": "Upload an adapter, a fused model or GGUF files to the Hugging Face hub.",
    "completion": (
        "Print the script that a shell sources to complete commands, options, files and names."
    ),
}


# Commands whose work is shared out over the processes of a launcher; others run in the first alone.
SHARED_OUT = ("train-adapter", "merge", "generate", "find-boundary", "inspect")

_SHARING = "lorakit.models.sharing"  # loaded only by commands that need torch


def load_command(name: str) -> click.Command:
    """Import and return one command; `--help` stays quick because the others are not imported."""
    function = name.replace("-", "_")
    module = importlib.import_module(f"lorakit.commands.{function}")
    command: click.Command = getattr(module, function)
    return command


class _Program(click.Group):
    """The group of COMMANDS, which it lists without importing any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = load_command(cmd_name)
        if ctx.resilient_parsing:  # a shell asks what could stand next
            from lorakit.commands._completion import complete_values_

            complete_values_(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and name[:1].isalnum() and not ctx.resilient_parsing:
            raise click.UsageError(f"No such command {name!r}.{_suggestion(name)}", ctx)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        names = (name for name in COMMANDS if name.startswith(incomplete))
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS[name]) for name in names), *options]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, COMMANDS))
        commands = {name: click.Command(name, help=text) for name, text in COMMANDS.items()}
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(width)) for name, command in commands.items()]
            )


def _suggestion(name: str) -> str:
    """Return a question for the command that was meant, empty where none is like the name."""
    from difflib import get_close_matches

    begun = [command for command in COMMANDS if command.startswith(name.lower())]
    meant = begun or get_close_matches(name.lower(), COMMANDS, n=1)
    return f" Did you mean {meant[0]!r}?" if meant else ""


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorakit", message="%(version)s")
@click.pass_context
def lorakit(ctx: click.Context) -> None:
    """Merge, prune and trim LoRA adapters where target data is scarce.

    Every command reads and writes safetensors or JSONL; `-` is a pipe.
    """
    import logging

    # peft imports it where it is installed, and it would tell of kernels that it could use
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if process_count() == 1 or ctx.invoked_subcommand in SHARED_OUT:
        return
    if not is_first_process():
        ctx.exit()
    _say(f"Note: {ctx.invoked_subcommand} runs in one process; the others have ended")
    leave_others()


def main() -> None:
    """Run the program and exit with its code; a LorakitError becomes one line on stderr."""
    _open_closed_streams()
    if not is_first_process():
        keep_silent()
    stdout = sys.stdout
    try:
        with terminating() if is_first_process() else contextlib.nullcontext():
            start_all_of_accelerate()
            code = lorakit.main(standalone_mode=False)
            sys.stdout.flush()
        _disconnect()
    except LostProcessError as error:
        if is_first_process():
            _say(_word_of_others() or f"Error: {error}")
        code = 1
    except LorakitError as error:
        _say(f"Error: {error}")
        code = 1
    except click.ClickException as error:
        _show(error)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("Aborted!")
        code = EXIT_INTERRUPTED
    except Terminated as stop:
        word = _word_of_others()  # by its launcher, where another process has failed
        with contextlib.suppress(OSError):  # the terminal may be what has gone
            _say(word or "Terminated!")
        code = 1 if word else 128 + stop.number
    except BrokenPipeError:
        code = EXIT_PIPE_CLOSED
    except SystemExit as stop:  # where a pipe was closed, click wraps stdout and exits with 1
        code = stop.code if sys.stdout is stdout else EXIT_PIPE_CLOSED
        sys.stdout = stdout
    except (MemoryError, RuntimeError) as error:  # torch is not imported here to name its own
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _say("Error: memory does not suffice; give less data, or options that need less")
        code = 1
    except OSError as error:  # one that names no file: stdout on a full disk, most likely
        from lorakit.files import explain

        _say(f"Error: {error.filename or 'stdin or stdout'}: {explain(error)}; check where it goes")
        code = 1
    _flush_stdout()
    sys.exit(code)


# The standard streams in the order of their descriptors: name, mode, flags of the stand-in.
_STREAMS = (
    ("stdin", "r", os.O_RDONLY),
    ("stdout", "w", os.O_RDONLY),
    ("stderr", "w", os.O_WRONLY),
)


def _open_closed_streams() -> None:
    """Open a stand-in for each closed standard stream (`>&-`); stdout's refuses all data."""
    for descriptor, (name, mode, flags) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, flags), descriptor)
            setattr(sys, name, os.fdopen(descriptor, mode, encoding="utf-8", closefd=False))


def _flush_stdout() -> None:
    """Flush stdout; where that fails, drop what is left in it, so that Python exits quietly."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _disconnect() -> None:
    """Take leave of the other processes, where torch has connected them."""
    if (sharing := sys.modules.get(_SHARING)) is not None:
        sharing.disconnect()


def _word_of_others() -> str | None:
    """Return what another process that has failed left for this one to say."""
    sharing = sys.modules.get(_SHARING)
    return None if sharing is None else sharing.word_of_others()


def _show(error: click.ClickException) -> None:
    """Write click's lines about wrong usage to stderr, as `_say` does."""
    if not is_first_process():
        _say(f"Error: {error.format_message()}")
        return
    lines = io.StringIO()
    error.show(lines)
    click.echo(printable_lines(lines.getvalue()), err=True, nl=False)


def _say(line: str) -> None:
    """Write one line to stderr, of which names from foreign files cannot control the terminal.

    One of several processes has the first say it: that hears of it, where torch has connected them,
    or has the same to say. Else it speaks for itself.
    """
    if not is_first_process():
        line = signed(line)
        if (sharing := sys.modules.get(_SHARING)) is not None and sharing.leave_word(line):
            return
        wait_for_first()
    click.echo(printable(line), err=True)

"""The program: one group, one line per command, and the one place where errors become messages."""

from __future__ import annotations

import os
import signal
import sys

import click

from lorakit.commands.build_dataset import build_dataset
from lorakit.commands.generate import generate
from lorakit.commands.inspect import inspect
from lorakit.commands.merge import merge
from lorakit.commands.score import score
from lorakit.commands.train_adapter import train_adapter
from lorakit.errors import LorakitError

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorakit", message="%(version)s")
def lorakit() -> None:
    """Merge, prune and trim LoRA adapters where target data is scarce.

    Every command reads and writes safetensors or JSONL; `-` is a pipe.
    """


for _command in (build_dataset, train_adapter, merge, generate, score, inspect):
    lorakit.add_command(_command)


def main() -> None:
    """Run the program and leave with its exit code; a LorakitError becomes one line on stderr."""
    try:
        code = lorakit.main(standalone_mode=False)
        sys.stdout.flush()
    except LorakitError as error:
        _say(f"Error: {error}")
        code = 1
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("Aborted!")
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_PIPE_CLOSED
    sys.exit(code)


def _say(line: str) -> None:
    click.echo(line, err=True)

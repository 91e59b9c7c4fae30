"""The program: one group, one line per command, and the one place where errors become messages."""

from __future__ import annotations

import os
import signal
import sys

import click

from lorakit.commands.build_dataset import build_dataset
from lorakit.commands.find_boundary import find_boundary
from lorakit.commands.generate import generate
from lorakit.commands.inspect import inspect
from lorakit.commands.judge import judge
from lorakit.commands.merge import merge
from lorakit.commands.score import score
from lorakit.commands.strip_layers import strip_layers
from lorakit.commands.train_adapter import train_adapter
from lorakit.errors import LorakitError
from lorakit.files import explain

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_PIPE_CLOSED = 128 + signal.SIGPIPE


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorakit", message="%(version)s")
def lorakit() -> None:
    """Merge, prune and trim LoRA adapters where target data is scarce.

    Every command reads and writes safetensors or JSONL; `-` is a pipe.
    """


_COMMANDS = (
    *(build_dataset, train_adapter, merge, find_boundary, strip_layers),
    *(generate, score, judge, inspect),
)
for _command in _COMMANDS:
    lorakit.add_command(_command)


def main() -> None:
    """Run the program and leave with its exit code; a LorakitError becomes one line on stderr."""
    _open_closed_streams()
    stdout = sys.stdout
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
        code = EXIT_PIPE_CLOSED
    except SystemExit as left:  # where a pipe was closed, click wraps stdout and leaves with 1
        code = left.code if sys.stdout is stdout else EXIT_PIPE_CLOSED
        sys.stdout = stdout
    except OSError as error:  # of what names no file: stdout on a full disk, most likely
        _say(f"Error: {error.filename or 'stdin or stdout'}: {explain(error)}; check where it goes")
        code = 1
    _flush_stdout()
    sys.exit(code)


def _open_closed_streams() -> None:
    """Put a file in place of each stream that was closed (`>&-`): stdout's refuses all data."""
    for number, (name, mode, flags) in enumerate(_STREAMS):
        if getattr(sys, name) is None:
            os.dup2(os.open(os.devnull, flags), number)
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


_STREAMS = (
    ("stdin", "r", os.O_RDONLY),
    ("stdout", "w", os.O_RDONLY),
    ("stderr", "w", os.O_WRONLY),
)


def _flush_stdout() -> None:
    """Write out what is left; where that fails, drop it, so that Python exits quietly."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say(line: str) -> None:
    click.echo(line, err=True)

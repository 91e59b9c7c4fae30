"""`lorakit completion`: the script that teaches a shell to complete lorakit's commands."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that a shell sources to complete commands, options, files and names.

    \b
    eval "$(lorakit completion bash)"      in ~/.bashrc (bash 4.4 or newer)
    eval "$(lorakit completion zsh)"       in ~/.zshrc, after compinit
    lorakit completion fish | source       in ~/.config/fish/config.fish
    """
    click.echo(completion_script(click.get_current_context().find_root().command, shell))


def completion_script(program: click.Command, shell: str) -> str:
    """Return click's script for a shell.

    fish's is changed to split a line once, at its first comma: values may hold others.
    """
    from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

    kinds = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}
    script = ShellComplete.source(kinds[shell](program, {}, "lorakit", "_LORAKIT_COMPLETE"))
    return script.replace('string split ","', 'string split --max 1 ","')

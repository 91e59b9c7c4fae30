"""`lorakit push`: a folder to the Hugging Face hub."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING

import click

from lorakit.commands import _options
from lorakit.files import STDIO
from lorakit.settings import PushSettings

if TYPE_CHECKING:
    from lorakit.publishing.publication import Publication

_REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


@click.command()
@click.argument("folder", metavar="FOLDER")
@click.argument("repository", metavar="OWNER/NAME")
@click.option(
    "--private", is_flag=True, help="Make it a private repository; refused where it is public."
)
@click.option("--revision", metavar="REV", help="Branch to push to, made where missing.")
@click.option(
    "--commit-message", metavar="TEXT", help="What the commit is called. [default: Upload …]"
)
@click.option(
    "--scores",
    metavar="FILE",
    help="Lines of `lorakit score` for the page: in its metadata and as a table; `-` is stdin.",
)
@click.option("--dry-run", is_flag=True, help="Only list files, sizes and the page.")
@_options.layout("JSON lines or a table, of --dry-run; auto: a table on a terminal.")
@_options.quiet
@_options.settings(settings=PushSettings)
def push(
    folder: str,
    repository: str,
    scores: str | None,
    dry_run: bool,
    layout: str,
    quiet: bool,
    settings: PushSettings,
) -> None:
    """Upload an adapter, a fused model or GGUF files to the Hugging Face hub.

    FOLDER is what lorakit wrote, or a PEFT folder; one with unfinished or damaged files, pickles or
    a trainer's state is refused, and hidden files stay here. OWNER/NAME is made where missing,
    public unless --private or your organisation says otherwise. The token is $HF_TOKEN or that of
    `hf auth login`. With $HF_HUB_OFFLINE set, all is as with --dry-run. stdout gets the commit's
    URL.

    \b
    lorakit push folder/ owner/name --dry-run
    lorakit score test.jsonl | lorakit push folder/ owner/name --scores - --private
    """
    if not _REPOSITORY.fullmatch(repository):
        raise click.UsageError(f"{repository!r} is no repository of the hub: write owner/name.")
    if not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from lorakit.commands._progress import TerminalReporter
    from lorakit.publishing.publication import open_publication
    from lorakit.publishing.upload import hub_address, is_offline, upload

    reporter = TerminalReporter(quiet=quiet)
    publication = open_publication(folder, repository, scores)
    if publication.page is None:
        reporter.note(f"{folder} has no README.md: its page on the hub will be empty")
    if not dry_run and is_offline():
        reporter.note("HF_HUB_OFFLINE is set: nothing is uploaded, as with --dry-run")
    if dry_run or is_offline():
        _show(publication, layout)
        return
    what = f"{len(publication.files)} files of {folder}"
    reporter.note(f"uploading {what} to {hub_address()}/{repository}")
    click.echo(upload(publication, repository, settings=settings, reporter=reporter))


def _show(publication: Publication, layout: str) -> None:
    """List the files with their sizes, and then the page."""
    from lorakit.files import open_text_output, size
    from lorakit.foreign_text import printable, printable_lines
    from lorakit.records.jsonl import write_records

    with open_text_output(STDIO) as stream:
        if not _options.wants_table(layout, STDIO):
            write_records(publication.rows(), stream)
            return
        width = max(map(len, publication.files), default=0)
        for name, count in publication.files.items():
            stream.write(f"{printable(name):{width}}  {size(count):>10}\n")
        stream.write(f"{'':{width}}  {size(publication.size):>10}\n")
        if publication.page is not None:
            stream.write(f"\nREADME.md:\n\n{printable_lines(publication.page)}")

"""The pages are held to the program: commands, options, files and links exist; examples run.

The pages are README.md, examples/README.md and one in every room. Their shell examples run as they
stand: the front page's in a folder of their own, those of the rooms in the folder it leaves.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click
import pytest

from lorakit.cli import COMMANDS, load_command
from tests.support.program import shell

ROOT = Path(__file__).parent.parent
ROOMS = sorted(path.parent.relative_to(ROOT) for path in ROOT.glob("lorakit/*/**/__init__.py"))
PAGES = [
    "README.md",
    "examples/README.md",
    *(f"{room}/README.md" for room in ROOMS),
    "lorakit/tiny/README.md",
]
RUN_AFTER_THE_FRONT_PAGE = [
    "lorakit/adapters/README.md",
    "lorakit/boundary/README.md",
    "lorakit/commands/README.md",
    "lorakit/export/README.md",
    "lorakit/gguf/README.md",
    "lorakit/merging/README.md",
    "lorakit/publishing/README.md",
    "lorakit/recipes/README.md",
    "lorakit/runs/README.md",
    "lorakit/scoring/README.md",
]
SLOW = [  # the last starts launchers
    "lorakit/export/README.md",
    "lorakit/gguf/README.md",
    "lorakit/publishing/README.md",
    "lorakit/runs/README.md",
]
LONGEST_FRONT_PAGE, LONGEST_ROOM_PAGE = 150, 60  # lines
OPTIONS_OF_OTHERS = {  # of sacrebleu, vLLM, llama.cpp, benchmarks, Snakemake; launchers', to "_"
    "--enable-lora",
    "--lora",
    "--configfile",
    "--cores",
    "--unlock",
    "--workflow-profile",
    "--paired-ar",
    "--paired-bs",
    "--out",
    "--smoke",
    "--steps",
    "--rounds",
    "--peer-batch-size",
    "--work",
    "--records",
    "--train",
    "--compiled",
    "--json",
    "--threads",
    "--nproc-per-node",
    "--cpu",
    "--num",
    "--multi",
}


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def examples(page: str) -> str:
    """Return the shell lines of a page, as one script."""
    return "".join(re.findall(r"^```sh\n(.*?)^```$", text_of(page), flags=re.M | re.S))


def options_of(command: str) -> list[str]:
    """Return the long names of a command's options."""
    options = (p for p in load_command(command).params if isinstance(p, click.Option))
    return [name for p in options for name in (*p.opts, *p.secondary_opts) if name[:2] == "--"]


def test_every_command_is_documented() -> None:
    table = text_of("README.md").split("## Commands")[1]
    for name in COMMANDS:
        assert re.search(rf"^\| `{name}[ `]", table, flags=re.M), name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented(command: str) -> None:
    pages = "\n".join(map(text_of, PAGES))
    missing = [
        option
        for option in options_of(command)
        if not re.search(rf"{re.escape(option)}(?![\w-])", pages)
    ]
    assert missing == []


def test_every_option_that_a_page_names_exists() -> None:
    known = {option for command in COMMANDS for option in options_of(command)} | {"--help"}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text_of(page)))
        assert named - known - OPTIONS_OF_OTHERS == set(), page


def test_pages_are_short() -> None:
    assert len(text_of("README.md").splitlines()) <= LONGEST_FRONT_PAGE
    for room in ROOMS:
        assert len(text_of(f"{room}/README.md").splitlines()) <= LONGEST_ROOM_PAGE, room


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_exists(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text_of(page)):
        assert (folder / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_the_python_files_that_a_page_names_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for name in re.findall(r"[\w./-]+\.py\b", text_of(page)):
        assert (folder / name).is_file() or (ROOT / name).is_file(), name
    for name in re.findall(r"\btests\.benchmarks\.([a-z_]+)", text_of(page)):
        assert (ROOT / "tests" / "benchmarks" / f"{name}.py").is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_that_a_page_names_are_in_the_file_named_after_them(page: str) -> None:
    folder = (ROOT / page).parent
    for names, file in re.findall(
        r"((?:`[A-Z_]{4,}`(?:,| or| and)? ?)+)(?:\(|in \[)`([\w./]+\.py)`",
        re.sub(r"\s+", " ", text_of(page)),
    ):
        source = folder / file if (folder / file).is_file() else ROOT / file
        for name in re.findall(r"[A-Z_]+", names):
            assert re.search(rf"^{name}\b", source.read_text("utf-8"), flags=re.M), f"{name} {file}"


def test_every_shell_example_is_run_by_a_test() -> None:
    with_examples = [page for page in PAGES if "```" in text_of(page)]
    assert with_examples == ["README.md", "examples/README.md", *RUN_AFTER_THE_FRONT_PAGE]
    for page in with_examples:
        text = text_of(page)
        assert text.count("```") == 2 * text.count("```sh\n"), "only shell examples are fenced"


@pytest.fixture(scope="module")
def front_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the front page's example was run on the shipped model, and its stdout."""
    folder = tmp_path_factory.mktemp("front-page")
    done = shell("set -e\n" + examples("README.md"), folder, LORAKIT_MODEL="tiny")
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_front_page_runs_on_the_shipped_model(front_page: tuple[Path, str]) -> None:
    folder, printed = front_page
    assert '"rougeL"' in printed
    assert (folder / "final.safetensors").is_file()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
        for page in RUN_AFTER_THE_FRONT_PAGE
    ],
)
def test_the_examples_of_a_room_run(
    page: str, front_page: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    shutil.copytree(front_page[0], folder)
    done = shell("set -e\n" + examples(page), folder)
    assert done.returncode == 0, done.stderr
    if page == "lorakit/adapters/README.md":
        assert (folder / "folder" / "adapter_config.json").is_file()
    if page == "lorakit/runs/README.md":
        assert done.stderr.count("wrote") == 3
        assert len((folder / "out.jsonl").read_text().splitlines()) == len(
            (folder / "same.jsonl").read_text().splitlines()
        )


@pytest.mark.slow
def test_the_commands_run_on_a_real_model_and_real_data(shared: Path, tmp_path: Path) -> None:
    """From SciTLDR's raw file (1992 training records) to scores, on a pretrained Llama."""
    (tmp_path / "SciTLDR").symlink_to(shared / "data" / "scitldr")
    (tmp_path / "my-model").symlink_to(shared / "models" / "stories260K")
    done = shell("set -e\n" + examples("examples/README.md"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "scitldr.train.jsonl").read_text().splitlines()) == 1992
    assert "--truncate cut" in done.stderr
    assert '"rouge1"' in done.stdout

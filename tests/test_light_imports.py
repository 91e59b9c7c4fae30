"""What `--help`, and the commands that need no model, must not import, since it takes seconds."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorakit.adapters.storage import save_adapter
from lorakit.cli import COMMANDS
from lorakit.merging.methods import METHODS
from tests.support.adapters import tiny
from tests.support.endpoints import serving
from tests.support.program import ENVIRONMENT

# Parts of the standard library that cost as much as a package.
SLOW_PARTS = ("asyncio", "email", "importlib.metadata", "multiprocessing", "tempfile", "unittest")

# What `jsonlines` imports: itself, what it needs, and what it takes where that is installed.
JSONLINES = {"attr", "jsonlines", "orjson"}

# The packages that `openai` imports, itself among them, and what it takes where installed.
SDK = {
    "_brotli",
    "annotated_types",
    "anyio",
    "brotli",
    "certifi",
    "distro",
    "h11",
    "httpcore2",
    "httpx2",
    "idna",
    "jiter",
    "openai",
    "pydantic",
    "pydantic_core",
    "sniffio",
    "socksio",
    "truststore",
    "typing_extensions",
    "typing_inspection",
}

# Runs the program and then names, as the last line of stderr, the modules it imported.
PROBE = """
import sys
before = set(sys.modules)
from lorakit.cli import main
try:
    main()
finally:
    print(sorted(set(sys.modules) - before), file=sys.stderr)
"""


def imported(*arguments: str, stdin: str = "") -> list[str]:
    """Return the modules that a run of the program imports; the run has to succeed."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names: list[str] = ast.literal_eval(done.stderr.splitlines()[-1])
    return names


def packages_of(modules: list[str]) -> set[str]:
    packages = {module.split(".")[0] for module in modules} - sys.stdlib_module_names
    # a part of sysconfig that has the platform in its name
    return {package for package in packages if not package.startswith("_sysconfigdata_")}


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_click_and_nothing_else(command: str) -> None:
    modules = imported(*command.split(), "--help")
    assert packages_of(modules) == {"click", "lorakit"}
    assert not set(SLOW_PARTS) & set(modules)


def test_the_programs_help_imports_little_beyond_clicks_own() -> None:
    bare = "import sys\nbefore = set(sys.modules)\nimport click\ntry:\n    click.group()(print)()\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{bare}finally:\n    print(sorted(sys.modules))", "--help"],
        capture_output=True,
        encoding="utf-8",
        check=True,
    )
    clicks = set(ast.literal_eval(done.stdout.splitlines()[-1]))
    beyond = {name for name in set(imported("--help")) - clicks if not name.startswith("lorakit")}
    assert beyond <= {"pathlib", "signal"}  # every further one is time at each start


def test_training_imports_no_package_that_its_libraries_only_look_for(tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "p", "completion": " c"}\n' * 4)
    options = ("-q", "--epochs", "1", "--max-length", "64", "-o", str(tmp_path / "a.safetensors"))
    modules = imported("train-adapter", "--data", str(data), *options)
    assert {"torch", "transformers", "peft"} <= packages_of(modules)
    assert not {"bitsandbytes", "scipy", "sklearn", "pandas", "datasets"} & packages_of(modules)
    assert "torch._inductor.compile_fx" not in modules


def test_help_imports_no_part_of_the_library_that_no_option_reads() -> None:
    assert not [name for name in imported("--help") if name.startswith("lorakit.commands.")]
    modules = imported("build-dataset", "--help")
    assert "lorakit.recipes.table" in modules
    assert "lorakit.commands.merge" not in modules
    assert not [name for name in modules if name.startswith("lorakit.recipes.microworld.world")]
    assert "lorakit.adapters.adapter" not in modules


def test_a_usage_error_is_found_before_anything_heavy_is_imported() -> None:
    script = PROBE.replace(
        "main()", "main()\nexcept SystemExit as left:\n    assert left.code == 2"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "generate", "-", "--data", "-"],
        capture_output=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        check=True,
    )
    assert packages_of(ast.literal_eval(done.stderr.splitlines()[-1])) == {"click", "lorakit"}


def test_building_a_data_set_needs_no_model_library() -> None:
    row = json.dumps({"prompt": "a", "completion": "b"})
    packages = packages_of(imported("build-dataset", "jsonl", stdin=row))
    assert packages <= {"click", "lorakit", *JSONLINES}


@pytest.mark.parametrize("recipe", ["csv", "gsm8k", "jstage", "mimic", "wikilingua", "wmt"])
def test_recipes_of_plain_formats_need_no_parser(recipe: str) -> None:
    packages = packages_of(imported("build-dataset", recipe, "--show"))
    assert packages <= {"click", "lorakit", *JSONLINES}


def test_scoring_needs_no_model_library() -> None:
    line = json.dumps({"prediction": "a 1", "completion": "b 1"})
    metrics = "rougeL,bleu,chrf,em,f1,contains,gsm8k"
    packages = packages_of(imported("score", "-", "--metric", metrics, stdin=line))
    assert {"rouge_score", "sacrebleu"} <= packages
    assert not {"torch", "transformers", "peft", "tokenizers"} & packages


@pytest.mark.parametrize("layout", ["json", "table"])
def test_inspecting_an_adapter_needs_no_model_library(layout: str, tmp_path: Path) -> None:
    path = save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    packages = packages_of(imported("inspect", path, "--format", layout))
    assert "numpy" in packages
    assert not {"torch", "transformers", "peft", "tokenizers", "scipy", "safetensors"} & packages


@pytest.mark.parametrize("method", METHODS)
def test_merging_without_data_needs_no_model_library(method: str, tmp_path: Path) -> None:
    path = save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    output = str(tmp_path / "b.safetensors")
    packages = packages_of(imported("merge", path, path, "--method", method, "-o", output))
    assert "numpy" in packages
    assert not {"torch", "transformers", "peft", "tokenizers", "safetensors"} & packages


def test_stripping_an_adapter_needs_no_model_library(tmp_path: Path) -> None:
    path = save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    output = str(tmp_path / "b.safetensors")
    packages = packages_of(imported("strip-layers", path, "-q", "--boundary", "1", "-o", output))
    assert packages == {"click", "lorakit", "numpy"}


def test_scaling_an_adapter_needs_no_model_library(tmp_path: Path) -> None:
    path = save_adapter(tiny(), str(tmp_path / "a.safetensors"))
    options = ("--from", "1", "--factor", "0.5", "-o", str(tmp_path / "b.safetensors"))
    packages = packages_of(imported("scale-layers", path, "-q", *options))
    assert packages == {"click", "lorakit", "numpy"}


def test_judging_needs_no_model_library(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c", "prediction": "c"}\n')
    with serving(lambda body, number: "7") as server:
        options = ("--endpoint", server.url, "--judge-model", "x")
        packages = packages_of(imported("judge", str(path), *options))
    assert packages - SDK <= {"click", "lorakit", *JSONLINES}


def test_generating_by_a_server_needs_no_model_library(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "completion": "c"}\n')
    with serving(lambda body, number: "7") as server:
        options = ("--data", str(path), "--endpoint", server.url, "--served-model", "x")
        packages = packages_of(imported("generate", *options))
    assert packages - SDK <= {"click", "lorakit", *JSONLINES}


def test_sheets_for_human_raters_need_no_sdk(tmp_path: Path) -> None:
    path, sheet = tmp_path / "a.jsonl", str(tmp_path / "sheet.csv")
    path.write_text('{"prompt": "p", "completion": "c", "prediction": "c"}\n')
    packages = packages_of(imported("judge", str(path), "-q", "--export-sheet", sheet))
    assert packages <= {"click", "lorakit", *JSONLINES}


def test_comparing_two_systems_needs_no_model_library(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prediction": "c", "completion": "c"}\n')
    packages = packages_of(imported("compare", str(path), str(path), "--metric", "em"))
    assert packages <= {"click", "lorakit", *JSONLINES}


@pytest.mark.parametrize(
    "module",
    [
        "merging.criteria",
        "merging.methods",
        "prompts",
        "recipes.microworld.world",
        "recipes.table",
        "scoring.metrics",
        "settings",
    ],
)
def test_a_module_with_a_table_that_options_read_imports_nothing_heavy(module: str) -> None:
    code = (
        "import sys\nbefore = set(sys.modules)\n"
        f"import lorakit.{module}\nprint(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, encoding="utf-8", check=True
    )
    assert packages_of(ast.literal_eval(done.stdout)) == {"lorakit"}

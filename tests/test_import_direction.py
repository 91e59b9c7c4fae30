"""Imports run one way through the rooms, from the ground up to the commands and the program."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorakit

FOLDER = Path(lorakit.__file__).parent
FILES = {
    ".".join(path.relative_to(FOLDER).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(FOLDER.rglob("*.py"))
    if path.name != "__init__.py" or path.parent != FOLDER
}

# The rooms, from the ground up: each may import from those on the levels below it, and none from
# one beside it. A module that stands in no folder is on the ground, but for the program itself.
LEVELS: tuple[tuple[str, ...], ...] = (
    ("ground",),
    ("records", "runs"),
    ("adapters", "recipes", "scoring", "judging"),
    ("models",),
    ("training", "boundary", "export"),
    ("merging", "gguf", "publishing"),
    ("commands",),
    ("program",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PROGRAM = ("cli", "__main__")

# Packages that only some rooms, or modules, may import, wherever in the file.
ONLY: dict[str, tuple[str, ...]] = {
    "transformers": ("models", "export"),
    "peft": ("models",),
    "torch": ("models", "training", "boundary", "merging", "export"),
    "accelerate": ("models.sharing", "training", "merging.joint"),
    "psutil": ("runs.processes",),
    "scipy": ("merging.lorahub",),
    "numpy": (
        *("adapters", "scoring", "models", "training", "boundary", "merging", "export"),
        "gguf",
    ),
    "gguf": ("gguf",),
    "sacrebleu": ("scoring",),
    "rouge_score": ("scoring",),
    "fugashi": ("scoring.languages",),
    "httpx2": ("judging.client",),
    "huggingface_hub": (
        *("hub", "reach", "models.loading", "recipes.readers", "export.model_folder"),
        *("publishing.page", "publishing.upload"),
    ),
    "lxml": ("recipes.news",),
    "openai": ("judging.client",),
    "pyarrow": ("recipes.readers",),
    "pylatexenc": ("recipes.latex",),
    "trafilatura": ("recipes.news",),
    "zstandard": ("recipes.readers",),
    "matplotlib": ("commands",),
    "tensorboardX": ("commands._trackers",),
    "trackio": ("commands._trackers",),
    "wandb": ("commands._trackers",),
    "click": ("commands", "cli"),
    "rich": (
        "commands",
        "scoring.table",
        "scoring.contrast_table",
        "adapters.describe",
        "merging.spectrum",
    ),
    "jsonlines": ("records.jsonl",),
}
# What a static merge or strip-layers runs through must do without torch: it takes seconds to load.
NO_TORCH = (
    *("merging.methods", "merging.static", "merging.stack", "merging.low_rank"),
    *("merging.task_vectors", "merging.criteria", "boundary.strip", "boundary.records"),
    *(
        "merging.module_merges",
        "merging.layer_weights",
        "merging.spectrum",
        "boundary.layer_choice",
        "boundary.scale",
    ),
    *("publishing.page", "publishing.publication", "publishing.upload", "export.weight_files"),
)


def room_of(module: str) -> str:
    """Return the room a module stands in."""
    room, _, inner = module.partition(".")
    if inner or (FOLDER / room).is_dir():
        return room
    return "program" if module in PROGRAM else "ground"


def is_within(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def imports_of(module: str) -> Iterator[tuple[str, bool]]:
    """Yield the full name of every import in a file, and whether only type checkers see it."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    unseen = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in unseen) for name in names)


def own_imports(module: str) -> set[str]:
    """Return the modules of lorakit that a file imports, the deepest that a name can mean."""
    found = set()
    for name, _ in imports_of(module):
        if name == "lorakit" or not name.startswith("lorakit."):
            continue
        inner = name.removeprefix("lorakit.")
        found.add(inner if inner in FILES else inner.rpartition(".")[0] or inner)
    return found


def test_every_folder_is_a_room_of_the_table() -> None:
    folders = {path.parent.relative_to(FOLDER).parts[0] for path in FOLDER.glob("*/*.py")}
    assert folders == {*LEVEL_OF} - {"ground", "program"}


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_its_room_and_the_levels_below(module: str) -> None:
    room = room_of(module)
    others = {name: room_of(name) for name in own_imports(module)}
    wrong = {
        name
        for name, other in others.items()
        if other != room and LEVEL_OF[other] >= LEVEL_OF[room]
    }
    assert not wrong


def test_no_two_modules_import_each_other_even_round_about() -> None:
    graph = {module: own_imports(module) for module in FILES}
    assert sorted(graphlib.TopologicalSorter(graph).static_order()) == sorted(FILES)


@pytest.mark.parametrize("package", ONLY)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    importers = {
        module
        for module in FILES
        if any(name.split(".")[0] == package and not unseen for name, unseen in imports_of(module))
    }
    assert importers, f"nothing imports {package}: take it from the table"
    assert not {module for module in importers if not is_within(module, ONLY[package])}


@pytest.mark.parametrize("module", NO_TORCH)
def test_what_needs_no_torch_names_it_for_type_checkers_only(module: str) -> None:
    assert not [name for name, unseen in imports_of(module) if "torch" in name and not unseen]


@pytest.mark.parametrize("room", [room for room in LEVEL_OF if room not in ("ground", "program")])
def test_a_package_is_empty_but_for_a_docstring(room: str) -> None:
    tree = ast.parse((FOLDER / room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert len(tree.body) == 1

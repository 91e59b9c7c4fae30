"""Imports run one way: errors, files ← text; ← tensors; both ← models; all ← commands ← program."""

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

# Every module stands here once: a new file is given its layer by adding it.
LAYERS: dict[str, tuple[str, ...]] = {
    "ground": ("errors", "files", "hub", "settings", "versions"),
    "text": (
        *(
            "answers",
            "asking",
            "bertscore",
            "boundaries",
            "corpus_metrics",
            "corpus_values",
            "endpoint",
            "example_metrics",
            "judging",
            "knee",
        ),
        *("metrics", "panel", "plots", "prompts", "records", "score_table", "score_texts"),
        *("scoring", "segmentation", "significance", "sufficient"),
        *("recipes", "recipes.articles", "recipes.compression", "recipes.decoding"),
        *("recipes.dialogues", "recipes.filters", "recipes.hubdata", "recipes.jstage"),
        *("recipes.latex", "recipes.mimic", "recipes.news", "recipes.parquet"),
        *("recipes.questions", "recipes.request", "recipes.rows", "recipes.samples"),
        *("recipes.scitldr", "recipes.sources", "recipes.tables", "recipes.translations"),
        *("recipes.wikilingua", "recipes.xmltrees", "recipes.microworld"),
        *("recipes.microworld_documents", "recipes.microworld_probes"),
        *("recipes.microworld_tasks", "recipes.microworld_words"),
    ),
    "tensors": (
        *("adapter", "adapterfile", "foreign", "header", "inspection", "layers", "merging"),
        *("model_choice", "peft_config", "peft_keys", "portable", "pruning", "refit", "static"),
        *("static_merge", "stripping", "taskvectors", "tensorfile"),
    ),
    "models": (
        *("adaptive", "attention", "batch_loss", "batching", "calibration", "checkpoint"),
        *("cross_entropy", "devices", "lowrank"),
        *("embedding", "encoding", "fitting", "importance", "joint", "lorahub", "pruners"),
        *("search", "selection"),
        *("forward", "generation", "lora", "model", "packing", "predictions", "training"),
        *("boundary", "drafts", "gates", "lens", "pool", "slots"),
    ),
    "commands": (
        "option_types",
        *("options", "progress", "commands", "commands.build_dataset", "commands.generate"),
        *("commands.find_boundary", "commands.inspect", "commands.judge", "commands.merge"),
        *("commands.methods", "commands.opening", "commands.score", "commands.strip_layers"),
        "commands.systems",
        "commands.train_adapter",
    ),
    "program": ("cli", "__main__"),
}
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "ground": ("ground",),
    "text": ("ground", "text"),
    "tensors": ("ground", "tensors"),
    "models": ("ground", "text", "tensors", "models"),
    "commands": ("ground", "text", "tensors", "models", "commands"),
    "program": ("ground", "commands", "program"),
}
LAYER_OF = {module: layer for layer, modules in LAYERS.items() for module in modules}

# Packages that only some modules may import, wherever in the file.
ONLY: dict[str, tuple[str, ...]] = {
    "transformers": ("attention", "model"),
    "peft": ("model",),
    "accelerate": ("batch_loss", "joint", "training"),
    "matplotlib": ("plots",),
    "huggingface_hub": ("hub", "model", "recipes.hubdata"),
    "lxml": ("recipes.news",),
    "pyarrow": ("recipes.parquet",),
    "pylatexenc": ("recipes.latex",),
    "trafilatura": ("recipes.news",),
    "zstandard": ("recipes.compression",),
    "torch": (*LAYERS["models"], "pruning"),
    "numpy": (
        *("bertscore", "corpus_values", "significance", "sufficient"),
        *LAYERS["tensors"],
        *LAYERS["models"],
    ),
    "click": (*LAYERS["commands"], "cli"),
    "rich": ("progress", "score_table", "inspection"),
    "jsonlines": ("records",),
}


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


def test_every_module_has_its_layer_and_every_entry_its_module() -> None:
    assert sorted(LAYER_OF) == sorted(FILES)
    assert sum(map(len, LAYERS.values())) == len(LAYER_OF), "a module stands in two layers"


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_the_layers_below_it(module: str) -> None:
    allowed = MAY_IMPORT[LAYER_OF[module]]
    above = {name for name in own_imports(module) if LAYER_OF.get(name) not in allowed}
    assert not above


def test_no_two_modules_import_each_other_even_round_about() -> None:
    graph = {module: own_imports(module) for module in FILES}
    assert sorted(graphlib.TopologicalSorter(graph).static_order()) == sorted(FILES)


@pytest.mark.parametrize("package", ONLY)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    importers = {
        module
        for module in FILES
        if any(name.split(".")[0] == package for name, _ in imports_of(module))
    }
    assert importers, f"nothing imports {package}: take it from the table"
    assert importers <= set(ONLY[package])


def test_pruning_names_torch_for_type_checkers_only() -> None:
    of_torch = [unseen for name, unseen in imports_of("pruning") if name.startswith("torch")]
    assert of_torch
    assert all(of_torch)

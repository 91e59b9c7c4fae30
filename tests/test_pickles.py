"""SECURITY.md's promise on pickles: which lines of lorakit read one, and by what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lorakit

FOLDER = Path(lorakit.__file__).parent
MODULES = {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*.py"))}
# What builds objects from a pickle, or from what may hold one.
READERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "marshal.loads"),
    *("torch.load", "torch.jit.load", "torch.hub.load_state_dict_from_url"),
    *("np.load", "numpy.load", "joblib.load", "shelve.open", "dill.load", "cloudpickle.load"),
}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield module, node


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Yield the calls of functions whose full name ends so."""
    for module, node in nodes():
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(name):
            yield module, node


def option(call: ast.Call, name: str) -> object:
    """Return the constant that a call passes by a keyword, None where it passes none."""
    values = {word.arg: word.value for word in call.keywords}
    value = values.get(name)
    return value.value if isinstance(value, ast.Constant) else None


def test_pickles_are_read_in_two_places_alone() -> None:
    readers = {
        (module, ast.unparse(node))
        for module, node in nodes()
        if isinstance(node, ast.Attribute) and ast.unparse(node) in READERS
    }
    assert readers == {
        ("models/pickles.py", "torch.load"),
        ("recipes/wikilingua.py", "pickle._Unpickler"),
    }


def test_no_reader_of_pickles_comes_in_under_a_name_of_its_own() -> None:
    names = {
        (module, f"{node.module}.{name.name}")
        for module, node in nodes()
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert not {(module, name) for module, name in names if name in READERS}


def test_adapters_are_unpickled_by_convert_alone_and_as_weights_only() -> None:
    loads = list(calls("torch.load"))
    assert [option(call, "weights_only") for _, call in loads] == [True]
    assert {module for module, _ in calls("load_pickled_adapter")} == {"commands/convert.py"}


def test_models_are_loaded_from_safetensors_alone() -> None:
    loads = [
        (module, option(call, "use_safetensors"))
        for name in ("Model.from_pretrained", "CausalLM.from_pretrained")
        for module, call in calls(name)
    ]
    assert {module for module, _ in loads} == {"models/loading.py", "models/text_encoder.py"}
    assert {safe for _, safe in loads} == {True}


def test_security_md_says_so() -> None:
    text = " ".join((FOLDER.parent / "SECURITY.md").read_text(encoding="utf-8").split())
    promise = (
        "`lorakit convert` alone reads an `adapter_model.bin`, by `torch.load(weights_only=True)`"
    )
    assert promise in text
    assert "the only way in for pickles of adapters and models" in text

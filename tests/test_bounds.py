"""What is no honest data ends within SECURITY.md's bounds of time and memory, or is refused."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.safetensors import write_tensors
from lorakit.adapters.tensors import Tensor
from tests.support.bounds import measured

SECONDS, MEMORY = 10, 10**9
Build = Callable[[], bytes]
A = "base_model.model.{}.lora_A.weight"
B = "base_model.model.{}.lora_B.weight"


def safetensors(header: str, body: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header.encode() + body


def adapter(modules: list[str], **fields: Any) -> bytes:
    """Return an adapter of rank 1 on these modules."""
    one = Tensor.from_array(np.ones((1, 1), np.float32))
    tensors = {name.format(module): one for module in modules for name in (A, B)}
    config = {"peft_type": "LORA", "r": 1, "target_modules": ["q"], **fields}
    stream = io.BytesIO()
    write_tensors(tensors, {"adapter_config": json.dumps(config)}, stream)
    return stream.getvalue()


def named(count: int) -> list[str]:
    return [f"model.layers.{n // 100}.experts.{n % 100}.q" for n in range(count)]


def shaped(shape: str) -> bytes:
    return safetensors(
        f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,4]}}}}', bytes(4)
    )


ADAPTERS: dict[str, tuple[Build, str]] = {
    "a million dimensions": (lambda: shaped(",".join(["9"] * 1_000_000)), "1000000 dimensions"),
    "dimensions of many digits": (lambda: shaped(",".join(["9" * 4000] * 9)), "not natural"),
    "a header of 90 MB": (lambda: safetensors("[" + "[]," * 30_000_000 + "0]"), "its first 8"),
    "a header of empty lists": (
        lambda: safetensors('{"a":[' + "[]," * 5_000_000 + "0]}"),
        "lacks dtype",
    ),
    "a header of many tensors": (
        lambda: safetensors("{" + ",".join(f'"{n}":{{}}' for n in range(1_000_000)) + "}"),
        "lacks dtype",
    ),
    "a deep header": (lambda: safetensors("[" * 10_000_000), "nested too deeply"),
    "a name of 5,000 digits": (lambda: adapter([f"layers.{'9' * 5000}.q"]), "characters, which no"),
    "nested repeats in target_modules": (
        lambda: adapter(["a" * 60 + "b.q"], target_modules="(a+)+$"),
        "not targeted",
    ),
    "nested repeats in rank_pattern": (
        lambda: adapter(["a" * 60 + "b.q"], rank_pattern={"(a+)+$": 2}),
        "",
    ),
    "nested repeats in layers_pattern": (
        lambda: adapter(["a" * 60 + ".1.q"], layers_pattern="((a+)+)+b", layers_to_transform=[1]),
        "not targeted",
    ),
    "nested repeats in exclude_modules": (
        lambda: adapter(["a" * 60 + "b.q"], exclude_modules="(a|a)*$"),
        "",
    ),
    "a repeat of a repeat": (
        lambda: adapter(["q"], target_modules="(((a{99}){99}){99}){99}"),
        "cannot match",
    ),
    "3,000 modules and patterns": (
        lambda: adapter(named(3000), rank_pattern=dict.fromkeys(named(3000), 1)),
        "",
    ),
    "3,000 modules and names": (lambda: adapter(named(3000), target_modules=named(3000)), ""),
    "3,000 modules and expressions": (
        lambda: adapter(named(3000), rank_pattern={f"{name}()": 1 for name in named(3000)}),
        "cannot match",
    ),
    "3,000 modules and 900 expressions": (
        lambda: adapter(named(3000), rank_pattern={f"x.*{name}": 1 for name in named(900)}),
        "cannot match",
    ),
    "a long expression": (
        lambda: adapter(["q"], target_modules="(a|b)" * 1_000_000),
        "cannot match",
    ),
}


def check(folder: Path, name: str, content: bytes, message: str, *command: str) -> None:
    (folder / name).write_bytes(content)
    run = measured(*command, name, cwd=folder)
    assert run.code == (1 if message else 0), run.stderr
    assert "Traceback" not in run.stderr
    if message:
        assert message in run.stderr
        assert run.stderr.count("\n") == 1
        assert run.stderr.startswith("Error: ")
    assert run.seconds < SECONDS
    assert run.memory < MEMORY


@pytest.mark.parametrize(("build", "message"), ADAPTERS.values(), ids=ADAPTERS.keys())
def test_an_adapter_that_is_a_bomb_ends_within_bounds(
    tmp_path: Path, build: Build, message: str
) -> None:
    check(tmp_path, "a.safetensors", build(), message, "inspect", "--format", "json")


DOCUMENTS: dict[str, tuple[str, str, Build, str]] = {
    "a pickle with a far memo": (
        "wikilingua",
        "a.pkl",
        lambda: b"\x80\x03Nr\xff\xff\xff\xff.",
        "not a dict by texts",
    ),
    "a pickle that claims a long text": (
        "wikilingua",
        "a.pkl",
        lambda: b"\x80\x04\x8d" + (1 << 32).to_bytes(8, "little") + b"a.",
        "claims a text of more than 16 MiB",
    ),
    "a pickle that claims a long frame": (
        "wikilingua",
        "a.pkl",
        lambda: b"\x80\x04\x95" + (1 << 32).to_bytes(8, "little") + b"a.",
        "claims a text of more than 16 MiB",
    ),
    "a pickle of empty dicts": (
        "wikilingua",
        "a.pkl",
        lambda: b"\x80\x04" + b"}\x94" * 20_000_000 + b".",
        "more than 8000000 operations",
    ),
    "a pickle of one text many times": (
        "wikilingua",
        "a.pkl",
        lambda: pickle.dumps({"u": {"s": {"document": ["a" * 100_000] * 1_000_000}}}, protocol=4),
        "more than 16 Mi characters",
    ),
    "5 million empty elements": (
        "jstage",
        "a.xml",
        lambda: b"<article>" + b"<a/>" * 5_000_000 + b"</article>",
        "more than 16 MiB",
    ),
    "references to characters": (
        "jstage",
        "a.xml",
        lambda: b"<article><p>" + b"a&amp;" * 3_000_000 + b"</p></article>",
        "gave no records",
    ),
    "hskip and spaces": (
        "latex",
        "a.tex",
        lambda: tex("\\hskip" + " " * 200_000 + "x"),
        "gave no records",
    ),
    "many hskips": ("latex", "a.tex", lambda: tex("\\hskip " * 30_000 + "x"), ""),
    "a newcommand and spaces": (
        "latex",
        "a.tex",
        lambda: b"\\newcommand" + b" " * 1_000_000 + tex("x"),
        "",
    ),
    "options that do not close": (
        "latex",
        "a.tex",
        lambda: b"\\newcommand\\a[" * 100_000 + tex("x"),
        "",
    ),
    "definitions that do not close": (
        "latex",
        "a.tex",
        lambda: tex("x") + b"\\newcommand{\\a}{" * 100_000,
        "",
    ),
    "definitions within definitions": (
        "latex",
        "a.tex",
        lambda: b"\\newcommand{\\a}{" * 50_000 + b"}" * 50_000 + tex("x"),
        "macros of more than 4 Mi",
    ),
    "environments that do not close": (
        "latex",
        "a.tex",
        lambda: tex("x").replace(b"\\abstract{y}", b"\\begin{abstract}" * 200_000),
        "gave no records",
    ),
    "arguments that do not close": (
        "latex",
        "a.tex",
        lambda: b"\\newcommand{\\m}[1]{#1}" + tex("\\m[" * 50_000 + "x"),
        "",
    ),
    "an argument many times": (
        "latex",
        "a.tex",
        lambda: b"\\newcommand{\\m}[1]{" + b"#1" * 100_000 + b"}" + tex(f"\\m{{{'x' * 100_000}}}"),
        "grow without end",
    ),
}


def tex(title: str) -> bytes:
    return f"\\title{{{title}}}\\abstract{{y}}".encode()


@pytest.mark.parametrize(
    ("recipe", "name", "build", "message"), DOCUMENTS.values(), ids=DOCUMENTS.keys()
)
def test_a_document_that_is_a_bomb_ends_within_bounds(
    tmp_path: Path, recipe: str, name: str, build: Build, message: str
) -> None:
    options = ("build-dataset", recipe, "-q", "-o", "out.jsonl")
    check(tmp_path, name, build(), message, *options)

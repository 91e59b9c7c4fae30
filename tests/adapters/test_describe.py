"""`lorakit inspect`: its numbers are those of the dense ΔW."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.describe import inspect_adapter, write_table
from lorakit.adapters.history import Header
from lorakit.adapters.names import layer_of, lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.commands.inspect import inspect
from lorakit.errors import LorakitError
from tests.support.adapters import ROOT, run_python, tiny

Q, V = (f"model.layers.1.self_attn.{last}" for last in ("q_proj", "v_proj"))
HISTORY = [
    {
        "command": "merge",
        "versions": {"lorakit": "0.1.0"},
        "settings": {"prune_ratio": 0.1, "lr": 2e-4},
        "seed": 0,
        "parents": {"xs": "11" * 32},
        "data": "22" * 32,
    }
]
HEADER: Any = {
    "format": 1,
    "base": {"name": "tiny", "fingerprint": "33" * 32},
    "chat": "off",
    "blocks": [
        {"name": "xs", "sha256": "11" * 32, "modules": {Q: {"offset": 0, "rank": 2, "scale": 0.5}}},
        {
            "name": "wl",
            "sha256": "44" * 32,
            "modules": {
                Q: {"offset": 2, "rank": 1, "scale": 2.0},
                V: {"offset": 0, "rank": 3, "scale": 2.0},
            },
        },
    ],
    "history": HISTORY,
}


def merged() -> Adapter:
    """Return an adapter of rank 3 with two blocks and some zeros in it."""
    adapter = tiny(rank=3, lora_alpha=6)
    b = adapter.tensors[lora_name(Q, "B")].array().copy()
    b[0, :] = 0
    b[1, 0] = -0.0
    tensors = {**adapter.tensors, lora_name(Q, "B"): Tensor.from_array(b)}
    return replace(adapter, tensors=tensors, header=HEADER)


def run(*arguments: str, stdin: bytes | None = None) -> Any:
    return CliRunner().invoke(inspect, arguments, input=stdin, catch_exceptions=False)


def dense_norm(pairs: list[tuple[Any, Any]], scale: float) -> float:
    return float(np.sqrt(sum(np.linalg.norm(scale * (b @ a)) ** 2 for a, b in pairs)))


def test_norms_and_zeros_of_layers_are_those_of_the_dense_change() -> None:
    adapter = merged()
    record = inspect_adapter(adapter)
    modules = adapter.modules()
    assert record["norm"] == pytest.approx(dense_norm([(m.a, m.b) for m in modules], 2), rel=1e-6)
    for row in record["layers"]:
        pairs = [(m.a, m.b) for m in modules if m.layer == row["layer"]]
        assert row["norm"] == pytest.approx(dense_norm(pairs, 2), rel=1e-6)
        assert row["modules"] == len(pairs)
        assert row["parameters"] == sum(a.size + b.size for a, b in pairs)
        assert row["zeros"] == sum((x == 0).sum() for p in pairs for x in p) / row["parameters"]
    assert [row["layer"] for row in record["layers"]] == [0, 1]
    assert record["zeros"] == 4 / record["parameters"]


def test_norms_and_zeros_of_blocks_are_those_of_their_slices() -> None:
    adapter = merged()
    xs, wl = inspect_adapter(adapter)["blocks"]
    q, v = (m for m in adapter.modules() if m.layer == 1)
    assert xs["norm"] == pytest.approx(dense_norm([(q.a[:2], q.b[:, :2])], 2), rel=1e-6)
    pairs = [(q.a[2:], q.b[:, 2:]), (v.a, v.b)]
    assert wl["norm"] == pytest.approx(dense_norm(pairs, 2), rel=1e-6)
    assert (xs["parameters"], wl["parameters"]) == (16, 8 + 24)
    assert (xs["zeros"], wl["zeros"]) == (3 / 16, 1 / 32)
    assert (xs["rank"], wl["rank"], wl["scale"]) == ([2], [1, 3], [2.0])


def test_the_share_reset_is_shown_where_the_header_has_it() -> None:
    first, second = HEADER["blocks"]
    tables = {}
    for name, blocks in {
        "none": [first, second],
        "one": [{**first, "reset": 0.25}, second],
    }.items():
        header: Any = {**HEADER, "blocks": blocks}
        adapter = replace(merged(), header=header)
        rows = inspect_adapter(adapter)["blocks"]
        assert [row.get("reset") for row in rows] == [block.get("reset") for block in blocks]
        stream = io.StringIO()
        write_table(inspect_adapter(adapter), stream)
        tables[name] = stream.getvalue()
    assert "reset" not in tables["none"]
    assert "25.00%" in tables["one"].split("reset")[1]


def test_a_merge_of_one_block_is_the_whole() -> None:
    adapter = tiny()
    parts: Any = {m.name: {"offset": 0, "rank": m.rank, "scale": 1.0} for m in adapter.modules()}
    record = inspect_adapter(replace(adapter, header={"blocks": [{"name": "x", "modules": parts}]}))
    block = record["blocks"][0]
    assert block["norm"] == pytest.approx(record["norm"], rel=1e-12)
    assert all(block[key] == record[key] for key in ("modules", "parameters", "zeros"))


def test_the_config_is_told_in_short() -> None:
    adapter = tiny(rank=4, dtype="BF16", use_rslora=True, alpha_pattern={"v_proj": 8})
    record = inspect_adapter(adapter)
    assert record["rank"] == [4]
    assert record["alpha"] == [4, 8]
    assert record["scale"] == [2, 4]
    assert record["dtype"] == ["BF16"]
    assert record["target_modules"] == ["q_proj", "v_proj"]
    assert record["sha256"] == adapter.sha256
    assert record["blocks"] == []
    assert record["history"] == []


def test_the_base_is_the_headers_or_else_the_configs() -> None:
    adapter = tiny(base_model_name_or_path="gpt2")
    assert inspect_adapter(adapter)["base"] == "gpt2"
    header: Header = {"base": {"name": "tiny"}}
    assert inspect_adapter(replace(adapter, header=header))["base"] == "tiny"


def test_modules_outside_the_layers_come_last() -> None:
    adapter = tiny(target_modules=["q_proj", "v_proj", "lm_head"])
    head = {
        lora_name("lm_head", factor): Tensor.from_array(np.ones((2, 2))) for factor in ("A", "B")
    }
    record = inspect_adapter(replace(adapter, tensors={**adapter.tensors, **head}))
    assert [row["layer"] for row in record["layers"]] == [0, 1, None]


LAYERS = {
    "model.layers.3.self_attn.q_proj": 3,
    "transformer.h.11.attn.c_attn": 11,
    "model.decoder.layers.0.fc1": 0,
    "model.layers.2.mlp.experts.7.w1": 2,
    "layers.4.q_proj": 4,
    "blocks.0.to_out.1": 0,
    "mlp.0": None,
    "0": None,
    "lin0": None,
    "lm_head": None,
    "model.layers1.q_proj": None,
}


@pytest.mark.parametrize(("module", "layer"), LAYERS.items())
def test_the_layer_is_the_first_number_among_the_parts(module: str, layer: int | None) -> None:
    assert layer_of(module) == layer


def test_json_is_one_object_on_one_line(tmp_path: Path) -> None:
    save_adapter(merged(), str(tmp_path / "x.safetensors"))
    done = run(str(tmp_path / "x.safetensors"))
    assert done.exit_code == 0
    assert done.output.count("\n") == 1
    record: Mapping[str, Any] = json.loads(done.output)
    assert record == {**inspect_adapter(merged()), "adapter": str(tmp_path / "x.safetensors")}
    assert record["history"] == HISTORY


def test_an_adapter_may_come_from_a_pipe(tmp_path: Path) -> None:
    save_adapter(merged(), str(tmp_path / "x.safetensors"))
    done = run("-", stdin=(tmp_path / "x.safetensors").read_bytes())
    assert json.loads(done.output) == {**inspect_adapter(merged()), "adapter": "stdin"}


def test_the_table_shows_layers_blocks_and_history(tmp_path: Path) -> None:
    save_adapter(merged(), str(tmp_path / "x.safetensors"))
    text = run(str(tmp_path / "x.safetensors"), "--format", "table").output
    rows = [line.split() for line in text.splitlines()]
    assert ["rank", "3"] in rows
    assert ["0", "2", "48"] in [row[:3] for row in rows]
    assert ["xs", "2", "0.5", "1", "16"] in [row[:5] for row in rows]
    assert "1. merge (lorakit 0.1.0)" in text
    assert "lr=0.0002, prune_ratio=0.1" in text


def test_a_table_of_a_header_with_nothing_in_it_is_drawn() -> None:
    stream = io.StringIO()
    header: Any = {"blocks": [None, {}], "history": [None, {"seed": 1}]}
    write_table(inspect_adapter(replace(tiny(), header=header)), stream)
    assert "seed: 1" in stream.getvalue()


def test_names_cannot_steer_the_terminal() -> None:
    stream = io.StringIO()
    header: Header = {"blocks": [{"name": "\x1b[2J"}], "history": [{"command": "\x1b[2J"}]}
    adapter = replace(tiny(), header=header, name="\x1b[2J[bold]")
    write_table(inspect_adapter(adapter), stream)
    assert "\x1b" not in stream.getvalue()
    assert "[bold]" in stream.getvalue()


SCRIPT = "from lorakit.commands.inspect import inspect; inspect()"


def test_a_terminal_gets_tables_and_a_pipe_json(tmp_path: Path) -> None:
    save_adapter(merged(), str(tmp_path / "x.safetensors"))
    piped = run_python(SCRIPT, str(tmp_path / "x.safetensors")).stdout
    assert json.loads(piped)["rank"] == [3]
    outer, inner = pty.openpty()
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "x.safetensors")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, stdout=inner, env=environment)
    os.close(inner)
    shown = b""
    try:
        while part := os.read(outer, 4096):
            shown += part
    except OSError:  # how a terminal says that the other side has closed
        pass
    os.close(outer)
    assert process.wait() == 0
    assert b"layer" in shown
    assert not shown.startswith(b"{")


def test_a_bad_adapter_is_one_line_on_stderr(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(LorakitError, match="is empty"):
        run(str(tmp_path / "x"))
    script = "from lorakit.cli import main; main()"
    done = run_python(script, "inspect", str(tmp_path / "x"))
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.decode() == f"Error: {tmp_path / 'x'} is empty; check what wrote it\n"


def test_inspecting_imports_no_torch(tmp_path: Path) -> None:
    save_adapter(merged(), str(tmp_path / "x.safetensors"))
    heavy = "import sys; print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    whole = (
        "from lorakit.adapters.storage import load_adapter, save_adapter\n"
        "from lorakit.adapters.describe import inspect_adapter\n"
        f"inspect_adapter(load_adapter({str(tmp_path / 'x.safetensors')!r}))\n"
    )
    assert run_python(whole + heavy).stdout == b"[]\n"
    alone = "import lorakit.commands.inspect, sys; print('numpy' in sys.modules)"
    assert run_python(alone).stdout == b"False\n"

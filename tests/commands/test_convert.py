from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import CONFIG_FILE, TENSOR_FILE, load_adapter, save_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.support.adapters import tiny
from tests.support.peft_models import KINDS, logits, random_model, with_lora
from tests.support.program import run

BIN = "adapter_model.bin"


def convert(source: str | Path, output: str | Path) -> Result:
    return CliRunner().invoke(
        lorakit, ["convert", str(source), "-o", str(output)], catch_exceptions=False
    )


@pytest.mark.parametrize("length", [0x10280, 0x10380, 0x10480])  # bytes, more than are needed
def test_a_header_length_that_reads_as_a_pickle_s_first_bytes_is_none(
    length: int, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(tiny(), str(path))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(length.to_bytes(8, "little") + content[8:end].ljust(length) + content[end:])
    assert convert(path, tmp_path / "y.safetensors").exit_code == 0
    assert load_adapter(str(tmp_path / "y.safetensors")).sha256 == load_adapter(str(path)).sha256


def test_a_single_file_becomes_a_folder_and_the_same_file_again(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_adapter(tiny(dtype="BF16"), str(one))
    assert convert(one, tmp_path / "folder").exit_code == 0
    assert convert(tmp_path / "folder", two).stderr == f"Note: wrote {two}\n"
    assert (tmp_path / "folder" / TENSOR_FILE).read_bytes() == one.read_bytes()
    assert two.read_bytes() == one.read_bytes()


def test_a_header_stays_as_it_is(tmp_path: Path) -> None:
    adapter = tiny()
    header: Any = {"format": 1, "chat": "on", "history": [{"command": "x"}], "mine": [1, None]}
    path = tmp_path / "a.safetensors"
    save_adapter(Adapter(adapter.tensors, adapter.config, header), str(path))
    convert(path, tmp_path / "folder/")
    assert load_adapter(str(tmp_path / "folder")).header == header


def test_a_pipe_is_read_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(tiny(), str(path))
    done = convert(path, "-")
    assert done.stdout_bytes == path.read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(done.stdout_bytes)))
    piped = CliRunner().invoke(
        lorakit, ["convert", "-", "-o", str(tmp_path / "b")], input=done.stdout_bytes
    )
    assert piped.exit_code == 0
    assert (tmp_path / "b" / TENSOR_FILE).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("kind", ["plain", "rslora", "rank pattern", "layers", "conv1d"])
def test_a_converted_folder_loads_in_peft_without_a_warning(kind: str, tmp_path: Path) -> None:
    import peft

    family, config = KINDS[kind]
    model = with_lora(random_model(family), config)
    model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    convert(tmp_path / "theirs", tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "folder")
    again = peft.PeftModel.from_pretrained(random_model(family), str(tmp_path / "folder")).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_pickle_becomes_safetensors_byte_for_byte(dtype: torch.dtype, tmp_path: Path) -> None:
    model = with_lora(random_model("llama"), KINDS["plain"][1]).to(dtype)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    whole = load_adapter(str(tmp_path))
    from safetensors.torch import load_file

    torch.save(load_file(tmp_path / TENSOR_FILE), tmp_path / BIN)
    (tmp_path / TENSOR_FILE).unlink()
    with pytest.raises(LorakitError, match=f"holds only the pickle {BIN}"):
        load_adapter(str(tmp_path))
    assert convert(tmp_path, tmp_path).exit_code == 0
    assert load_adapter(str(tmp_path)).sha256 == whole.sha256
    assert convert(tmp_path / BIN, tmp_path / "x.safetensors").exit_code == 0
    assert load_adapter(str(tmp_path / "x.safetensors")).sha256 == whole.sha256


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


PICKLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "code": (lambda folder: Evil(folder / "ran"), "is no pickle of tensors alone"),
    "no names": (lambda folder: [torch.zeros(2)], "holds no tensors by name"),
    "no tensor": (lambda folder: {"a": 1}, "tensor 'a' is no dense tensor"),
    "integers": (lambda folder: {"a": torch.zeros(2, dtype=torch.int64)}, "is torch.int64"),
    "another model": (lambda folder: {"a": torch.zeros(2)}, "tensor 'a' is no part of a LoRA"),
}


@pytest.mark.parametrize(("content", "message"), PICKLES.values(), ids=PICKLES.keys())
def test_a_pickle_of_anything_else_is_refused_in_one_line(
    content: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    save_adapter(tiny(), str(tmp_path))
    (tmp_path / TENSOR_FILE).unlink()
    value = content(tmp_path)
    if isinstance(value, Evil):
        (tmp_path / BIN).write_bytes(pickle.dumps(value))
    else:
        torch.save(value, tmp_path / BIN)
    done = run("convert", str(tmp_path), "-o", str(tmp_path / "x.safetensors"))
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "x.safetensors").exists()


def test_a_pickle_without_a_config_beside_it_is_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / BIN)
    with pytest.raises(LorakitError, match=f"has no config; put PEFT's {CONFIG_FILE} beside it"):
        convert(tmp_path / BIN, tmp_path / "x.safetensors")


def test_a_pickle_in_the_hubs_cache_is_converted(tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("a" * 40)
    model = with_lora(random_model("llama"), KINDS["plain"][1])
    model.save_pretrained(snapshot, save_embedding_layers=False)
    whole = load_adapter(str(snapshot))
    from safetensors.torch import load_file

    torch.save(load_file(snapshot / TENSOR_FILE), snapshot / BIN)
    (snapshot / TENSOR_FILE).unlink()
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    from tests.support.adapters import run_python

    script = "import sys; from lorakit.cli import main; sys.argv[0] = 'lorakit'; main()"
    output = str(tmp_path / "x.safetensors")
    done = run_python(script, "convert", "hf://owner/name", "-o", output, HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert load_adapter(output).sha256 == whole.sha256

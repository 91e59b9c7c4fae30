"""safetensors bytes: its own reader and writer and torch's rounding are the oracles."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.adapters import tensors as module
from lorakit.adapters.safetensors import read_tensors, write_tensors
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError

quick = settings(deadline=None, max_examples=60)
TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    stream = io.BytesIO()
    write_tensors(tensors, metadata or {}, stream)
    return stream.getvalue()


def raw(header: str | bytes, body: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + body


def entry(shape: Any = (1,), offsets: Any = (0, 4), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@st.composite
def tensor(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(TORCH)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    size = int(np.prod(shape)) * (4 if dtype == "F32" else 2)
    return Tensor(dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


texts = st.text('ab.é日"\\ \n\x00', max_size=8)
files = st.builds(
    to_bytes,
    st.dictionaries(texts, tensor(), max_size=4),
    st.dictionaries(texts, texts, max_size=3),
)


@quick
@given(files)
def test_a_file_read_and_written_again_has_the_same_bytes(data: bytes) -> None:
    tensors, metadata = read_tensors(data, "x")
    assert to_bytes(tensors, metadata) == data


@quick
@given(files)
def test_safetensors_reads_what_is_written(data: bytes) -> None:
    ours = read_tensors(data, "x")[0]
    theirs = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    assert {
        name: (found["dtype"], tuple(found["shape"]), bytes(found["data"]))
        for name, found in theirs.items()
    } == {name: (t.dtype, t.shape, bytes(t.data)) for name, t in ours.items()}


@pytest.mark.parametrize("dtype", TORCH)
def test_values_of_a_file_of_safetensors_are_torchs(dtype: str, tmp_path: Path) -> None:
    values = torch.randn(3, 5).to(TORCH[dtype])
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"x": values}, path, {"format": "pt"})
    tensors, metadata = read_tensors(path, "x")
    assert metadata == {"format": "pt"}
    assert tensors["x"].dtype == dtype
    assert np.array_equal(tensors["x"].array(), values.to(torch.float32).numpy())


def test_metadata_comes_back_through_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(to_bytes({"x": Tensor.from_array(np.ones(2))}, {"b": "é\n", "a": '"'}))
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"b": "é\n", "a": '"'}


@quick
@given(st.lists(st.floats(width=32, allow_nan=False), max_size=20), st.sampled_from(sorted(TORCH)))
def test_rounding_is_torchs(values: list[float], dtype: str) -> None:
    ours = Tensor.from_array(np.array(values, np.float32), dtype)
    theirs = torch.tensor(values, dtype=torch.float32).to(TORCH[dtype])
    assert bytes(ours.data) == theirs.view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", TORCH)
def test_every_half_precision_value_survives_widening_and_rounding(dtype: str) -> None:
    bits = np.arange(1 << 16, dtype="<u2")
    if dtype == "F32":
        bits = bits.view("<f4")
    shape = (len(bits),)
    whole = Tensor(dtype, shape, memoryview(bits.tobytes()))
    finite = np.isfinite(whole.array())
    again = Tensor.from_array(whole.array(), dtype)
    kind = "<f4" if dtype == "F32" else "<u2"
    before, after = (np.frombuffer(t.data, kind)[finite] for t in (whole, again))
    assert np.array_equal(before, after)


@pytest.mark.parametrize("dtype", TORCH)
def test_a_nan_stays_a_nan_and_is_found(dtype: str) -> None:
    values = np.array([1, np.nan], np.float32)
    assert np.isnan(Tensor.from_array(values, dtype).array()[1])
    assert not Tensor.from_array(values, dtype).finite_sha256()
    assert not Tensor.from_array(np.array([np.inf]), dtype).finite_sha256()
    one = Tensor.from_array(np.array([1.0]), dtype)
    assert one.finite_sha256() == hashlib.sha256(one.data).hexdigest()


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 30])
def test_pieces_are_the_whole_in_order_and_so_is_their_hash(
    dtype: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PIECE", 16)
    values = np.arange(1, count + 1, dtype=np.float32)
    made = {"a": Tensor.from_array(values, dtype), "b": Tensor.from_array(values[:3], dtype)}
    with open(tmp_path / "x", "wb") as stream:
        write_tensors(made, {}, stream)
    (read, _) = read_tensors(tmp_path / "x", "x")
    for name, tensor in made.items():
        assert b"".join(read[name].pieces()) == bytes(tensor.data)
        assert read[name].finite_sha256() == hashlib.sha256(tensor.data).hexdigest()
        assert read[name] == tensor
    values[-1:] = np.nan
    assert (Tensor.from_array(values, dtype).finite_sha256() is None) == (count > 0)


def test_zeros_of_either_sign_count_as_zeros() -> None:
    assert Tensor.from_array(np.array([0.0, -0.0, 1e-40])).zeros() == 2


def test_float32_is_not_copied_and_cannot_be_written_to() -> None:
    tensor = Tensor.from_array(np.ones((2, 2)))
    values = tensor.array()
    assert np.shares_memory(values, np.frombuffer(tensor.data, np.uint8))
    assert not values.flags.writeable


def test_a_large_file_is_mapped_not_read(tmp_path: Path) -> None:
    size = 1 << 30
    header = json.dumps({"x": entry([size // 4], [0, size])})
    path = tmp_path / "large.safetensors"
    path.write_bytes(raw(header))
    with open(path, "r+b") as stream:
        stream.truncate(8 + len(header) + size)
    tracemalloc.start()
    tensors, _ = read_tensors(path, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert tensors["x"].array().shape == (size // 4,)
    assert peak < 1 << 20


def test_tensors_are_written_one_at_a_time_and_aligned() -> None:
    tensors = {
        "b": Tensor.from_array(np.ones(3), "BF16"),
        "a": Tensor.from_array(np.ones(3), "F16"),
        "c": Tensor.from_array(np.ones(3)),
    }
    data = to_bytes(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    header = json.loads(data[8:start])
    assert [header[name]["data_offsets"] for name in "cab"] == [[0, 12], [12, 18], [18, 24]]


@quick
@given(files, st.data())
def test_a_file_cut_anywhere_is_refused_in_one_line(data: bytes, choice: st.DataObject) -> None:
    cut = data[: choice.draw(st.integers(0, len(data) - 1))]
    with pytest.raises(LorakitError) as caught:
        read_tensors(cut, "x.safetensors")
    assert str(caught.value).startswith("x.safetensors ")


@quick
@given(files, st.data())
def test_a_changed_byte_never_raises_anything_else(data: bytes, choice: st.DataObject) -> None:
    changed = bytearray(data)
    place = choice.draw(st.integers(0, min(len(data), 200) - 1))
    changed[place] = choice.draw(st.integers(0, 255))
    with contextlib.suppress(LorakitError):
        read_tensors(bytes(changed), "x")


@quick
@given(st.binary(max_size=40) | st.builds(raw, st.binary(max_size=60), st.binary(max_size=8)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(LorakitError):
        read_tensors(data, "x")


@pytest.mark.parametrize("size", [0x0280, 0x0380, 0x0480, 0x0580, 0x207B])
def test_a_length_that_looks_like_a_magic_number_is_a_length(size: int) -> None:
    data = to_bytes({"x": Tensor.from_array(np.ones(1))}, {"pad": ""})
    length = int.from_bytes(data[:8], "little")
    padded = size.to_bytes(8, "little") + data[8 : 8 + length] + b" " * (size - length)
    assert list(read_tensors(padded + data[8 + length :], "x")[0]) == ["x"]


OTHER_FILES = {
    "empty": (b"", "is empty"),
    "zip": (b"PK\x03\x04rest", "is a pickle.*run: lorakit convert x.bin -o x.safetensors$"),
    "pickle": (b"\x80\x02}q\x00.", "is a pickle.*run: lorakit convert x.bin -o x.safetensors$"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"\n<!DOCTYPE html><html>", "is a web page"),
    "xml": (b"<?xml version='1.0'?>", "is a web page"),
    "json": (b'{"peft_type": "LORA"}', "is JSON"),
    "gguf": (b"GGUF\x03\x00\x00\x00\x00\x00", "is a GGUF file"),
    "text": (b"hello, this is text", "not a sound safetensors file"),
    "short": (b"\x10\x00", "only 2 bytes"),
}


@pytest.mark.parametrize(("data", "message"), OTHER_FILES.values(), ids=OTHER_FILES.keys())
def test_other_files_are_named_for_what_they_are(data: bytes, message: str) -> None:
    with pytest.raises(LorakitError, match=message) as caught:
        read_tensors(data, "x.bin")
    assert "\n" not in str(caught.value)


UNSOUND = {
    "not JSON": (raw("{x}"), "not JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "not an object": (raw('{"a": 1}'.replace("{", "[").replace("}", "]")), "safetensors"),
    "length too large": (b"\xff" * 7 + b"\x7f{", "no header length"),
    "nested too deeply": (raw('{"a":' + "[" * 100_000), "nested too deeply"),
    "number too long": (raw('{"a":' + "1" * 5000 + "}"), "not JSON"),
    "key twice": (raw('{"a": 1, "a": 2}'), "'a' stands in it twice"),
    "half a surrogate pair": (raw('{"\\ud800": 1}'), "not JSON"),
    "metadata not texts": (raw('{"__metadata__": {"a": 1}}'), "__metadata__"),
    "metadata a list": (raw('{"__metadata__": []}'), "__metadata__"),
    "entry a number": (raw('{"a": 1}'), "'a' lacks"),
    "entry without shape": (raw('{"a": {"dtype": "F32"}}'), "'a' lacks"),
    "unknown format": (raw(json.dumps({"a": entry(dtype="F4")}), b"1234"), "'a' is 'F4'"),
    "format not a text": (raw(json.dumps({"a": entry(dtype=3)}), b"1234"), "'a' is '3'"),
    "shape not a list": (raw(json.dumps({"a": entry(shape=1)}), b"1234"), "natural numbers"),
    "shape negative": (raw(json.dumps({"a": entry(shape=[-1])}), b"1234"), "natural numbers"),
    "shape of floats": (raw(json.dumps({"a": entry(shape=[1.0])}), b"1234"), "natural numbers"),
    "shape of booleans": (raw(json.dumps({"a": entry(shape=[True])}), b"1234"), "natural"),
    "three offsets": (raw(json.dumps({"a": entry(offsets=[0, 4, 4])}), b"1234"), "natural"),
    "offsets reversed": (raw(json.dumps({"a": entry(offsets=[4, 0])}), b"1234"), "disagree"),
    "shape too large": (raw(json.dumps({"a": entry(shape=[1 << 62, 4])}), b"1234"), "disagree"),
    "hole": (raw(json.dumps({"a": entry(offsets=[4, 8])}), b"12345678"), "does not follow"),
    "overlap": (
        raw(json.dumps({"a": entry(), "b": entry(offsets=[0, 4])}), b"12345678"),
        "does not follow",
    ),
    "cut short": (raw(json.dumps({"a": entry()}), b"123"), "3 bytes of tensors, 4 expected"),
    "too long": (raw(json.dumps({"a": entry()}), b"12345"), "1 bytes too many"),
}


@pytest.mark.parametrize(("data", "message"), UNSOUND.values(), ids=UNSOUND.keys())
def test_an_unsound_file_is_refused_in_one_line(data: bytes, message: str) -> None:
    with pytest.raises(LorakitError, match=message) as caught:
        read_tensors(data, "x.safetensors")
    assert "x.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    data = raw(json.dumps({"\x1b[2J": 1}))
    with pytest.raises(LorakitError) as caught:
        read_tensors(data, "x")
    assert str(caught.value).isprintable()


def test_a_format_numpy_cannot_compute_with_is_refused() -> None:
    with pytest.raises(LorakitError, match="F8_E4M3"):
        Tensor("F8_E4M3", (1,), memoryview(b"1")).array()
    with pytest.raises(LorakitError, match="I8"):
        Tensor.from_array(np.ones(1), "I8")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="cannot read x: no such file"):
        read_tensors(tmp_path / "x", "x")

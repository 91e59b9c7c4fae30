"""Adapter files: what is written is what was read, what cannot be kept is refused."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.blocks import BlockFields
from lorakit.adapters.safetensors import read_tensors
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from tests.support.adapters import run_python, save_tensors, tiny


def content(adapter: Adapter) -> dict[str, Any]:
    return {
        "config": json.loads(json.dumps(adapter.config, sort_keys=True)),
        "header": dict(adapter.header),
        "tensors": {k: (t.dtype, t.shape, bytes(t.data)) for k, t in adapter.tensors.items()},
    }


def test_file_folder_and_pipe_hold_the_same_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, single, folder = tiny(), tmp_path / "x.safetensors", tmp_path / "x"
    assert save_adapter(adapter, str(single)) == str(single)
    save_adapter(adapter, f"{folder}/")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(single.read_bytes())))
    sources = [str(single), str(folder), str(folder / "adapter_model.safetensors"), "-"]
    for loaded in map(load_adapter, sources):
        assert content(loaded) == {**content(adapter), "config": content(loaded)["config"]}
        assert loaded.sha256 == adapter.sha256
    assert (folder / "adapter_model.safetensors").read_bytes() == single.read_bytes()


def test_a_file_written_again_has_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_adapter(tiny(), str(one))
    save_adapter(load_adapter(str(one)), str(two))
    assert one.read_bytes() == two.read_bytes()


def test_an_adapter_can_replace_the_file_it_was_read_from(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_adapter(tiny(), str(path))
    before = path.read_bytes()
    save_adapter(load_adapter(str(path)), str(path))
    assert path.read_bytes() == before


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path: Path) -> None:
    script = """
        import sys
        from lorakit.adapters.adapter import Adapter
        from lorakit.adapters.storage import load_adapter, save_adapter
        adapter = load_adapter(sys.argv[1])
        config = {**adapter.config, "target_modules": {"v_proj", "q_proj", "k_proj", "o_proj"}}
        save_adapter(Adapter(adapter.tensors, config, adapter.header), "-")
    """
    save_adapter(tiny(), str(tmp_path / "x.safetensors"))
    found = {
        run_python(script, str(tmp_path / "x.safetensors"), PYTHONHASHSEED=seed).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_the_hash_is_of_the_numbers_not_of_their_order_or_header() -> None:
    adapter = tiny()
    turned = Adapter(dict(reversed(list(adapter.tensors.items()))), adapter.config, {}, "other")
    assert turned.sha256 == adapter.sha256
    assert tiny(lora_alpha=5).sha256 != adapter.sha256
    assert tiny(dtype="BF16").sha256 != adapter.sha256
    one, *_ = adapter.tensors
    changed = {**adapter.tensors, one: Tensor.from_array(np.zeros((2, 4)))}
    assert Adapter(changed, adapter.config).sha256 != adapter.sha256


def test_modules_come_by_layer_then_name_in_number_order() -> None:
    names = [module.name for module in tiny(layers=11).modules()]
    assert [int(name.split(".")[2]) for name in names] == sorted(2 * list(range(11)))
    assert names[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert [module.layer for module in tiny(layers=11).modules()][-1] == 10


def test_metadata_is_pefts_config_and_lorakits_header(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path / "x.safetensors"))
    metadata = read_tensors(tmp_path / "x.safetensors", "x")[1]
    assert metadata["format"] == "pt"
    assert json.loads(metadata["adapter_config"])["target_modules"] == ["q_proj", "v_proj"]
    assert json.loads(metadata["lorakit"]) == {"format": 1, "chat": "off"}


def test_binary_never_goes_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(LorakitError, match="terminal"):
        save_adapter(tiny(), "-")


def test_a_device_is_written_to_and_not_replaced() -> None:
    save_adapter(tiny(), "/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(LorakitError, match="cannot write /dev/full: no space left"):
        save_adapter(tiny(), "/dev/full")


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("no/x.safetensors", "file/x.safetensors", "file/x", "file"):
        output = tmp_path / name
        with pytest.raises(LorakitError, match="cannot write"):
            save_adapter(tiny(), str(output))
    with pytest.raises(LorakitError, match="cannot write"):
        save_adapter(tiny(), str(tmp_path / "file") + "/")


def test_the_folders_config_counts_since_people_edit_it(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    config = tmp_path / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    assert load_adapter(str(tmp_path)).modules()[0].scale == 4
    assert load_adapter(str(tmp_path / "adapter_model.safetensors")).modules()[0].scale == 4


def test_a_file_with_a_config_of_its_own_ignores_another_adapters_beside_it(
    tmp_path: Path,
) -> None:
    save_adapter(tiny(rank=3), str(tmp_path))
    save_adapter(tiny(), str(tmp_path / "merged.safetensors"))
    assert load_adapter(str(tmp_path / "merged.safetensors")).modules()[0].rank == 2


def test_a_tensor_file_without_config_takes_the_one_beside_it(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    save_tensors(tiny().tensors, tmp_path / "adapters.safetensors")
    assert load_adapter(str(tmp_path / "adapters.safetensors")).sha256 == tiny().sha256


def test_a_folder_without_a_config_takes_the_tensor_files_own(tmp_path: Path) -> None:
    save_adapter(tiny(), str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    assert load_adapter(str(tmp_path)).sha256 == tiny().sha256


def test_a_tensor_file_without_any_config_is_refused(tmp_path: Path) -> None:
    save_tensors(tiny().tensors, tmp_path / "x.safetensors")
    with pytest.raises(LorakitError, match="has no config; put PEFT's"):
        load_adapter(str(tmp_path / "x.safetensors"))


Q = "base_model.model.model.layers.0.self_attn.q_proj"
ONES = Tensor.from_array(np.ones((2, 4)))


def bad_value(value: float, dtype: str = "F32") -> Tensor:
    return Tensor.from_array(np.array([[1.0, 2, 3, 4], [5, value, 7, 8]]), dtype)


REFUSED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "A without B": ({f"{Q}.lora_B.weight": None}, r"q_proj.lora_A.weight' has no B"),
    "B without A": ({f"{Q}.lora_A.weight": None}, r"q_proj.lora_B.weight' has no A"),
    "DoRA": ({f"{Q}.lora_magnitude_vector": ONES}, "lora_magnitude_vector' belongs to DoRA"),
    "bias of B": ({f"{Q}.lora_B.bias": ONES}, "lora_B.bias' is a bias"),
    "bias": ({f"{Q}.bias": ONES}, "q_proj.bias' is a bias"),
    "whole module": ({"base_model.model.score.weight": ONES}, "score.weight' is no LoRA factor"),
    "whole module with LoRA": ({f"{Q}.weight": ONES}, "q_proj.weight' is no LoRA factor"),
    "copied output head": (
        {"base_model.model.lm_head.base_layer.weight": ONES},
        "is a copy of the base's own",
    ),
    "embedding": ({"base_model.model.wte.lora_embedding_A": ONES}, "is LoRA on an embedding"),
    "adapter's name": ({f"{Q}.lora_A.default.weight": ONES}, "has the adapter's name"),
    "no prefix": ({"model.layers.0.q_proj.lora_A.weight": ONES}, "does not begin with base_model"),
    "MLX": ({"model.layers.0.q_proj.lora_a": ONES}, "is MLX's"),
    "kohya": ({"lora_unet_down_blocks_0.lora_down.weight": ONES}, "is named as kohya's"),
    "kohya's alpha": ({"lora_te1_text_model.alpha": ONES}, "is named as kohya's"),
    "diffusers": ({"unet.down_blocks.0.to_q.lora_A.weight": ONES}, "is named as diffusers'"),
    "diffusers' transformer": (
        {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": ONES},
        "is named as diffusers'",
    ),
    "a model": ({"model.embed_tokens.weight": ONES}, "is no part of a LoRA adapter"),
    "NaN": ({f"{Q}.lora_A.weight": bad_value(np.nan)}, "lora_A.weight' holds values that are not"),
    "infinity": ({f"{Q}.lora_A.weight": bad_value(-np.inf)}, "holds values that are not finite"),
    "bf16 NaN": ({f"{Q}.lora_A.weight": bad_value(np.nan, "BF16")}, "not finite"),
    "f16 infinity": ({f"{Q}.lora_A.weight": bad_value(1e9, "F16")}, "not finite"),
    "float64": (
        {f"{Q}.lora_A.weight": Tensor("F64", (2, 4), memoryview(bytes(64)))},
        "is F64; cast it to float32",
    ),
    "integers": (
        {f"{Q}.lora_A.weight": Tensor("I8", (2, 4), memoryview(bytes(8)))},
        "is I8; cast it",
    ),
    "fp8": ({f"{Q}.lora_A.weight": Tensor("F8_E4M3", (2, 4), memoryview(bytes(8)))}, "is F8_E4M3"),
    "convolution": (
        {f"{Q}.lora_A.weight": Tensor.from_array(np.ones((2, 4, 3, 3)))},
        "has 4 dimensions",
    ),
    "rank of A": (
        {f"{Q}.lora_A.weight": Tensor.from_array(np.ones((3, 4)))},
        r"A of shape \(3, 4\) and B of shape \(4, 2\), but the config gives it rank 2",
    ),
    "rank of both": (
        {
            f"{Q}.lora_A.weight": Tensor.from_array(np.ones((3, 4))),
            f"{Q}.lora_B.weight": Tensor.from_array(np.ones((4, 3))),
        },
        "but the config gives it rank 2",
    ),
    "no width": ({f"{Q}.lora_A.weight": Tensor.from_array(np.ones((2, 0)))}, "check them"),
    "not targeted": (
        {
            "base_model.model.lm_head.lora_A.weight": ONES,
            "base_model.model.lm_head.lora_B.weight": Tensor.from_array(np.ones((4, 2))),
        },
        "lm_head.lora_A.weight' is not targeted by the config",
    ),
    "line break": ({f"{Q}\n.lora_A.weight": ONES}, r"q_proj\\n.lora_A.weight' holds a line break"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_tensors_that_cannot_be_kept_are_refused_by_name(
    changes: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    adapter, path = tiny(), tmp_path / "x.safetensors"
    tensors = {k: t for k, t in {**adapter.tensors, **changes}.items() if t is not None}
    save_tensors(tensors, path, adapter_config=json.dumps(adapter.config))
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "; " in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    save_tensors({}, tmp_path / "x", adapter_config=json.dumps(tiny().config))
    with pytest.raises(LorakitError, match="holds no tensors"):
        load_adapter(str(tmp_path / "x"))


FOLDERS = {
    "empty": ([], "holds no adapter_model.safetensors"),
    "pickle only": (
        ["adapter_model.bin"],
        "holds only the pickle.*run: lorakit convert /.*/$",
    ),
    "sharded": (["adapter_model.safetensors.index.json"], "is sharded"),
    "shards": (["adapter_model-00001-of-00002.safetensors"], "is sharded"),
}


@pytest.mark.parametrize(("files", "message"), FOLDERS.values(), ids=FOLDERS.keys())
def test_folders_without_a_tensor_file_are_refused(
    files: list[str], message: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(LorakitError, match=message) as caught:
        load_adapter(str(tmp_path))
    assert str(caught.value).isprintable()


KILLED = """
    import os, signal, sys
    from lorakit.adapters import storage
    loaded = storage.load_adapter(sys.argv[1])
    write, place = storage.write_tensors, int(sys.argv[3])
    def half(tensors, metadata, stream, late):
        write(dict(list(tensors.items())[: len(tensors) // 2]), metadata, stream)
        stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    if place == 0:
        storage.write_tensors = half
    calls, replace = [], os.replace
    def counted(*paths):
        calls.append(paths)
        if len(calls) == place:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)
    os.replace = counted
    storage.save_adapter(loaded, sys.argv[2])
"""


@pytest.mark.parametrize("place", [0, 1], ids=["while writing", "before renaming"])
@pytest.mark.parametrize("old", [True, False], ids=["old file", "no file"])
def test_a_kill_leaves_the_old_file_or_none(place: int, old: bool, tmp_path: Path) -> None:
    source, output = tmp_path / "new.safetensors", tmp_path / "out.safetensors"
    save_adapter(tiny(), str(source))
    if old:
        save_adapter(tiny(rank=1), str(output))
        before = output.read_bytes()
    done = run_python(KILLED, str(source), str(output), str(place))
    assert done.returncode == -signal.SIGKILL
    assert output.exists() == old
    if old:
        assert output.read_bytes() == before


def test_a_full_disk_leaves_no_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "old").mkdir()
    monkeypatch.setattr("lorakit.adapters.storage.write_tensors", fill)
    for folder in ("new/deep", "old"):
        with pytest.raises(LorakitError, match="no space left"):
            save_adapter(tiny(), f"{tmp_path / folder}/")
    assert [path.name for path in tmp_path.rglob("*")] == ["old"]


@pytest.mark.parametrize("place", [0, 1, 2], ids=["while writing", "before both", "between"])
def test_a_kill_leaves_no_folder_with_the_config_of_another(place: int, tmp_path: Path) -> None:
    source, output = tmp_path / "new.safetensors", tmp_path / "out"
    save_adapter(tiny(lora_alpha=8), str(source))
    save_adapter(tiny(), f"{output}/")
    done = run_python(KILLED, str(source), str(output), str(place))
    assert done.returncode == -signal.SIGKILL
    assert load_adapter(str(output)).sha256 in (tiny().sha256, tiny(lora_alpha=8).sha256)
    tensors, config = output / "adapter_model.safetensors", output / "adapter_config.json"
    own = read_tensors(tensors, "x")[1]["adapter_config"]
    assert not config.exists() or config.read_text().rstrip() == own


def test_a_changed_byte_of_the_header_never_raises_anything_else(tmp_path: Path) -> None:
    path, random = tmp_path / "x.safetensors", np.random.default_rng(0)
    blocks: list[BlockFields] = [
        {"name": "x", "modules": {Q.removeprefix("base_model.model."): {"rank": 2}}}
    ]
    adapter = tiny(rank_pattern={"q_proj": 2}, layers_to_transform=[0, 1], layers_pattern="layers")
    save_adapter(Adapter(adapter.tensors, adapter.config, {"blocks": blocks}), str(path))
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for _ in range(300):
        changed = bytearray(data)
        changed[8 + random.integers(length)] = random.choice(list(b'{}[]":,\\019-e.|* \xff'))
        path.write_bytes(changed)
        with contextlib.suppress(LorakitError):
            load_adapter(str(path))

"""Names from foreign files never reach the terminal with a character that could control it."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.program import run

# A window title, a colour, a carriage return, the one-byte CSI and a reversal of the line.
HOSTILE = "x\x1b]0;owned\x07\x1b[31m\r\x9b2J\u202ey"
CONTROLS = {"\x1b", "\x07", "\r", "\x9b", "\u202e"}


def jsonl(folder: Path, *records: Mapping[str, object]) -> str:
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def adapter(folder: Path, header: dict[str, object], **config: object) -> str:
    """Write an adapter of one module with this lorakit header, and changes to its config."""
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, 4), np.float32),
        f"{name}.lora_B.weight": np.ones((4, 2), np.float32),
    }
    path = folder / "adapter.safetensors"
    save_file(
        tensors,
        path,
        {"adapter_config": json.dumps({**fields, **config}), "lorakit": json.dumps(header)},
    )
    return str(path)


def scored(folder: Path) -> list[str]:
    records = [
        {"id": "1", "prompt": "", "completion": "a b", "prediction": "a c", "group": HOSTILE},
        {"id": "2", "prompt": "", "completion": "a b", "prediction": "a c", "group": "z"},
    ]
    return ["score", jsonl(folder, *records), "--group-by", "group", "--format", "table"]


def scored_under_a_name(folder: Path) -> list[str]:
    file = jsonl(folder, {"id": "1", "prompt": "", "completion": "a", "prediction": "a"})
    return ["score", "--system", f"{HOSTILE}={file}", "--format", "table"]


def archived(folder: Path) -> list[str]:
    path = folder / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{HOSTILE}/train.jsonl", "no JSON\n")
    return ["build-dataset", "gsm8k", str(path)]


def archived_in_tar(folder: Path) -> list[str]:
    path = folder / "a.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo(f"{HOSTILE}/train.jsonl")
        member.size = 3
        archive.addfile(member, io.BytesIO(b"{}\n"))
    return ["build-dataset", "gsm8k", str(path)]


def csv_columns(folder: Path) -> list[str]:
    path = folder / "a.csv"
    path.write_text(f'"{HOSTILE}",b\n1,2\n', newline="")
    return ["build-dataset", "csv", str(path), "--template", "{{text}}", "--completion", "{{b}}"]


def json_keys(folder: Path) -> list[str]:
    file = jsonl(folder, {HOSTILE: "x", "other": 1})
    return ["build-dataset", "jsonl", file, "--template", "{{text}}", "--completion", "{{b}}"]


def twice_the_same_key(folder: Path) -> list[str]:
    path = folder / "a.jsonl"
    key = json.dumps(HOSTILE)
    path.write_text(f'{{"id": "1", {key}: 1, "prompt": 2, {key}: 3}}\n')
    return ["score", str(path)]


def unknown_role(folder: Path) -> list[str]:
    file = jsonl(folder, {"messages": [{"role": HOSTILE, "content": "a"}]})
    return ["build-dataset", "chat", file]


def base_in_header(folder: Path) -> list[str]:
    file = adapter(folder, {"base": {"name": HOSTILE}}, base_model_name_or_path=HOSTILE)
    return ["inspect", file, "--format", "table"]


def missing_base(folder: Path) -> list[str]:
    file = adapter(folder, {}, base_model_name_or_path=f"/nowhere/{HOSTILE}")
    return ["generate", file, "--data", jsonl(folder, {"id": "1", "prompt": "a"})]


def history(folder: Path) -> list[str]:
    entry = {"command": HOSTILE, "settings": {HOSTILE: HOSTILE}, "parents": {HOSTILE: HOSTILE}}
    return ["inspect", adapter(folder, {"history": [entry]}), "--format", "table"]


def unknown_config_key(folder: Path) -> list[str]:
    return ["inspect", adapter(folder, {}, **{HOSTILE: [HOSTILE]})]


def wrong_peft_type(folder: Path) -> list[str]:
    return ["inspect", adapter(folder, {}, peft_type=HOSTILE)]


def tensor_names(folder: Path) -> list[str]:
    path = folder / "a.safetensors"
    config = json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})
    save_file({HOSTILE: np.ones(2, np.float32)}, path, {"adapter_config": config})
    return ["inspect", str(path)]


def compared(folder: Path) -> list[str]:
    record = {"id": HOSTILE, "prompt": HOSTILE, "completion": "a", "prediction": HOSTILE}
    first = jsonl(folder, record)
    second = folder / "second.jsonl"
    second.write_text(json.dumps({**record, "prediction": "b"}) + "\n")
    return ["compare", first, str(second), "--format", "table"]


def missing_file(folder: Path) -> list[str]:
    return ["score", str(folder / HOSTILE)]


def unknown_choice(folder: Path) -> list[str]:
    return ["score", "-", "--metric", HOSTILE]


CASES: list[Callable[[Path], list[str]]] = [
    scored,
    scored_under_a_name,
    archived,
    archived_in_tar,
    csv_columns,
    json_keys,
    twice_the_same_key,
    unknown_role,
    base_in_header,
    missing_base,
    history,
    unknown_config_key,
    wrong_peft_type,
    tensor_names,
    compared,
    missing_file,
    unknown_choice,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_nothing_that_controls_the_terminal_is_printed(
    case: Callable[[Path], list[str]], tmp_path: Path
) -> None:
    done = run(*case(tmp_path))
    printed = done.stdout + done.stderr
    assert "Traceback" not in printed
    assert not CONTROLS & set(printed)
    assert "owned" in printed or case in (twice_the_same_key, unknown_role, tensor_names)

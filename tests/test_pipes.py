"""Commands joined by the shell, and killed in the middle of their work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.support.program import ENVIRONMENT, PROGRAM, run, shell, wait_for

ROWS = "".join(f'{{"text": "row {n}", "answer": "said {n}"}}\n' for n in range(20))
TEMPLATES = "--template '{{text}} =' --completion ' {{answer}}'"


def lines_of(done: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def llama_adapter(path: Path, seed: int) -> str:
    """Write an adapter of rank 2 on the query projections of the tiny Llama; return its path."""
    random = np.random.default_rng(seed)
    tensors = {}
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.q_proj"
        tensors[lora_name(name, "A")] = Tensor.from_array(random.normal(size=(2, 32)), "F32")
        tensors[lora_name(name, "B")] = Tensor.from_array(random.normal(size=(32, 2)), "F32")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    return save_adapter(Adapter(tensors, config, {}, path.stem), str(path))


# — without a model —


def test_records_go_from_recipe_to_recipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    again = "--template '{{prompt}}' --completion '{{completion}}'"
    done = shell(
        f"lorakit build-dataset jsonl rows.jsonl {TEMPLATES} --sample 10"
        f" | lorakit build-dataset jsonl {again} --sample 5"
        " | lorakit build-dataset jsonl -",
        tmp_path,
    )
    made = lines_of(done)
    assert done.stderr == ""
    assert len(made) == 5
    for record in made:
        number = record["prompt"].split()[1]
        assert (record["prompt"], record["completion"]) == (f"row {number} =", f" said {number}")


def test_the_error_of_one_command_is_the_only_one_a_reader_adds_to(tmp_path: Path) -> None:
    done = shell("lorakit build-dataset jsonl none.jsonl | lorakit score -", tmp_path)
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines()) == [
        "Error: cannot read none.jsonl: no such file or directory; check the path",
        "Error: stdin holds no records; check what wrote it",
    ]


def test_head_ends_a_long_output_quietly_with_141(tmp_path: Path) -> None:
    script = "{ lorakit build-dataset microworld echo; echo $? >code; } | head -n 1"
    (first,) = lines_of(shell(script, tmp_path))
    assert "prompt" in first
    assert (tmp_path / "code").read_text() == "141\n"
    assert shell(script, tmp_path).stderr == ""


def test_an_adapter_goes_through_a_pipe_unchanged(tmp_path: Path) -> None:
    path = llama_adapter(tmp_path / "a.safetensors", 0)
    (piped,) = lines_of(shell('cat "$A" | lorakit inspect -', tmp_path, A=path))
    (named,) = lines_of(run("inspect", path))
    assert {**piped, "adapter": path} == named
    assert piped["adapter"] == "stdin"


BOUNDARIES = """{"boundary": 1, "score": 30.0, "best": false}
{"boundary": 2, "score": 40.0, "best": true, "metric": "rougeL"}
"""


def test_a_boundary_comes_by_a_pipe_or_the_adapter_does(tmp_path: Path) -> None:
    path = llama_adapter(tmp_path / "a.safetensors", 0)
    done = shell(
        "set -e\n"
        'printf %s "$FOUND" | lorakit strip-layers "$A" --boundary -\n'
        'printf %s "$FOUND" >found.jsonl\n'
        'lorakit strip-layers "$A" -q --boundary found.jsonl -o file.safetensors\n'
        'lorakit strip-layers -q --boundary 2 -o - <"$A" >piped\n'
        'lorakit strip-layers "$A" --boundary 2 -q -o folder/\n'
        "cmp stripped.safetensors file.safetensors\n"
        "cmp file.safetensors folder/adapter_model.safetensors\n"
        "lorakit inspect - <piped",
        tmp_path,
        A=path,
        FOUND=BOUNDARIES,
    )
    (record,) = lines_of(done)
    assert [layer["layer"] for layer in record["layers"]] == [0, 1]
    assert done.stderr == "Note: kept 2 of 3 modules\nNote: wrote stripped.safetensors\n"
    named, piped = (load_adapter(str(tmp_path / name)) for name in ("file.safetensors", "piped"))
    assert piped.sha256 == named.sha256 == record["sha256"]
    (parent,) = (entry["parents"] for entry in record["history"])
    assert parent == {"stdin": load_adapter(path).sha256}
    assert (tmp_path / "folder" / "adapter_config.json").is_file()


def test_stripping_says_what_it_did_not_do(tmp_path: Path) -> None:
    llama_adapter(tmp_path / "a.safetensors", 0)
    done = shell("lorakit strip-layers a.safetensors --boundary 9", tmp_path)
    assert done.stderr.splitlines() == [
        "Note: no LoRA on the layers to strip: every tensor is kept",
        "Note: wrote stripped.safetensors",
    ]


def test_the_same_command_writes_the_same_bytes_to_a_file_and_to_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    command = f"lorakit build-dataset jsonl rows.jsonl {TEMPLATES} --sample 7 --seed 3"
    done = shell(f"{command} -o file && {command} | cmp - file", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# — killed —


@pytest.mark.parametrize("old", [None, "old\n"], ids=["nothing there", "an old file"])
def test_a_killed_command_leaves_no_half_file_under_the_final_name(
    old: str | None, tmp_path: Path
) -> None:
    target = tmp_path / "out.jsonl"
    if old is not None:
        target.write_text(old)
    command = [PROGRAM, "build-dataset", "jsonl", "-o", target.name]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=tmp_path, env=ENVIRONMENT, text=True
    ) as child:
        assert child.stdin is not None
        child.stdin.write('{"prompt": "p", "completion": "c"}\n')
        child.stdin.write('{"prompt": "q", "completion": "')
        child.stdin.flush()

        # the first record must reach the side file, so that the kill comes in the middle of it
        def is_written() -> bool:
            assert child.poll() is None
            return any(path.stat().st_size for path in tmp_path.glob(".out.jsonl.*.part"))

        wait_for(is_written)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (target.read_text() if target.exists() else None) == old
    row = '{"prompt": "r", "completion": "d"}\n'
    assert run("build-dataset", "jsonl", "-o", "out.jsonl", stdin=row, cwd=tmp_path).stderr == ""
    assert json.loads(target.read_text())["prompt"] == "r"


# — with a model —


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [
        ("train-adapter", "none/a.safetensors", "cannot write none/a.safetensors: no such file"),
        ("merge xs.safetensors", "none/a.safetensors", "cannot write none/a.safetensors: no such"),
        ("merge xs.safetensors", "-", "an adapter would go to the terminal; "),
    ],
    ids=["train-adapter", "merge", "a terminal"],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_training(
    command: str, output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pty = pytest.importorskip("pty", reason="needs a Unix terminal")
    monkeypatch.chdir(tmp_path)
    main, side = pty.openpty()
    with os.fdopen(main), os.fdopen(side, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with pytest.raises(LorakitError, match=f"^{message}"):
            lorakit.main(
                [*command.split(), "--data", "none.jsonl", "-o", output], standalone_mode=False
            )


def test_built_records_are_answered_and_scored_in_one_pipe(llama: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    done = shell(
        f"lorakit build-dataset jsonl rows.jsonl {TEMPLATES} --sample 6"
        " | tee records.jsonl"
        ' | lorakit generate --data - --model "$MODEL" --device cpu --max-new-tokens 4'
        " | tee predictions.jsonl"
        " | lorakit score - --metric em,chrf",
        tmp_path,
        MODEL=llama,
    )
    (scores,) = lines_of(done)
    assert (scores["file"], scores["count"]) == ("-", 6)
    given, answered = (
        [json.loads(line) for line in (tmp_path / name).read_text("utf-8").splitlines()]
        for name in ("records.jsonl", "predictions.jsonl")
    )
    assert [list(record) for record in answered] == [[*record, "prediction"] for record in given]
    assert [{**record, "prediction": ""} for record in answered] == [
        {**record, "prediction": ""} for record in given
    ]
    assert done.stderr == "Note: no ADAPTER: the base model answers zero-shot\n"


def test_a_merge_goes_on_as_bytes_and_its_words_to_stderr(llama: str, tmp_path: Path) -> None:
    for number, name in enumerate(("xs", "wl")):
        llama_adapter(tmp_path / f"{name}.safetensors", number)
    done = shell(
        f'printf %s "$ROWS" | lorakit build-dataset jsonl {TEMPLATES}'
        " | lorakit merge xs.safetensors wl.safetensors --data - --prune-ratio 0.5"
        ' --model "$MODEL" --device cpu --dtype float32 --epochs 1 -o -'
        " | tee merged.safetensors | lorakit inspect -",
        tmp_path,
        MODEL=llama,
        ROWS=ROWS,
    )
    (record,) = lines_of(done)
    assert [block["name"] for block in record["blocks"]] == ["xs", "wl"]
    assert record["zeros"] == 0.5
    assert (record["rank"], record["target_modules"]) == ([4], ["q_proj"])
    assert "epoch 1/1: train loss" in done.stderr
    merged = load_adapter(str(tmp_path / "merged.safetensors"))
    assert record["sha256"] == merged.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("merged.safetensors", "wl.safetensors", "xs.safetensors"),
    ]


def test_both_papers_go_together_in_two_lines(llama: str, tmp_path: Path) -> None:
    """Merge with a searched ratio, find the boundary of what comes by the pipe, and cut there."""
    for seed, name in enumerate(("xs", "wl")):
        llama_adapter(tmp_path / f"{name}.safetensors", seed)
    few = {"device": "cpu", "epochs": "5", "batch-size": "4"}
    options = " ".join(f"--{name} {value}" for name, value in few.items())
    done = shell(
        f'printf %s "$ROWS" | lorakit build-dataset jsonl {TEMPLATES} -o train.jsonl\n'
        "lorakit merge xs.safetensors wl.safetensors --data train.jsonl --prune-ratio auto"
        f' --model "$MODEL" {options} -q -o - | tee merged.safetensors'
        " | lorakit find-boundary --data train.jsonl --max-new-tokens 4 --device cpu"
        " | tee found.jsonl"
        " | lorakit strip-layers merged.safetensors --boundary - -o final.safetensors\n"
        "cat found.jsonl",
        tmp_path,
        MODEL=llama,
        ROWS=ROWS,
    )
    found = lines_of(done)
    assert [record["boundary"] for record in found] == [1, 2, 3]
    (best,) = [record["boundary"] for record in found if record["best"]]
    kept = {module.layer for module in load_adapter(str(tmp_path / "final.safetensors")).modules()}
    assert kept == set(range(best))
    history = load_adapter(str(tmp_path / "final.safetensors")).header["history"]
    assert [entry["command"] for entry in history] == ["merge", "strip-layers"]

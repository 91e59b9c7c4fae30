"""Print what fits on which card, from `--dry-run` on models of which only the configs are made.

    python examples/what_fits.py [MODEL…]

A row for each base, in bfloat16 and in four bits; columns for training an adapter, and for merging
three of rank 8, on records of 512 and of 2048 tokens, one at a time, without and with
--gradient-checkpointing. A cell is the peak in GiB and the smallest card of which it takes nine
tenths at most.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import lorakit
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit as program

CARDS = (24, 48, 80)  # GiB
USABLE = 0.9
RANK, LENGTHS, COMPLETION = 8, (512, 2048), 64  # tokens
COMMANDS = ("train-adapter", "merge")

# vocabulary, hidden and inner width, layers, heads, heads of keys, whether the head is tied
SHAPES: dict[str, tuple[int, int, int, int, int, int, bool]] = {
    "SmolLM2-135M": (49152, 576, 1536, 30, 9, 3, True),
    "SmolLM2-1.7B": (49152, 2048, 8192, 24, 32, 32, True),
    "Qwen2.5-7B": (152064, 3584, 18944, 28, 28, 4, False),
    "Llama-3-8B": (128256, 4096, 14336, 32, 32, 8, False),
    "Llama-3-70B": (128256, 8192, 28672, 80, 64, 8, False),
}
FORMATS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "4 bit": {
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_use_double_quant": True,
        }
    },
}


def config_of(name: str) -> dict[str, Any]:
    """Return the config of a model of these widths."""
    vocabulary, hidden, inner, layers, heads, kv_heads, tied = SHAPES[name]
    family = "qwen2" if name.startswith("Qwen") else "llama"
    return {
        "architectures": [f"{family.title()}ForCausalLM"],
        "model_type": family,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "eos_token_id": 2,
    }


def make_base(folder: Path, name: str, extra: dict[str, Any]) -> str:
    """Write a base without weights: a config, and the tokenizer of `tiny`."""
    folder.mkdir()
    tiny = Path(lorakit.__file__).parent / "tiny"
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / file, folder)
    (folder / "config.json").write_text(json.dumps({**config_of(name), **extra}))
    return str(folder)


def make_adapter(path: Path, name: str) -> str:
    """Write an adapter of zeros on the query and value projections."""
    _, hidden, _, layers, heads, kv_heads, _ = SHAPES[name]
    outputs = {"q_proj": hidden, "v_proj": hidden // heads * kv_heads}
    tensors = {}
    for layer, (last, out) in itertools.product(range(layers), outputs.items()):
        module = f"model.layers.{layer}.self_attn.{last}"
        tensors[lora_name(module, "A")] = Tensor.from_array(np.zeros((RANK, hidden), np.float32))
        tensors[lora_name(module, "B")] = Tensor.from_array(np.zeros((out, RANK), np.float32))
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*outputs]}
    return save_adapter(Adapter(tensors, config, {}, name), str(path))


def make_records(path: Path) -> str:
    """Write records longer than any length here, which --truncate cuts to that length."""
    record = {"prompt": "the " * 4 * max(LENGTHS), "completion": " the" * (COMPLETION - 1)}
    path.write_text((json.dumps(record) + "\n") * 16)
    return str(path)


def peak(command: Sequence[str]) -> float:
    """Return the peak in GiB that a command's dry run says."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        program.main([*command, "--dry-run", "-q"], standalone_mode=False)
    rows = map(json.loads, output.getvalue().splitlines())
    (found,) = [row["bytes"] for row in rows if row.get("of") == "peak"]
    return float(found / 2**30)


def cell(gib: float) -> str:
    """Return a peak and the smallest card for it."""
    card = next((str(card) for card in CARDS if gib <= USABLE * card), "–")
    return f"{gib:.1f} ({card})"


def cells(folder: Path, name: str, extra: dict[str, Any]) -> Iterator[str]:
    """Yield the cells of a row."""
    base = make_base(folder / "base", name, extra)
    adapters = [make_adapter(folder / f"{n}.safetensors", name) for n in range(3)]
    options = ["--model", base, "--device", "cuda", "--truncate", "--epochs", "1"]
    options += ["--data", make_records(folder / "records.jsonl")]
    for command, length, checkpointing in itertools.product(COMMANDS, LENGTHS, (False, True)):
        inputs = adapters if command == "merge" else []
        sizes = ["--max-length", str(length), "--micro-batch-tokens", str(length)]
        flags = ["--gradient-checkpointing"] if checkpointing else []
        yield cell(peak([command, *inputs, *options, *sizes, *flags]))


def main(names: Sequence[str]) -> None:
    """Print the table, of all models or of those named."""
    columns = [
        f"{command} {length}{' gc' * checkpointing}"
        for command, length, checkpointing in itertools.product(
            ("train", "merge"), LENGTHS, (False, True)
        )
    ]
    print("| base | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, (label, extra) in itertools.product(names or SHAPES, FORMATS.items()):
        with tempfile.TemporaryDirectory() as folder:
            row = list(cells(Path(folder), name, extra))
        print(f"| {name}, {label} | " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

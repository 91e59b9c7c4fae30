"""Small adapters to test with, and Python in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.names import lora_name
from lorakit.adapters.safetensors import write_tensors
from lorakit.adapters.tensors import Tensor

ROOT = Path(__file__).parent.parent.parent


def tiny(rank: int = 2, layers: int = 2, dtype: str = "F32", **config: object) -> Adapter:
    """Return an adapter of two projections a layer, 4 wide, with a lorakit header."""
    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        for last in ("q_proj", "v_proj"):
            name = f"model.layers.{layer}.self_attn.{last}"
            tensors[lora_name(name, "A")] = Tensor.from_array(random.normal(size=(rank, 4)), dtype)
            tensors[lora_name(name, "B")] = Tensor.from_array(random.normal(size=(4, rank)), dtype)
    fields: dict[str, object] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 4,
        "target_modules": ["v_proj", "q_proj"],
        **config,
    }
    return Adapter(tensors, fields, {"format": 1, "chat": "off"}, "tiny")


def save_tensors(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> None:
    with open(path, "wb") as stream:
        write_tensors(tensors, metadata, stream)


def run_python(
    script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a script in a new interpreter that finds this package."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )

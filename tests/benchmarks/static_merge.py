"""Merge three adapters without data by `svd`, lorakit against PEFT: time, memory and error.

The adapters are random, of rank 8, 16 and 16, on all seven projections of Qwen2.5-0.5B's 24 layers
(168 modules), merged to rank 16. lorakit's time and peak memory are those of a process that reads
the three files, merges and writes the result; its numpy is imported before. PEFT's time is that of
`add_weighted_adapter` alone, with its defaults, on adapters in memory, on the first `--layers` of
the layers, scaled to all of them: a dense SVD for each module takes minutes. Errors are those of
the same layers against the dense sum's best approximation of rank 16.

    python tests/benchmarks/static_merge.py [--layers 1] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.merging.static import merge_statically
from lorakit.settings import StaticSettings

HIDDEN, KV, INNER = 896, 128, 4864
SHAPES = {  # d_out, d_in
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
LAYERS = 24
RANKS = (8, 16, 16)
RANK = 16
WEIGHTS = (0.5, 0.3, 0.2)


def prepare(folder: Path) -> None:
    """Write the three adapters into a folder."""
    names = {f"model.layers.{i}.{name}": SHAPES[name] for i in range(LAYERS) for name in SHAPES}
    for number, rank in enumerate(RANKS):
        draw = np.random.default_rng(number)
        factors = {
            name: (
                draw.standard_normal((rank, columns), np.float32),
                draw.standard_normal((rows, rank), np.float32).copy(),
            )
            for name, (rows, columns) in names.items()
        }
        config = {
            **peft_config(dict.fromkeys(names, rank), base=None, alpha=16),
            "target_modules": sorted(name.rsplit(".", 1)[-1] for name in SHAPES),
        }
        save_adapter(Adapter(tensors_of(factors), config), str(folder / f"{number}.safetensors"))


def run_lorakit(folder: Path) -> dict[str, float]:
    """Read, merge and write; return seconds and the peak above the start, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before, started = _status("VmRSS"), time.perf_counter()
    merge_statically(
        [load_adapter(str(folder / f"{number}.safetensors")) for number in range(len(RANKS))],
        "svd",
        settings=StaticSettings(weights=WEIGHTS, rank=RANK),
        output=str(folder / "merged.safetensors"),
    )
    return {"seconds": time.perf_counter() - started, "peak": _status("VmHWM") - before}


def _status(name: str) -> int:
    """Return a size of this process in bytes, by its name in /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def run_peft(folder: Path, layers: int) -> dict[str, Any]:
    """Return PEFT's seconds on some layers, and its and lorakit's errors there above the best."""
    import peft
    import torch

    model = _bare_model(layers)
    adapters = [load_adapter(str(folder / f"{number}.safetensors")) for number in range(len(RANKS))]
    targets = [name.rsplit(".", 1)[-1] for name in SHAPES]
    configs = [peft.LoraConfig(r=r, lora_alpha=16, target_modules=targets) for r in RANKS]
    names = [f"adapter_{letter}" for letter in "abc"]
    lora: Any = peft.get_peft_model(model, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        lora.add_adapter(name, config)
    pairs = {n.removeprefix("base_model.model."): m for n, m in lora.named_modules()}
    for name, adapter in zip(names, adapters, strict=True):
        for module in adapter.modules():
            if module.name in pairs:
                pairs[module.name].lora_A[name].weight.data = torch.tensor(module.a)
                pairs[module.name].lora_B[name].weight.data = torch.tensor(module.b)
    started = time.perf_counter()
    lora.add_weighted_adapter(names, list(WEIGHTS), "merged", "svd", svd_rank=RANK)
    seconds = time.perf_counter() - started
    ours = {m.name: m for m in load_adapter(str(folder / "merged.safetensors")).modules()}
    errors: dict[str, list[float]] = {"lorakit": [], "peft": []}
    for name in [name for name in ours if name in pairs]:
        parts = [next(m for m in a.modules() if m.name == name) for a in adapters]
        truth = sum(weight * part.delta() for weight, part in zip(WEIGHTS, parts, strict=True))
        best = np.linalg.norm(np.linalg.svd(truth, compute_uv=False)[RANK:])
        theirs = pairs[name].get_delta_weight("merged").detach().double().numpy()
        errors["lorakit"].append(float(np.linalg.norm(ours[name].delta() - truth) / best - 1))
        errors["peft"].append(float(np.linalg.norm(theirs - truth) / best - 1))
    return {"seconds": seconds, "errors": errors}


def _bare_model(layers: int) -> Any:
    """Return modules of the right names and shapes, with nothing that computes."""
    import torch

    model = torch.nn.Module()
    for layer in range(layers):
        for name, (rows, columns) in SHAPES.items():
            place: Any = model
            for part in ("model", "layers", str(layer), *name.split(".")[:-1]):
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.add_module(name.split(".")[-1], torch.nn.Linear(columns, rows, bias=False))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1, help="layers that PEFT is timed on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=["lorakit", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side == "lorakit":
        print(json.dumps(run_lorakit(options.folder)))
    elif options.side == "peft":
        print(json.dumps(run_peft(options.folder, options.layers)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            prepare(Path(folder))
            report(Path(folder), options.layers, options.rounds)


def _child(side: str, folder: Path) -> dict[str, Any]:
    """Return what one side's process has measured."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        sys.exit(child.stderr)
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return measured


def report(folder: Path, layers: int, rounds: int) -> None:
    size = sum((folder / f"{number}.safetensors").stat().st_size for number in range(len(RANKS)))
    ours = [_child("lorakit", folder) for _ in range(rounds)]
    theirs = _child("peft", folder)
    seconds, scaled = min(run["seconds"] for run in ours), theirs["seconds"] * LAYERS / layers
    peak = max(run["peak"] for run in ours)
    print(f"three adapters: {size / 1e6:.0f} MB, {LAYERS * len(SHAPES)} modules")
    print(f"lorakit  {seconds:8.2f} s to read, merge and write (best of {rounds})")
    print(
        f"PEFT     {scaled:8.2f} s to merge: {theirs['seconds']:.2f} s for {layers} of "
        f"{LAYERS} layers, scaled"
    )
    print(f"time: {scaled / seconds:.0f}× faster than PEFT")
    print(f"memory: the peak above the start is {peak / size:.2f}× the adapters' size")
    for side, above in theirs["errors"].items():
        print(f"error of {side} above the best of rank {RANK}: at most {max(above):.1e} of it")


if __name__ == "__main__":
    main()

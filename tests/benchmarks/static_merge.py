"""Merge adapters without data by `svd`, lorakit against PEFT: time, memory and error.

The adapters are random, of rank 8, 16 and 16 (and so on for more), on all seven projections of
Qwen2.5-0.5B's 24 layers (168 modules), merged to rank 16. lorakit's time and peak memory are those
of a process that reads the files, merges and writes the result; its numpy is imported before.
PEFT's time is that of `add_weighted_adapter` alone, with its defaults, on adapters in memory, on
the first `--layers` of the layers, scaled to all of them: a dense SVD for each module takes
minutes. Errors are those of the same layers against the dense sum's best approximation of rank 16.
The limit is a program that only reads the files and writes the result.

    python -m tests.benchmarks.static_merge [--layers 1] [--rounds 3] [--adapters 3]
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.merging.static import merge_statically
from lorakit.settings import StaticSettings
from tests.benchmarks.program import main, option
from tests.benchmarks.result import Result
from tests.benchmarks.side import in_process

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
RANK = 16


@dataclass(frozen=True)
class Options:
    adapters: int = option(3, "how many are merged")
    layers: int = option(1, "layers that PEFT is timed on")
    all_layers: int = option(LAYERS, "layers of the adapters")
    projections: str = option(",".join(SHAPES), "the projections that they are on")
    rounds: int = option(3, "turns of lorakit, each in a process of its own")


SMOKE = Options(all_layers=2, projections="self_attn.k_proj", rounds=1)


def measure(options: Options) -> Result:
    """Merge by both, in turns as far as PEFT's minutes allow, and compare them."""
    from tests.benchmarks.rounds import ratio_of

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options)
        size = sum(file_of(folder, n).stat().st_size for n in range(options.adapters))
        common: dict[str, object] = {"folder": name, "adapters": options.adapters}
        ours = [in_process(run_lorakit, common)[0] for _ in range(options.rounds)]
        theirs = in_process(
            run_peft,
            {**common, "layers": options.layers, "projections": options.projections},
        )[0]
    seconds = min(run["seconds"] for run in ours)
    scaled = theirs["seconds"] * options.all_layers / options.layers
    ratio = ratio_of([run["seconds"] for run in ours], [scaled] * len(ours))
    return Result(
        name="static_merge",
        unit="s, files to file",
        ours=seconds,
        peer=scaled,
        ratio=ratio.median,
        spread=ratio.spread,
        limit="reading and writing the files alone",
        limit_share=min(run["files"] for run in ours) / seconds,
        machine=machine_of_numpy(),
        details={
            "adapters": options.adapters,
            "modules": options.all_layers * len(options.projections.split(",")),
            "size of the adapters, MB": size / 1e6,
            "layers that PEFT was timed on": options.layers,
            "memory, of the adapters' size": max(run["peak"] for run in ours) / size,
            "largest error above the best of that rank, ours": max(theirs["errors"]["lorakit"]),
            "largest error above the best of that rank, PEFT": max(theirs["errors"]["peft"]),
        },
    )


def machine_of_numpy() -> Any:
    """Return the machine as numpy computes on it, in float64."""
    import torch

    from tests.benchmarks.machine import describe_machine

    return describe_machine(torch.device("cpu"), torch.float64)


def ranks_of(adapters: int) -> list[int]:
    return [8 if number % 3 == 0 else 16 for number in range(adapters)]


def weights_of(adapters: int) -> tuple[float, ...]:
    return tuple(1.0 / (number + 2) for number in range(adapters))


def file_of(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def prepare(folder: Path, options: Options) -> None:
    """Write the adapters into a folder."""
    names = {
        f"model.layers.{layer}.{name}": SHAPES[name]
        for layer in range(options.all_layers)
        for name in options.projections.split(",")
    }
    for number, rank in enumerate(ranks_of(options.adapters)):
        save_adapter(random_factors(names, rank, number), str(file_of(folder, number)))


def random_factors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> Adapter:
    """Return an adapter of random factors on modules of these shapes."""
    draw = np.random.default_rng(seed)
    factors = {
        name: (
            draw.standard_normal((rank, columns), np.float32),
            draw.standard_normal((rows, rank), np.float32),
        )
        for name, (rows, columns) in shapes.items()
    }
    config = {
        **peft_config(dict.fromkeys(shapes, rank), base=None, alpha=16),
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in shapes}),
    }
    return Adapter(tensors_of(factors), config)


def run_lorakit(folder: str, adapters: int) -> dict[str, float]:
    """Read, merge and write; return seconds, the peak above the start in bytes, and what reading
    the files and writing the result alone take, in seconds."""
    from tests.benchmarks.rounds import reset_peak, status

    gc.collect()
    gc.freeze()  # torch's objects, which this program needs and the command does not import
    reset_peak()
    before, started = status("VmRSS"), time.perf_counter()
    files = [file_of(Path(folder), number) for number in range(adapters)]
    output = Path(folder, "merged.safetensors")
    merge_statically(
        [load_adapter(str(path)) for path in files],
        "svd",
        settings=StaticSettings(weights=weights_of(adapters), rank=RANK),
        output=str(output),
    )
    seconds, peak = time.perf_counter() - started, status("VmHWM") - before
    started = time.perf_counter()
    for path in files:
        path.read_bytes()
    Path(folder, "copy").write_bytes(output.read_bytes())
    return {"seconds": seconds, "peak": peak, "files": time.perf_counter() - started}


def run_peft(folder: str, adapters: int, layers: int, projections: str) -> dict[str, Any]:
    """Return PEFT's seconds on some layers, and its and lorakit's errors there above the best."""
    import torch

    torch.manual_seed(0)
    loaded = [load_adapter(str(file_of(Path(folder), number))) for number in range(adapters)]
    targets = projections.split(",")
    lora, pairs, names = _on_peft(loaded, layers, targets)
    started = time.perf_counter()
    lora.add_weighted_adapter(names, list(weights_of(adapters)), "merged", "svd", svd_rank=RANK)
    seconds = time.perf_counter() - started
    ours = {m.name: m for m in load_adapter(f"{folder}/merged.safetensors").modules()}
    errors: dict[str, list[float]] = {"lorakit": [], "peft": []}
    for name in [name for name in ours if name in pairs]:
        truth = _weighted_sum(loaded, name)
        best = np.linalg.norm(np.linalg.svd(truth, compute_uv=False)[RANK:])
        theirs = pairs[name].get_delta_weight("merged").detach().double().numpy()
        errors["lorakit"].append(float(np.linalg.norm(ours[name].delta() - truth) / best - 1))
        errors["peft"].append(float(np.linalg.norm(theirs - truth) / best - 1))
    return {"seconds": seconds, "errors": errors}


def _weighted_sum(adapters: Sequence[Adapter], name: str) -> Any:
    """Return the dense sum of the task vectors of one module, (d_out, d_in) float64."""
    parts = [next(m for m in adapter.modules() if m.name == name) for adapter in adapters]
    weights = weights_of(len(parts))
    return sum(weight * part.delta() for weight, part in zip(weights, parts, strict=True))


def _on_peft(
    adapters: Sequence[Adapter], layers: int, targets: Sequence[str]
) -> tuple[Any, dict[str, Any], list[str]]:
    """Return PEFT's model with the adapters, its layers by module, and the adapters' names."""
    import peft
    import torch

    endings = [name.rsplit(".", 1)[-1] for name in targets]
    ranks = ranks_of(len(adapters))
    configs = [peft.LoraConfig(r=r, lora_alpha=16, target_modules=endings) for r in ranks]
    names = [f"adapter_{chr(ord('a') + number)}" for number in range(len(adapters))]
    lora: Any = peft.get_peft_model(_bare_model(layers, targets), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        lora.add_adapter(name, config)
    pairs = {n.removeprefix("base_model.model."): m for n, m in lora.named_modules()}
    for name, adapter in zip(names, adapters, strict=True):
        for module in adapter.modules():
            if module.name in pairs:
                pairs[module.name].lora_A[name].weight.data = torch.tensor(module.a)
                pairs[module.name].lora_B[name].weight.data = torch.tensor(module.b)
    return lora, pairs, names


def _bare_model(layers: int, targets: Sequence[str]) -> Any:
    """Return modules of the right names and shapes, with nothing that computes."""
    import torch

    model = torch.nn.Module()
    for layer in range(layers):
        for name in targets:
            rows, columns = SHAPES[name]
            place: Any = model
            for part in ("model", "layers", str(layer), *name.split(".")[:-1]):
                if not hasattr(place, part):
                    place.add_module(part, torch.nn.Module())
                place = getattr(place, part)
            place.add_module(name.split(".")[-1], torch.nn.Linear(columns, rows, bias=False))
    return model


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)

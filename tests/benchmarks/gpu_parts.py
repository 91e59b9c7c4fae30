"""The parts of gpu.py: each builds its base on the device and compares both sides in one process.

With `smoke` the shapes and counts are small, so that the same code runs on a CPU in seconds.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lorakit.adapters.adapter import Adapter
from lorakit.models.base import Base
from lorakit.models.estimate import (
    activation_bytes,
    logit_bytes,
    lora_parameters,
    trained_parts,
    training_pass,
)
from lorakit.models.gpu_kernels import kernels_for
from lorakit.models.lora import _remove_lora_, pick_modules
from lorakit.models.skeleton import Skeleton
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.benchmarks import find_boundary, generate
from tests.benchmarks.machine import describe_machine, matrix_rate, pick
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import Timed, in_turns, ratio_of
from tests.benchmarks.shapes import (
    LLAMA_1B,
    LLAMA_8B,
    QUERY_AND_VALUE,
    SMALL,
    Shape,
    random_adapter,
    random_base,
)
from tests.benchmarks.side import ROOT
from tests.benchmarks.steps import (
    Steps,
    lorakit_steps,
    peft_steps,
    random_rows,
    save_folders,
    share_of_limit,
    tokens_of,
)

STEPS, ROUNDS = 4, 2
COMPLETION = 8  # a row's length over that of its completion
GPU_TESTS = ("pytest.mark.gpu", "tests.support.devices")  # a file with such tests names one
CLOSE = 1e-4  # relative: how far two sides may differ in float32 after some steps


def merge_steps(
    *, device: str, smoke: bool, length: int, rows: int, adapters: int
) -> dict[str, Any]:
    """Compare training steps of some adapters, three as `merge` prunes them, one without."""
    shape = SMALL if smoke else LLAMA_8B
    length, steps, rounds = (length // 16, 1, 1) if smoke else (length, STEPS, ROUNDS)
    base = random_base(shape, *pick(device, "auto"))
    batches = batches_of(shape, length, rows, steps + 1)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = training_sides(base, adapters, batches, Path(folder), rounds)
    return asdict(compared_steps(base, shape, adapters, batches, ours, theirs))


def batches_of(shape: Shape, length: int, rows: int, count: int) -> list[list[Example]]:
    """Return batches of random rows, of half to all of a length."""
    return [
        random_rows(rows, length, max(1, length // COMPLETION), shape.words, seed)
        for seed in range(count)
    ]


def training_sides(
    base: Base, count: int, batches: list[list[Example]], folder: Path, rounds: int
) -> tuple[list[Steps], list[Steps]]:
    """Train the same adapters by both sides in turns, on the same base, after an untimed turn."""
    adapters = [random_adapter(base, seed=seed, strength=0.01) for seed in range(count)]
    folders = save_folders(adapters, folder)

    def ours(parts: bool = True) -> Steps:
        steps = lorakit_steps(base, adapters, batches, prunes=count > 1, parts=parts)
        _remove_lora_(base.model)
        return steps

    def peer(parts: bool = True) -> Steps:
        return peft_steps(base.model, folders, batches, parts=parts)

    ours(False), peer(False)  # whose memory and kernels' choices the others find
    return in_turns(ours, peer, rounds)


def compared_steps(
    base: Base,
    shape: Shape,
    adapters: int,
    batches: list[list[Example]],
    ours: Sequence[Steps],
    theirs: Sequence[Steps],
) -> Result:
    """Return the result of both sides' steps; the unit is seconds for a thousand tokens."""
    tokens, steps = tokens_of(batches)[0], len(batches) - 1
    ratio = ratio_of([r.total for r in ours], [r.total for r in theirs])
    seconds, rate = min(r.total for r in ours), matrix_rate(base.device, base.dtype)
    machine = describe_machine(base.device, base.dtype)
    own, other = (max(r.memory for r in side) for side in (ours, theirs))
    return Result(
        name="gpu",
        unit="s a step",
        ours=seconds / steps,
        peer=min(r.total for r in theirs) / steps,
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{rate / 1e12:.2f} TFLOP/s, the matrix rate in {machine.dtype}",
        limit_share=share_of_limit(shape, batches, seconds, rate),
        machine=machine,
        details={
            "kernels by Triton": kernels_for(base.model.get_input_embeddings().weight) is not None,
            "tokens/s": tokens / seconds,
            "tokens/s of the peer": tokens / min(r.total for r in theirs),
            "memory, of the peer's": own / other if other else None,
            "memory above the base, MB": own,
            "the same by formula, MB": estimated_memory(base, adapters, batches),
            "memory of the peer, MB": other,
            "memory of the base, MB": base_size(base),
            "pruning, of a step": min(r.pruning for r in ours),
            "operations, of a step": max(r.busy for r in ours),
            "operations, of a step of the peer": max(r.busy for r in theirs),
            "matrix products, of operations": max(r.products for r in ours),
            "attention, of operations": max(r.attention for r in ours),
            "difference of the first loss": abs(ours[0].losses[0] - theirs[0].losses[0]),
        },
    )


def estimated_memory(base: Base, adapters: int, batches: list[list[Example]]) -> float:
    """Return what --dry-run says that the steps hold above the base, in MB; packed, in one go."""
    skeleton = Skeleton(base, base.device)
    precision, shapes, decoder = skeleton.precision, skeleton.shapes, skeleton.decoder
    ranks = dict.fromkeys(pick_modules(base, QUERY_AND_VALUE, None), 8 * adapters)
    trained = sum(part.bytes for part in trained_parts(lora_parameters(ranks, shapes)))
    sizes = [training_pass(batch, packed=True) for batch in batches]
    activations = (
        activation_bytes(decoder, precision, size, ranks, shapes, dropout=False)
        + logit_bytes(decoder, precision, size)
        for size in sizes
    )
    return (max(activations) + trained) / 1e6


def base_size(base: Base) -> float:
    """Return the size of a base's weights, in MB."""
    return float(sum(w.numel() * w.element_size() for w in base.model.parameters())) / 1e6


def generation(*, device: str, smoke: bool, prompts: int, new: int) -> dict[str, Any]:
    """Compare `generate` with transformers' own, on the base alone, at the same batch size."""
    prompts, new, size = (6, 8, 3) if smoke else (prompts, new, 64)
    base = random_base(SMALL if smoke else LLAMA_8B, *pick(device, "auto"))
    records = random_records(base, prompts, *((4, 12) if smoke else (64, 256)))
    settings = GenerationSettings(batch_size=size, max_new_tokens=new, chat="off")
    turns = generate.all_sides(base, records, settings, 1, peers=[generate.SORTED])
    return asdict(generate.compared(base, records, settings, turns, name="gpu"))


def _share(ours: Sequence[Timed[Any]], theirs: Sequence[Timed[Any]]) -> float | None:
    """Return the share of the peer's peak of memory; None where it held no more than before."""
    own, other = (max(r.memory for r in side) for side in (ours, theirs))
    return own / other if other else None


def random_records(base: Base, count: int, shortest: int, longest: int) -> list[Record]:
    """Return records whose prompts are random tokens of the word tokenizer, as its words."""
    draw, words = random.Random(0), len(base.model.get_input_embeddings().weight)
    records = []
    for number in range(count):
        length = draw.randint(shortest, longest)
        prompt = " ".join(f"w{draw.randrange(3, words)}" for _ in range(length))
        records.append(Record({"prompt": prompt}, f"random:{number}"))
    return records


def boundary(*, device: str, smoke: bool, prompts: int, new: int) -> dict[str, Any]:
    """Compare find-boundary with the loop over PEFT's stripped adapters."""
    prompts, new = (3, 6) if smoke else (prompts, new)
    base = random_base(SMALL if smoke else LLAMA_1B, *pick(device, "auto"))
    records = random_records(base, prompts, *((4, 12) if smoke else (32, 96)))
    ids, ours, theirs = boundary_sides(base, random_adapter(base), records, new)
    result = find_boundary.compared(base, ids, ours, theirs, name="gpu")
    memory = {"memory, of the peer's": _share(ours, theirs)}
    return asdict(replace(result, details={**result.details, **memory}))


def boundary_sides(
    base: Base, adapter: Adapter, records: Sequence[Record], new: int
) -> tuple[list[Any], list[Timed[find_boundary.Outputs]], list[Timed[find_boundary.Outputs]]]:
    """Decode at every boundary by both sides; return the prompts, and what each wrote and took."""
    encoder = base.encoder(chat="off")
    ids = [encoder.prompt(record, new).ids for record in records]
    options = find_boundary.Options(batch_size=16, max_new_tokens=new, rounds=1)
    with tempfile.TemporaryDirectory() as folder:
        find_boundary.warm_up(base, adapter, ids, options, Path(folder))
        ours, theirs = find_boundary.both_sides(
            base, adapter, ids, options, Path(folder), range(base.layers + 1)
        )
    return ids, ours, theirs


def parity(*, device: str, smoke: bool) -> dict[str, Any]:
    """Check that both sides of every part give the same in float32 on small shapes.

    Returns the largest relative difference of a loss. Raises BenchmarkError where they do not.
    """
    torch.set_float32_matmul_precision("highest")
    base = random_base(SMALL, *pick(device, "float32"))
    batches = batches_of(SMALL, 48, 4, 2 if smoke else 6)
    losses = {}
    with tempfile.TemporaryDirectory() as folder:
        for count in (1, 3):
            losses[count] = loss_difference(base, count, batches, Path(folder, str(count)))
    records = random_records(base, 6, 4, 12)
    settings = GenerationSettings(batch_size=3, max_new_tokens=8, chat="off")
    turns = generate.all_sides(base, records, settings, 1)
    _, own, other = boundary_sides(base, random_adapter(base), records, 6)
    generated = generate.compared(base, records, settings, turns, name="gpu")
    counts = {
        "outputs of generate that differ": generated.details["texts that differ"],
        "outputs of find-boundary that differ": find_boundary.count_differing(
            own[0].output, other[0].output
        ),
    }
    worst = max(losses.values())
    if worst > CLOSE or any(counts.values()):
        raise BenchmarkError(f"the sides differ: losses by {worst:.1e}, {counts}")
    machine = describe_machine(base.device, base.dtype)
    details = {**counts, "losses compared": 2 * len(batches)}
    return asdict(Result("gpu", "of a loss differ in float32", worst, machine, details=details))


def loss_difference(base: Base, count: int, batches: list[list[Example]], folder: Path) -> float:
    """Return the largest relative difference of the losses of steps without pruning."""
    adapters = [random_adapter(base, seed=seed, strength=0.1) for seed in range(count)]
    folder.mkdir()
    ours = lorakit_steps(base, adapters, batches, micro_batch_tokens=64, prunes=False)
    _remove_lora_(base.model)
    theirs = peft_steps(base.model, save_folders(adapters, folder), batches)
    pairs = zip(ours.losses, theirs.losses, strict=True)
    return max(abs(own - other) / other for own, other in pairs)


def marked_tests(*, device: str, smoke: bool) -> dict[str, Any]:
    """Run the tests marked `gpu`; with `smoke` they are only collected.

    Files without such tests are left out: they may import what this machine lacks.
    """
    texts = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    files = [path for path, text in texts.items() if any(name in text for name in GPU_TESTS)]
    options = ["-q", "-p", "no:cacheprovider", "-W", "default"]  # another version's warnings
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *options, *map(str, sorted(files))]
    done = subprocess.run(
        [*command, *(["--collect-only"] if smoke else [])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines() or [""]
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise BenchmarkError(f"pytest -m gpu: {lines[-1]}")
    machine = describe_machine(*pick(device, "auto"))
    return asdict(Result("gpu", "tests failed", 0.0, machine, details={"pytest -m gpu": lines[-1]}))

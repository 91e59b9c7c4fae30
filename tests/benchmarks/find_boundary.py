"""find-boundary against the plain way: PEFT's `generate` on every stripped adapter.

An adapter is trained on a task of the microworld, by default titles on `tiny`; then a sample is
decoded greedily in float32 at every boundary, once by PEFT and transformers' `generate` on the
stripped adapters, in batches of the records as they come, and once by lorakit, with as many rows in
a batch. Both must write the same tokens, or the run ends with an error. The limit is the matrix
rate, had every token gone only through layers in which boundaries differ: see `least_flops`.
With `--layers` the model is a random Llama of that depth instead, its adapter random; with
`--model` it is a folder's.

    python -m tests.benchmarks.find_boundary [--task title] [--sample 32] [--batch-size 16]
        [--peer-batch-size 1] [--rounds 2] [--no-baseline] [--device cpu|cuda] [--layers 32]
        [--model FOLDER]
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.boundary.cuts import bottom
from lorakit.boundary.decode import Pool
from lorakit.boundary.gates import Gates
from lorakit.models.base import Base
from lorakit.models.loading import load_base
from lorakit.models.lora import attach
from lorakit.recipes.microworld.world import microworld
from lorakit.records.jsonl import write_records
from lorakit.records.record import Record
from lorakit.reporting import Silent
from lorakit.settings import LoraSettings, TrainingSettings
from lorakit.training.train import train_adapter
from tests.benchmarks.machine import describe_machine, matrix_rate, pick
from tests.benchmarks.peers import as_transformers_has_it
from tests.benchmarks.program import main, option
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import Timed, in_turns, ratio_of, timed
from tests.benchmarks.shapes import SHAPES, random_adapter, random_base

Outputs = dict[tuple[int, int], list[int]]  # tokens, by the prompt's number and the boundary
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Options:
    task: str = option("title", "the microworld's task")
    train: int = option(400, "records to train on; 0: the adapter is random")
    epochs: int = option(4, "epochs to train")
    sample: int = option(32, "records to decode")
    batch_size: int = option(16, "rows at a time, on both sides")
    peer_batch_size: int = option(0, "the peer's rows at a time; 0: as many")
    max_new_tokens: int = option(128, "tokens that are written at most")
    rounds: int = option(2, "turns of each side")
    no_baseline: bool = option(False, "leave boundary 0 out")
    model: str = option("tiny", "the base")
    adapter: str = option(None, "use this adapter, trained before", str)
    device: str = option("cpu", "where both compute")
    dtype: str = option("float32", "the number format; in others outputs may differ")
    layers: int = option(0, "a random Llama of so many layers; 0: the model")
    shape: str = option("1b", f"the random Llama's other sizes, of {', '.join(SHAPES)}")


SMOKE = Options(train=0, sample=3, max_new_tokens=8, rounds=1, layers=4, shape="small")


def measure(options: Options) -> Result:
    """Decode by both sides in turns, and compare times and outputs."""
    with tempfile.TemporaryDirectory() as folder:
        base, adapter = prepared(options, Path(folder))
        encoder = base.encoder(chat="auto")
        sample = records_of(options.task, "validation", options.sample)
        prompts = [encoder.prompt(record, options.max_new_tokens).ids for record in sample]
        boundaries = list(range(1 if options.no_baseline else 0, base.layers + 1))
        warm_up(base, adapter, prompts, options, Path(folder))
        ours, theirs = both_sides(base, adapter, prompts, options, Path(folder), boundaries)
    differing = count_differing(ours[0].output, theirs[0].output)
    if differing and base.dtype == torch.float32:
        raise BenchmarkError(f"{differing} of {len(theirs[0].output)} outputs are not the same")
    return compared(base, prompts, ours, theirs)


def prepared(options: Options, folder: Path) -> tuple[Base, Adapter]:
    """Return the base and the adapter to search with."""
    device, dtype = pick(options.device, options.dtype)
    if options.layers:
        shape = replace(SHAPES[options.shape], layers=options.layers)
        base = random_base(shape, device, dtype)
        return base, random_adapter(base)
    base = load_base(options.model, device=device, dtype=dtype)
    if options.adapter:
        return base, load_adapter(options.adapter)
    if not options.train:
        return base, random_adapter(base)
    adapter = trained(base, folder, options)
    return load_base(options.model, device=device, dtype=dtype), adapter


def warm_up(base: Base, adapter: Adapter, prompts: Prompts, options: Options, folder: Path) -> None:
    """Write two tokens of one output by both sides, without LoRA and with all of it."""
    few = replace(options, max_new_tokens=2, rounds=1)
    both_sides(base, adapter, prompts[:1], few, folder, [0, base.layers])


def both_sides(
    base: Base,
    adapter: Adapter,
    prompts: Prompts,
    options: Options,
    folder: Path,
    boundaries: Sequence[int],
) -> tuple[list[Timed[Outputs]], list[Timed[Outputs]]]:
    """Return what both sides write and take in every round, ours first.

    They share the base: each puts its LoRA on it, and takes it off again.
    """
    folders = {k: stripped(adapter, k, folder) for k in boundaries}
    return in_turns(
        lambda: timed(lambda: together(base, adapter, boundaries, prompts, options), base.device),
        lambda: timed(lambda: one_by_one(base, folders, prompts, options), base.device),
        options.rounds,
    )


def compared(
    base: Base,
    prompts: Prompts,
    ours: Sequence[Timed[Outputs]],
    theirs: Sequence[Timed[Outputs]],
    name: str = "find_boundary",
) -> Result:
    """Return the result of both sides' rounds."""
    outputs = theirs[0].output
    ratio = ratio_of([r.seconds for r in ours], [r.seconds for r in theirs])
    seconds, rate = min(r.seconds for r in ours), matrix_rate(base.device, base.dtype)
    least = least_flops(base, prompts, outputs) / rate
    boundaries = sorted({boundary for _, boundary in outputs})
    machine = describe_machine(base.device, base.dtype)
    return Result(
        name=name,
        unit="s for all boundaries",
        ours=seconds,
        peer=min(r.seconds for r in theirs),
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{rate / 1e9:.0f} GFLOP/s, the matrix rate in {machine.dtype}",
        limit_share=least / seconds,
        machine=machine,
        details={
            "processor ratio": ratio_of(
                [r.processor for r in ours], [r.processor for r in theirs]
            ).median,
            "memory above the base, MB": max(r.memory for r in ours),
            "memory of the peer, MB": max(r.memory for r in theirs),
            "boundaries": f"{boundaries[0]}-{boundaries[-1]}",
            "records": len(prompts),
            "tokens an output": sum(map(len, outputs.values())) / len(outputs),
            "outputs that differ": count_differing(ours[0].output, outputs),
            "ratio at the limit": min(r.seconds for r in theirs) / least,
        },
    )


def least_flops(base: Base, prompts: Prompts, outputs: Outputs) -> float:
    """Return about as many multiplications and additions as no program can do without.

    A prompt and its outputs go through the layers above their boundaries, those of the highest
    boundary through all layers; what all prompts begin with does so once. The output head computes
    the tokens that are written, and the end token after each output. Attention is left out.
    """
    head = int(base.model.get_output_embeddings().weight.numel())
    shared, boundaries = shared_prefix(prompts), {boundary for _, boundary in outputs}
    above = {k: base.layers - k for k in boundaries} | {max(boundaries): base.layers}
    layered = shared * sum(above.values()) + sum(
        (len(prompts[number]) - shared + len(ids)) * above[k]
        for (number, k), ids in outputs.items()
    )
    written = sum(len(ids) + 1 for ids in outputs.values())
    return 2.0 * ((weights_of(base) - head) / base.layers * layered + head * written)


def shared_prefix(prompts: Prompts) -> int:
    """Return how many tokens all prompts begin with."""
    columns = zip(*prompts, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))


def weights_of(base: Base) -> int:
    """Return the number of weights that multiply a token: those of the layers and the head."""
    matrices = (w for name, w in base.model.named_parameters() if ".layers." in name)
    inside = int(sum(weight.numel() for weight in matrices if weight.dim() == 2))
    return inside + int(base.model.get_output_embeddings().weight.numel())


def count_differing(ours: Outputs, expected: Outputs) -> int:
    """Return how many outputs differ from those expected."""
    return sum(ours[key] != tokens for key, tokens in expected.items())


def records_of(task: str, split: str, count: int) -> list[Record]:
    """Return the first records of a task's split."""
    rows = microworld(task, split=split)
    return [Record(row, str(row["id"])) for row, _ in zip(rows, range(count), strict=False)]


def trained(base: Base, folder: Path, options: Options) -> Adapter:
    """Train an adapter as `train-adapter` does and return it."""
    data, output = folder / "train.jsonl", str(folder / "trained.safetensors")
    records = records_of(options.task, "train", options.train)
    with data.open("w", encoding="utf-8") as stream:
        write_records((record.fields for record in records), stream)
    train_adapter(
        base,
        str(data),
        None,
        settings=TrainingSettings(lr=5e-3, epochs=options.epochs, dropout=0.0, dtype="float32"),
        lora=LoraSettings(),
        output=output,
        reporter=Silent(),
    )
    return load_adapter(output)


def stripped(adapter: Adapter, boundary: int, folder: Path) -> str | None:
    """Write the adapter with the bottom layers alone as PEFT reads it; None where none is left."""
    factors = {
        module.name: (module.a * module.scale, module.b)
        for module in adapter.modules()
        if (layer_of(module.name) or 0) < boundary
    }
    if not factors:
        return None
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    path = f"{folder}/boundary{boundary}/"
    save_adapter(Adapter(tensors_of(factors), peft_config(ranks, base=None)), path)
    return path


def one_by_one(
    base: Base, folders: dict[int, str | None], prompts: Prompts, options: Options
) -> Outputs:
    """Decode with PEFT's model of every stripped adapter, batch by batch through `generate`."""
    outputs: Outputs = {}
    for boundary, folder in folders.items():
        model = base.model
        if folder is not None:
            model = peft.PeftModel.from_pretrained(base.model, folder).eval()
        with as_transformers_has_it(base.model):
            rows = transformers_outputs(base, model, prompts, options)
        outputs |= {(place, boundary): ids for place, ids in enumerate(rows)}
        if folder is not None:
            model.unload()
    return outputs


def transformers_outputs(
    base: Base, model: Any, prompts: Prompts, options: Options
) -> list[list[int]]:
    """Return what transformers' own `generate` writes, batch by batch, without the end token."""
    pad, ends, outputs = base.end_tokens[0], set(base.end_tokens), []
    size = options.peer_batch_size or options.batch_size
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        length = max(map(len, rows))
        ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        with torch.inference_mode():
            sequences = model.generate(
                input_ids=ids.to(base.device),
                attention_mask=mask.to(base.device),
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                eos_token_id=list(base.end_tokens),
                pad_token_id=pad,
            )
        for row in sequences[:, length:].tolist():
            end = next((n for n, token in enumerate(row) if token in ends), len(row))
            outputs.append(row[:end])
    return outputs


def together(
    base: Base, adapter: Adapter, boundaries: Sequence[int], prompts: Prompts, options: Options
) -> Outputs:
    """Decode at all boundaries at once, as find-boundary does."""
    from lorakit.models.lora import _remove_lora_

    with Gates(attach(base, adapter)).standing() as gates:
        pool = Pool(base, gates, prompts, options.max_new_tokens, options.batch_size)
        cuts = {bottom(k, base.layers): k for k in boundaries}
        outputs = {(out.prompt, cuts[out.cut]): out.tokens for out in pool.run(list(cuts))}
    _remove_lora_(base.model)
    return outputs


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)

"""find-boundary against the plain way: PEFT's `generate` on every stripped adapter.

An adapter is trained on a task of the microworld, by default titles on `tiny`; then a sample is
decoded greedily in float32 at every boundary, once by PEFT and transformers' `generate` on the
stripped adapters, in batches of the records as they come, and once by lorakit, with as many rows in
a batch. Both must write the same tokens, or the run ends with an error.
With `--layers` the model is a random Llama of that depth instead (32: about a billion parameters,
for a GPU), its adapter random.

    python tests/benchmarks/find_boundary.py [--task title] [--sample 100] [--batch-size 16]
        [--rounds 1] [--no-baseline] [--device cpu|cuda] [--layers 32]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.boundary.cuts import bottom
from lorakit.boundary.decode import Pool
from lorakit.boundary.gates import Gates
from lorakit.models.base import Base
from lorakit.models.loading import load_base
from lorakit.models.lora import attach, pick_modules, projections
from lorakit.recipes.microworld.world import microworld
from lorakit.records.jsonl import write_records
from lorakit.records.record import Record
from lorakit.reporting import Silent
from lorakit.settings import LoraSettings, TrainingSettings
from lorakit.training.train import train_adapter

Outputs = dict[tuple[int, int], list[int]]


def records_of(task: str, split: str, count: int) -> list[Record]:
    """Return the first records of a task's split."""
    rows = microworld(task, split=split)
    return [Record(row, str(row["id"])) for row, _ in zip(rows, range(count), strict=False)]


def trained(base: Base, folder: Path, task: str, count: int, epochs: int) -> Adapter:
    """Train an adapter as `train-adapter` does and return it."""
    data = folder / "train.jsonl"
    with data.open("w", encoding="utf-8") as stream:
        write_records((record.fields for record in records_of(task, "train", count)), stream)
    settings = TrainingSettings(lr=5e-3, epochs=epochs, dropout=0.0, dtype="float32")
    output, silent = str(folder / "trained.safetensors"), Silent()
    train_adapter(
        base,
        str(data),
        None,
        settings=settings,
        lora=LoraSettings(),
        output=output,
        reporter=silent,
    )
    return load_adapter(output)


def random_llama(folder: Path, layers: int) -> str:
    """Write a random Llama (width 1536, 32 layers: 1.0 billion parameters) beside tiny's tokens."""
    tiny = load_base("tiny", device=torch.device("cpu"), dtype=torch.float32)
    config = transformers.LlamaConfig(
        vocab_size=len(tiny.tokenizer),
        hidden_size=1536,
        intermediate_size=4608,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        bos_token_id=tiny.tokenizer.bos_token_id,
        eos_token_id=tiny.tokenizer.eos_token_id,
        initializer_range=0.05,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    tiny.tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def random_adapter(base: Base) -> Adapter:
    """Return an adapter that changes what a random model writes, but not at every token."""
    draw = torch.Generator().manual_seed(0)
    modules = pick_modules(base, ["q_proj", "v_proj"], None)
    shapes = projections(base.model)
    factors = {
        name: (
            (torch.randn(8, shapes[name][1], generator=draw) / shapes[name][1] ** 0.5).numpy(),
            (0.02 * torch.randn(shapes[name][0], 8, generator=draw)).numpy(),
        )
        for name in modules
    }
    return Adapter(tensors_of(factors), peft_config(dict.fromkeys(modules, 8), base=base.name))


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


class Timed(NamedTuple):
    """What a run returned, and how long it took: seconds by the clock and of the processor."""

    outputs: Outputs
    seconds: float
    processor: float


def timed(work: Callable[[], Outputs], device: torch.device) -> Timed:
    started, used = time.perf_counter(), time.process_time()
    outputs = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return Timed(outputs, time.perf_counter() - started, time.process_time() - used)


def one_after_another(
    base: Base, folders: dict[int, str | None], prompts: Sequence[Sequence[int]], options: Any
) -> Outputs:
    """Decode with PEFT's model of every stripped adapter, batch by batch through `generate`."""
    pad, ends = base.end_tokens[0], set(base.end_tokens)
    outputs: Outputs = {}
    for boundary, folder in folders.items():
        model = base.model
        if folder is not None:
            model = peft.PeftModel.from_pretrained(base.model, folder).eval()
        for start in range(0, len(prompts), options.batch_size):
            rows = prompts[start : start + options.batch_size]
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
            for place, row in enumerate(sequences[:, length:].tolist(), start):
                end = next((n for n, token in enumerate(row) if token in ends), len(row))
                outputs[place, boundary] = row[:end]
        if folder is not None:
            model.unload()
    return outputs


def together(
    base: Base, adapter: Adapter, boundaries: Sequence[int], prompts: Sequence[Any], options: Any
) -> Outputs:
    """Decode at all boundaries at once, as find-boundary does."""
    with Gates(attach(base, adapter)).standing() as gates:
        pool = Pool(base, gates, prompts, options.max_new_tokens, options.batch_size)
        cuts = {bottom(k, base.layers): k for k in boundaries}
        return {(output.prompt, cuts[output.cut]): output.tokens for output in pool.run(list(cuts))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="title")
    parser.add_argument("--train", type=int, default=400, help="records to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1, help="each side's fastest counts")
    parser.add_argument("--no-baseline", action="store_true", help="leave boundary 0 out")
    parser.add_argument("--adapter", help="use this adapter, trained before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, help="a random Llama of so many layers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    device = torch.device(options.device)
    name = random_llama(folder, options.layers) if options.layers else "tiny"
    base = load_base(name, device=device, dtype=torch.float32)
    if options.layers:
        adapter = random_adapter(base)
    elif options.adapter:
        adapter = load_adapter(options.adapter)
    else:
        adapter = trained(base, folder, options.task, options.train, options.epochs)
        base = load_base(name, device=device, dtype=torch.float32)
    boundaries = list(range(1 if options.no_baseline else 0, base.layers + 1))
    folders = {k: stripped(adapter, k, folder) for k in boundaries}
    encoder = base.encoder(chat="auto")
    sample = records_of(options.task, "validation", options.sample)
    prompts = [encoder.prompt(record, options.max_new_tokens).ids for record in sample]
    plain = load_base(name, device=device, dtype=torch.float32)
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(timed(lambda: together(base, adapter, boundaries, prompts, options), device))
        theirs.append(timed(lambda: one_after_another(plain, folders, prompts, options), device))
    report(ours, theirs, boundaries)


def report(ours: Sequence[Timed], theirs: Sequence[Timed], boundaries: Sequence[int]) -> None:
    expected = theirs[0].outputs
    actual = {key: ours[0].outputs[key] for key in expected}
    tokens = sum(map(len, expected.values()))
    print(
        f"boundaries {boundaries[0]}-{boundaries[-1]}, {len(expected)} outputs, "
        f"{tokens / len(expected):.1f} tokens each"
    )
    for side, results in (("PEFT", theirs), ("lorakit", ours)):
        wall, used = min(r.seconds for r in results), min(r.processor for r in results)
        print(f"{side:8} {wall:8.1f} s, processor {used:8.1f} s")
    wall = min(r.seconds for r in theirs) / min(r.seconds for r in ours)
    used = min(r.processor for r in theirs) / min(r.processor for r in ours)
    differing = sum(actual[key] != expected[key] for key in expected)
    print(f"wall time: {wall:.2f}× faster, processor time: {used:.2f}×")
    print(f"outputs that differ: {differing} of {len(expected)}")
    if differing:
        sys.exit("the outputs are not the same")


if __name__ == "__main__":
    main()

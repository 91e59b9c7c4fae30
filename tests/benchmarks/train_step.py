"""A merge step of lorakit against PEFT with three active adapters: time, memory, and where it goes.

Both train three rank-8 adapters on q_proj and v_proj of a random Llama (width 512, 12 layers,
32,000 words) with the same weights, in the same dtype, on the same batches of 8 SciTLDR records,
tokenised by a BPE of that size learnt from SciTLDR. The peer pads each batch to its longest row and
computes the logits of every position, as PEFT with a Trainer does. Each side runs in processes of
its own, in turns. Of each step the fastest round counts; memory is the peak above what was held
after loading. On a CPU the processor time is printed too: it leaves out what other users of a
shared machine took.

    python tests/benchmarks/train_step.py --scitldr FOLDER [--steps 8] [--rounds 2] [--device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import peft_config
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.pruner import Pruner
from lorakit.merging.stack import stack
from lorakit.models.batches import epoch_batches
from lorakit.models.loading import load_base
from lorakit.models.lora import pick_modules
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.recipes.table import build_dataset
from lorakit.records.record import Record
from lorakit.settings import PruningSettings, TrainingSettings
from lorakit.training.step_hook import StepHook
from lorakit.training.trainer import Trainer

WORDS = 32_000
BATCH = 8
LR = 2e-4
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
}


def prepare(folder: Path, scitldr: str) -> None:
    """Write the base, its tokenizer, three adapters and the records into a folder."""
    records = list(build_dataset("scitldr", [scitldr]))
    (folder / "records.json").write_text(json.dumps(records))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=WORDS,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = (f"{record['prompt']}{record['completion']}" for record in records)
    tokenizer.train_from_iterator(texts, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    base = load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    modules = pick_modules(base, ["q_proj", "v_proj"], None)
    for number in range(3):
        factors = {
            name: (
                (torch.randn(8, 512) / 23).numpy(),
                (torch.randn(512, 8) / 100).numpy(),
            )
            for name in modules
        }
        adapter_config = peft_config(dict.fromkeys(modules, 8), base=str(folder), alpha=16)
        save_adapter(Adapter(tensors_of(factors), adapter_config), f"{folder}/adapter{number}/")


def batches_of(folder: Path, encoder: Any, steps: int) -> list[list[Example]]:
    records = [Record(row, row["id"]) for row in json.loads((folder / "records.json").read_text())]
    some = [encoder.example(record) for record in records[: BATCH * steps]]
    return list(epoch_batches(some, BATCH, 0, 1))


class Memory:
    """The peak of what this process, or the GPU, holds from now on above what it holds now: MB."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
        self._before = _status("VmRSS")

    def peak(self) -> float:
        top = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return (top - self._before) / 1e6


def _status(name: str) -> int:
    """Return a size of this process in bytes, by its name in /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.split(f"{name}:")[1].split()[0])


def timed(steps: Sequence[Any], memory: Memory, device: torch.device) -> dict[str, Any]:
    """Run the steps (the first to warm up); return each one's seconds, and the peak of memory."""
    seconds, processor = [], []
    for step in steps:
        started, used = time.perf_counter(), time.process_time()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
    return {"seconds": seconds[1:], "processor": processor[1:], "memory": memory.peak()}


def run_lorakit(folder: Path, steps: int, device: torch.device, tokens: int) -> dict[str, Any]:
    base = load_base(str(folder), device=device, dtype=torch.bfloat16)
    stacked = stack([load_adapter(f"{folder}/adapter{number}") for number in range(3)])
    layers = attach_stack(base, stacked, dropout=0.0)
    norms = InputNorms(layers)
    pruner = Pruner(stacked.blocks, layers, PruningSettings(Decimal("0.1")), norms=norms)
    timed_pruner = _TimedHook(pruner, device)
    settings = TrainingSettings(
        lr=LR, dropout=0.0, batch_size=BATCH, micro_batch_tokens=tokens, schedule="constant"
    )
    trainer = Trainer(
        base,
        layers,
        settings,
        accelerator=new_accelerator(device.type),
        hooks=(norms, timed_pruner),
    )
    batches = batches_of(folder, base.encoder(chat="off"), steps + 1)
    losses: list[float] = []
    memory = Memory(device)
    trainer.validate(batches[0])
    with trainer._training_mode():
        updates = [
            lambda batch=batch: losses.append(trainer._step(batch, 10**6).train_loss)
            for batch in batches
        ]
        measured = timed(updates, memory, device)
    pruning = statistics.median(timed_pruner.seconds[1:]) / statistics.median(measured["seconds"])
    return {
        **measured,
        "losses": losses,
        "pruning": pruning,
        "tokens": sum(len(row.ids) for batch in batches[1:] for row in batch),
        "targets": sum(row.targets for batch in batches[1:] for row in batch),
    }


class _TimedHook(StepHook):
    """Times what another hook does after each step."""

    name = "timed"

    def __init__(self, hook: StepHook, device: torch.device) -> None:
        self._hook, self._device = hook, device
        self.seconds: list[float] = []

    def after_step(self, step: int) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        self._hook.after_step(step)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - started)


def run_peft(folder: Path, steps: int, device: torch.device) -> dict[str, Any]:
    """Return what PEFT's steps took, and their losses."""
    encoder = load_base(str(folder), device=torch.device("cpu"), dtype=torch.bfloat16).encoder(
        chat="off"
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = peft.PeftModel.from_pretrained(
        model.to(device), folder / "adapter0", adapter_name="0", is_trainable=True
    )
    for number in (1, 2):
        model.load_adapter(folder / f"adapter{number}", str(number), is_trainable=True)
    model.base_model.set_adapter(["0", "1", "2"])
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses: list[float] = []

    def step(batch: Sequence[Example]) -> None:
        length = max(len(row.ids) for row in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(batch):
            ids[place, : len(row.ids)] = torch.tensor(row.ids)
            labels[place, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
            mask[place, : len(row.ids)] = 1
        loss = model(
            input_ids=ids.to(device), attention_mask=mask.to(device), labels=labels.to(device)
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))

    batches = batches_of(folder, encoder, steps + 1)
    measured = timed([lambda b=b: step(b) for b in batches], Memory(device), device)
    return {**measured, "losses": losses}


def matmul_rate(device: torch.device, size: int = 2048) -> float:
    """Return the machine's bf16 matrix-multiplication rate in FLOP/s, the best of ten."""
    a = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(10):
        started = time.perf_counter()
        _ = a @ a
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2.0 * size * size * size / (time.perf_counter() - started))
    return best


def flops(tokens: int, targets: int) -> float:
    """Return the multiplications and additions that no step can do without.

    Forward, and backward to the activations only: 4 a weight and token; the head where a loss is
    due; attention and the adapters, which are small, left out.
    """
    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    layer = 4 * width * width + 3 * width * inner
    return float(4 * (tokens * layer * SHAPE["num_hidden_layers"] + targets * width * WORDS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scitldr", required=True, help="the data set's folder")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=TrainingSettings.micro_batch_tokens
    )
    parser.add_argument("--side", choices=["lorakit", "peft"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.side:
        if options.side == "peft":
            measured = run_peft(options.folder, options.steps, device)
        else:
            measured = run_lorakit(
                options.folder, options.steps, device, options.micro_batch_tokens
            )
        print(json.dumps(measured))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options.scitldr)
        rounds: dict[str, list[dict[str, Any]]] = {"peft": [], "lorakit": []}
        for _ in range(options.rounds):
            for side, results in rounds.items():
                results.append(_child(side, folder))
        report(rounds, device)


def _child(side: str, folder: str) -> dict[str, Any]:
    """Return what one side's process has measured."""
    command = [sys.executable, __file__, *sys.argv[1:], "--side", side, "--folder", folder]
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if child.returncode:
        sys.exit(child.stderr)
    measured: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return measured


def fastest(results: list[dict[str, Any]], field: str) -> float:
    """Return the mean over the steps of each step's least value in any round."""
    steps = zip(*(result[field] for result in results), strict=True)
    return float(statistics.mean(min(of_step) for of_step in steps))


def report(rounds: dict[str, list[dict[str, Any]]], device: torch.device) -> None:
    time_of = {side: fastest(results, "seconds") for side, results in rounds.items()}
    used_by = {side: fastest(results, "processor") for side, results in rounds.items()}
    memory_of = {side: max(r["memory"] for r in results) for side, results in rounds.items()}
    for side in rounds:
        print(f"{side:8} {time_of[side]:8.3f} s a step {memory_of[side]:9.0f} MB above the base")
    ours = rounds["lorakit"][0]
    steps = len(ours["seconds"])
    rate = flops(ours["tokens"], ours["targets"]) / steps / time_of["lorakit"]
    pruning = min(r["pruning"] for r in rounds["lorakit"])
    first = ours["losses"][0] - rounds["peft"][0]["losses"][0]
    print(f"time: {time_of['peft'] / time_of['lorakit']:.2f}× faster than PEFT")
    if device.type == "cpu":
        print(f"processor time: PEFT takes {used_by['peft'] / used_by['lorakit']:.2f}×")
    print(f"memory: {memory_of['lorakit'] / memory_of['peft']:.2f}× PEFT's")
    print(f"pruning: {100 * pruning:.1f} % of a step")
    print(f"tokens/s: {ours['tokens'] / steps / time_of['lorakit']:.0f}")
    print(
        f"matmul rate achieved: {100 * rate / matmul_rate(device):.0f} % of the machine's in bf16"
    )
    print(f"difference of the first step's loss: {abs(first):.4f} of {ours['losses'][0]:.2f}")


if __name__ == "__main__":
    main()

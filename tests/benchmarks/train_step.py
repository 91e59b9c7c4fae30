"""A merge step of lorakit against PEFT with three active adapters: time, memory, and where it goes.

Both train three rank-8 adapters on q_proj and v_proj of a random Llama (width 512, 12 layers,
32,000 words) with the same weights, in the number format that the device is fast at, on the same
batches of 8 SciTLDR records, tokenised by a BPE of that size learnt from SciTLDR. Each side runs in
processes of its own, in turns; a step to warm up is not counted. Memory is the peak above what was
held after loading. On a CPU the ratio of the processor times is printed too: it leaves out what
other users of a shared machine took. The limit is the machine's own matrix rate in that format.

    python -m tests.benchmarks.train_step [--steps 3] [--rounds 2] [--dtype bfloat16]
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from lorakit.adapters.storage import load_adapter
from lorakit.models.architecture import decoder_layers
from lorakit.models.attention import BY_ROW
from lorakit.models.base import Base
from lorakit.models.batches import epoch_batches
from lorakit.models.loading import load_base
from lorakit.models.tokens import Encoder, Example
from lorakit.recipes.table import build_dataset
from lorakit.records.record import Record
from tests.benchmarks.machine import describe_machine, matrix_rate, pick
from tests.benchmarks.program import as_arguments, data_folder, main, option
from tests.benchmarks.result import Result
from tests.benchmarks.rounds import in_turns, ratio_of
from tests.benchmarks.shapes import SHAPES, random_adapter, save_model
from tests.benchmarks.side import in_process
from tests.benchmarks.steps import (
    Steps,
    lorakit_steps,
    peft_steps,
    save_folders,
    share_of_limit,
    tokens_of,
)

BATCH = 8


@dataclass(frozen=True)
class Options:
    shape: str = option("trained", f"the model's shape, of {', '.join(SHAPES)}")
    records: int = option(0, "records of SciTLDR that are read; 0: all of them")
    steps: int = option(3, "timed steps of a round")
    rounds: int = option(2, "turns of each side")
    device: str = option("cpu", "where both compute")
    dtype: str = option("auto", "the number format; auto: the one the device is fast at")
    micro_batch_tokens: int = option(2048, "tokens at a time, ours")
    compiled: bool = option(False, "compile our side's layers by torch.compile")


SMOKE = Options(shape="small", records=16, steps=1, rounds=1)


def measure(options: Options) -> Result:
    """Run both sides in turns, and compare what they took."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options)
        sides = {"folder": folder, **as_arguments(options)}
        ours, theirs = in_turns(
            lambda: Steps(**in_process(run_lorakit, sides)[0]),
            lambda: Steps(**in_process(run_peft, sides)[0]),
            options.rounds,
        )
        encoder = load_base(folder, device=torch.device("cpu"), dtype=torch.float32).encoder(
            chat="off"
        )
        batches = batches_of(Path(folder), encoder, options.steps + 1)
    return compared(options, ours, theirs, batches)


def compared(
    options: Options, ours: list[Steps], theirs: list[Steps], batches: list[list[Example]]
) -> Result:
    """Return the result of both sides' rounds on these batches."""
    device, dtype = pick(options.device, options.dtype)
    ratio = ratio_of([r.total for r in ours], [r.total for r in theirs])
    seconds, tokens = min(r.total for r in ours), tokens_of(batches)[0]
    rate, machine = matrix_rate(device, dtype), describe_machine(device, dtype)
    return Result(
        name="train_step",
        unit="s a step",
        ours=seconds / options.steps,
        peer=min(r.total for r in theirs) / options.steps,
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{rate / 1e9:.0f} GFLOP/s, the matrix rate in {machine.dtype}",
        limit_share=share_of_limit(SHAPES[options.shape], batches, seconds, rate),
        machine=machine,
        details={
            "processor ratio": ratio_of(
                [sum(r.processor) for r in ours], [sum(r.processor) for r in theirs]
            ).median,
            "memory, of the peer's": max(r.memory for r in ours) / max(r.memory for r in theirs),
            "memory above the base, MB": max(r.memory for r in ours),
            "pruning, of a step": min(r.pruning for r in ours),
            "matrix products, of a step": min(r.products for r in ours),
            "attention, of a step": min(r.attention for r in ours),
            "the first step, s": min(r.first for r in ours),
            "tokens/s": tokens / seconds,
            "difference of the first loss": abs(ours[0].losses[0] - theirs[0].losses[0]),
        },
    )


def run_lorakit(folder: str, **values: Any) -> dict[str, Any]:
    """Return what lorakit's steps took, as JSON holds it."""
    options = Options(**values)
    device, dtype = pick(options.device, options.dtype)
    base = load_base(folder, device=device, dtype=dtype)
    if options.compiled:
        compile_layers_(base)
    adapters = [load_adapter(f"{folder}/adapter{number}") for number in range(3)]
    batches = batches_of(Path(folder), base.encoder(chat="off"), options.steps + 1)
    tokens = options.micro_batch_tokens
    return asdict(lorakit_steps(base, adapters, batches, micro_batch_tokens=tokens))


def compile_layers_(base: Base) -> None:
    """Let torch.compile compile every layer, for any length, but for attention by rows."""
    attend = transformers.AttentionInterface()[BY_ROW]
    transformers.AttentionInterface.register(BY_ROW, torch.compiler.disable(attend))
    for layer in decoder_layers(base.model) or ():
        layer.compile(dynamic=True)


def run_peft(folder: str, **values: Any) -> dict[str, Any]:
    """Return what PEFT's steps took, as JSON holds it."""
    options = Options(**values)
    device, dtype = pick(options.device, options.dtype)
    encoder = load_base(folder, device=torch.device("cpu"), dtype=dtype).encoder(chat="off")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    folders = [f"{folder}/adapter{number}" for number in range(3)]
    batches = batches_of(Path(folder), encoder, options.steps + 1)
    return asdict(peft_steps(model.to(device), folders, batches))


def prepare(folder: Path, options: Options) -> None:
    """Write the base, its tokenizer, three adapters and the records into a folder."""
    shape = SHAPES[options.shape]
    records = list(build_dataset("scitldr", [data_folder("scitldr")]))
    records = records[: options.records or None]
    (folder / "records.json").write_text(json.dumps(records))
    texts = [f"{record['prompt']}{record['completion']}" for record in records]
    save_model(shape, folder, learnt_tokenizer(texts, shape.words))
    base = load_base(str(folder), device=torch.device("cpu"), dtype=torch.float32)
    adapters = [random_adapter(base, seed=number, strength=0.01) for number in range(3)]
    save_folders(adapters, folder)


def learnt_tokenizer(texts: list[str], words: int) -> transformers.PreTrainedTokenizerFast:
    """Return a BPE tokenizer of `words` tokens that is learnt from texts."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def batches_of(folder: Path, encoder: Encoder, steps: int) -> list[list[Example]]:
    """Return the batches of so many steps; records are read again where there are too few."""
    rows = json.loads((folder / "records.json").read_text())
    records = [Record(rows[n % len(rows)], rows[n % len(rows)]["id"]) for n in range(BATCH * steps)]
    return list(epoch_batches([encoder.example(record) for record in records], BATCH, 0, 1))


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)

"""Make `tiny`, the model that ships with lorakit: its tokenizer, its weights, its model card.

    python examples/make_tiny.py --out lorakit/tiny

A Llama of 8 layers and width 128 is trained from scratch on the microworld's base tasks, English
and Japanese, with the loss on the answers only. A model as small as this takes long to learn to
copy. So its first two layers start as a circuit that repeats what it has seen (start_copying_), and
in the first half of the run every eighth batch is random sequences to be repeated, which keeps that
circuit alive. It never sees a related, target or probe task; the tokenizer reads them all. The same
versions, seed and thread count give the same weights on one machine. Runs on a CPU, or on a GPU if
there is one.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorakit.recipes.microworld.world import TASKS, microworld

BASE = [name for name, task in TASKS.items() if task.kind == "base"]
LANGS = ("en", "ja")
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
UNK, BOS, EOS, PAD = range(4)
VOCABULARY, CONTEXT = 1020, 512
ROPE_THETA = 100000.0
BATCH, WARMUP = 32, 100
# Letters (with the space before them), single digits, and each Japanese script are cut apart, and
# punctuation stands alone, so that no token crosses the border of prompt and completion.
PIECES = r" ?[A-Za-z]+|[0-9]|[ァ-ヶー]+|[ぁ-ん]+|[一-龥]+|\s| ?[^\sA-Za-z0-9ぁ-んァ-ヶー一-龥]"


def records(task: str, lang: str, split: str, seed: int) -> list[tuple[str, str]]:
    """Return the (prompt, completion) pairs of one draw."""
    drawn = microworld(task, lang=lang, split=split, seed=seed)
    return [(str(record["prompt"]), str(record["completion"])) for record in drawn]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a BPE on the world's texts and add the 256 bytes, so that any text can be encoded."""
    cut = pre_tokenizers.Split(Regex(PIECES), "isolated")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = cut
    texts = [
        prompt + completion
        for name in TASKS
        for lang in LANGS
        if (name, lang) != ("translate", "ja")
        for prompt, completion in records(name, lang, "train", 0)
    ]
    size = VOCABULARY - len(SPECIAL) - 256
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    entries = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)]
    entries += sorted(learned["vocab"], key=learned["vocab"].__getitem__)
    tokenizer = Tokenizer(
        models.BPE(
            vocab={entry: place for place, entry in enumerate(entries)},
            merges=[tuple(pair) for pair in learned["merges"]],
            unk_token=SPECIAL[UNK],
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = cut
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=SPECIAL[UNK],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        pad_token=SPECIAL[PAD],
        model_max_length=CONTEXT,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int) -> LlamaForCausalLM:
    """Return the untrained model; eager attention trains faster on CPUs than the fused one."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    start_copying_(model)
    return model


@torch.no_grad()
def start_copying_(model: LlamaForCausalLM) -> None:
    """Set the first two layers to an induction circuit, which training alone finds only late.

    Layer 0 looks one and two tokens back (through the rotary angles, from a constant channel of the
    embeddings) and writes what it sees into channels of its own. Layer 1 looks for the position
    after an earlier occurrence of the present token, best one with the same token before it, and
    writes the token there into the content channels: so a text that begins again goes on as it did.
    Source: Olsson et al. 2022, "In-context learning and induction heads". Everything stays
    trainable.
    """
    size, width = 32, 40  # of a head; of the content channels and of each copy of them
    constant, content, one_back, two_back = 0, 1, 41, 81  # first channels
    embeddings = model.model.embed_tokens.weight
    embeddings.normal_(0.0, 0.01)
    directions = torch.randn(len(embeddings), width)
    directions /= directions.norm(dim=1, keepdim=True)
    embeddings[:, content : content + width] = 0.6 * directions
    embeddings[:, constant] = 0.3
    first, second = (model.model.layers[layer].self_attn for layer in (0, 1))
    for attention in (first, second):
        for projection in (
            attention.q_proj,
            attention.k_proj,
            attention.v_proj,
            attention.o_proj,
        ):
            projection.weight.mul_(0.1)
    fast = ROPE_THETA ** (-torch.arange(6) / 16)
    slow = [*range(7, 16), *range(23, 32)]  # coordinates that the rotary angles hardly turn
    for head in range(4):
        row, half = head * size, head % 2 * 20
        back, written = (1, one_back) if head < 2 else (2, two_back)
        first.q_proj.weight[row : row + 6, constant] = 2.0
        first.k_proj.weight[row : row + 6, constant] = 2.0 * torch.cos(back * fast)
        first.k_proj.weight[row + 16 : row + 22, constant] = 2.0 * torch.sin(back * fast)
        for place in range(20):
            first.v_proj.weight[row + place, content + half + place] = 0.25
            first.o_proj.weight[written + half + place, row + place] = 0.25
            second.v_proj.weight[row + place, content + half + place] = 0.5
            second.o_proj.weight[content + half + place, row + place] = 0.25
        for place, slot in enumerate(slow):
            own = (head * 10 + place % 11) % width
            sought, seen = (content, one_back) if place < 11 else (one_back, two_back)
            second.q_proj.weight[row + slot, sought + own] = 3.0
            second.k_proj.weight[row + slot, seen + own] = 3.0


def encode(
    tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
) -> list[list[list[int]]]:
    """Return [ids, labels] per pair: labels are -100 on the prompt; the end token closes both."""
    encoded = tokenizer(
        [prompt + completion for prompt, completion in pairs], return_offsets_mapping=True
    )
    rows = []
    for (prompt, _), ids, offsets in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        begin = len(prompt)
        labels = [
            -100 if start < begin or end <= begin else token
            for token, (start, end) in zip(ids, offsets, strict=True)
        ]
        rows.append([[*ids, EOS], [*labels, EOS]])
    return rows


def text_batches(tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[torch.Tensor]:
    """Yield (2, batch, length) ids and labels without end, rows of similar length together."""
    dice = random.Random(seed)
    draw = 0
    while True:
        draw += 1
        pairs = [
            pair for task in BASE for lang in LANGS for pair in records(task, lang, "train", draw)
        ]
        dice.shuffle(pairs)
        for start in range(0, len(pairs) - BATCH * 16 + 1, BATCH * 16):
            rows = sorted(
                encode(tokenizer, pairs[start : start + BATCH * 16]), key=lambda row: len(row[0])
            )
            groups = [rows[first : first + BATCH] for first in range(0, len(rows), BATCH)]
            dice.shuffle(groups)
            yield from map(padded, groups)


def padded(rows: list[list[list[int]]]) -> torch.Tensor:
    """Stack rows, padded at the right (causal attention needs no mask there)."""
    longest = -(-max(len(ids) for ids, _ in rows) // 8) * 8
    return torch.tensor(
        [
            [ids + [PAD] * (longest - len(ids)) for ids, _ in rows],
            [labels + [-100] * (longest - len(labels)) for _, labels in rows],
        ]
    )


def repeat_batch(vocabulary: int, dice: torch.Generator) -> torch.Tensor:
    """Return ids and labels of random sequences written twice; the labels are the second copy."""
    half = int(torch.randint(8, 40, (1,), generator=dice))
    once = torch.randint(len(SPECIAL), vocabulary, (BATCH, half), generator=dice)
    start = torch.full((BATCH, 1), BOS)
    ids = torch.cat([start, once, once], 1)
    hidden = torch.full((BATCH, half + 1), -100)
    return torch.stack([ids, torch.cat([hidden, once], 1)])


def train(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: argparse.Namespace
) -> None:
    """Train with AdamW, a warm-up and a cosine schedule; the loss is on the labels alone."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05
    )
    texts, dice = text_batches(tokenizer, options.seed), torch.Generator().manual_seed(options.seed)
    model.train()
    started, loss_sum, batches = time.time(), 0.0, 0
    for step in range(options.steps):
        repeat = step % 8 == 7 and step < options.steps // 2
        batch = repeat_batch(len(tokenizer), dice) if repeat else next(texts)
        ids, labels = batch.to(device)
        rate = min(1.0, (step + 1) / WARMUP)
        rate *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group in optimizer.param_groups:
            group["lr"] = options.lr * rate
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            counts = labels[:, 1:] != -100
            logits = model.lm_head(hidden[:, :-1][counts])
        loss = torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][counts])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not repeat:
            loss_sum += loss.item()
            batches += 1
        if (step + 1) % 50 == 0:
            seconds = time.time() - started
            print(f"step {step + 1} loss {loss_sum / batches:.3f} {seconds:.0f} s", flush=True)
            loss_sum, batches = 0.0, 0


@torch.no_grad()
def exact(model: Any, tokenizer: PreTrainedTokenizerFast, task: str, lang: str) -> float:
    """Return the share of 100 test records whose greedy output is the completion, in percent."""
    pairs = records(task, lang, "test", 0)[:100]
    exact_outputs = 0
    for start in range(0, len(pairs), 50):
        part = pairs[start : start + 50]
        inputs = tokenizer([prompt for prompt, _ in part], padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        outputs = model.generate(**inputs, max_new_tokens=100, do_sample=False)
        texts = tokenizer.batch_decode(
            outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        exact_outputs += sum(
            text == completion for text, (_, completion) in zip(texts, part, strict=True)
        )
    return 100.0 * exact_outputs / len(pairs)


CARD = """---
license: apache-2.0
language: [en, ja]
library_name: transformers
pipeline_tag: text-generation
---

# tiny

The model that ships with lorakit, so that every command runs at once, offline and on a CPU. It
knows a generated world of short documents (`lorakit build-dataset microworld`) and nothing else:
do not use it for anything but trying lorakit out and testing.

- Llama architecture: 8 layers, width 128, 4 heads, context {context}, {parameters:,} parameters,
  float32.
- Tokenizer: BPE of {vocabulary} entries with byte fallback; any text is encoded and decoded back
  unchanged. `<s>` is put before every text; `</s>` ends a completion. There is no chat template.
- Data: the train split of the microworld's base tasks, English and Japanese, drawn anew for each
  pass: {tasks}. The model never saw a related, target or probe
  task; the tokenizer learned its pieces from the train split of every task.
- Start: the first two layers are set to a circuit that copies what followed an earlier occurrence
  of a token (`start_copying_` in the script), the others are random; all are trained.
- Made by `python examples/make_tiny.py --out OUT --steps {steps} --seed {seed} --threads {threads}`
  (batches of {batch}, AdamW {lr}) in {minutes:.0f} minutes on {device}, with torch {torch},
  transformers {transformers}, Python {python}.
- Licence: Apache-2.0.

Exact greedy outputs on 100 test records of each base task, in percent (`continue` has no single
right answer and is left out):

| task | English | Japanese |
|---|---|---|
{table}
"""


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model and the tokenizer, naming its class as every reader knows it."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    path = out / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def write_card(out: Path, **facts: object) -> None:
    """Write the model card with these facts in its places."""
    (out / "README.md").write_text(CARD.format(**facts), encoding="utf-8")


def main() -> None:
    """Train the tokenizer and the model, measure them, and write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    begin = time.time()
    tokenizer = make_tokenizer()
    model: Any = make_model(len(tokenizer))  # its own types forbid `to` and `generate`
    model.to(device)
    train(model, tokenizer, options)
    model.eval()
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    minutes = (time.time() - begin) / 60
    save(model, tokenizer, options.out)
    scored = [task for task in BASE if task != "continue"]
    rows = [(task, *(exact(model, tokenizer, task, lang) for lang in LANGS)) for task in scored]
    table = "\n".join(f"| {task} | {en:.0f} | {ja:.0f} |" for task, en, ja in rows)
    print(table)
    write_card(
        options.out,
        context=CONTEXT,
        parameters=model.num_parameters(),
        vocabulary=len(tokenizer),
        tasks=", ".join(BASE),
        steps=options.steps,
        seed=options.seed,
        threads=options.threads,
        batch=BATCH,
        lr=options.lr,
        minutes=minutes,
        device="a GPU" if device == "cuda" else f"a CPU ({options.threads} threads)",
        torch=torch.__version__,
        transformers=transformers.__version__,
        python=platform.python_version(),
        table=table,
    )


if __name__ == "__main__":
    main()

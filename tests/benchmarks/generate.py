"""`generate` against transformers' own loop, at the same batch size, on real prompts.

lorakit decodes greedily by continuous batching. The peer is the same function that lorakit falls
back on, transformers' `generate`, batch after batch: of the records sorted by length, so that few
tokens are padding, and of the records as they come. All sides encode the prompts and decode the
texts, in one process; in float32 their texts must be the same, or the run ends with an error. The
limit is the matrix rate, had every token gone through the model once and what all prompts begin
with once for all.

    python -m tests.benchmarks.generate [--records 64] [--rounds 2]
    python -m tests.benchmarks.generate --model FOLDER --work scitldr,gsm8k,few-shot
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from lorakit.models.base import Base
from lorakit.models.completions import completion_of
from lorakit.models.generation import complete, generate
from lorakit.models.loading import load_base
from lorakit.models.tokens import Example
from lorakit.recipes.request import Request
from lorakit.recipes.table import build_dataset
from lorakit.records.few_shot import NO_EXAMPLES, FewShot
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.benchmarks.find_boundary import records_of, shared_prefix, weights_of
from tests.benchmarks.machine import describe_machine, matrix_rate, pick
from tests.benchmarks.peers import as_transformers_has_it
from tests.benchmarks.program import data_folder, main, option
from tests.benchmarks.result import BenchmarkError, Result
from tests.benchmarks.rounds import Timed, all_in_turns, ratio_of, timed

SORTED, AS_THEY_COME = "by length", "as they come"  # the peer's batches
Turns = Mapping[str, Sequence[Timed[list[str]]]]  # of `ours` and of each of the peer's


class Work(NamedTuple):
    """Prompts of one kind: a recipe (None: the microworld's titles), and how many tokens follow."""

    recipe: str | None
    new: int
    shots: int = 0


WORKS: dict[str, Work] = {
    "title": Work(None, 128),
    "scitldr": Work("scitldr", 48),
    "gsm8k": Work("gsm8k", 128),
    "few-shot": Work("gsm8k", 128, shots=4),
}


@dataclass(frozen=True)
class Options:
    model: str = option("tiny", "the base: tiny, or a folder")
    work: str = option("title", f"what is written, by commas, of {', '.join(WORKS)}")
    records: int = option(64, "records of each")
    batch_size: int = option(16, "rows at a time, on both sides")
    max_new_tokens: int = option(0, "tokens that are written at most; 0: as suits the work")
    rounds: int = option(2, "turns of each side")
    device: str = option("cpu", "where both compute")
    dtype: str = option("float32", "the number format; in others outputs may differ")


SMOKE = Options(records=6, batch_size=3, max_new_tokens=8, rounds=1)


def measure(options: Options) -> list[Result]:
    """Return the result of each work."""
    device, dtype = pick(options.device, options.dtype)
    base = load_base(options.model, device=device, dtype=dtype)
    return [measure_work(base, name, options) for name in options.work.split(",")]


def measure_work(base: Base, name: str, options: Options) -> Result:
    """Write by all sides in turns, and compare times and texts."""
    work = WORKS[name]
    settings = GenerationSettings(
        max_new_tokens=options.max_new_tokens or work.new, batch_size=options.batch_size
    )
    records, few_shot = records_for(work, options.records)
    turns = all_sides(base, records, settings, options.rounds, few_shot)
    result = compared(base, records, settings, turns, few_shot, name=f"generate: {name}")
    if result.details["texts that differ"] and base.dtype == torch.float32:
        raise BenchmarkError(f"{result.details['texts that differ']} texts are not the same")
    return result


def records_for(work: Work, count: int) -> tuple[list[Record], FewShot]:
    """Return the first records of a work's test split, and its examples, of the training split."""
    if work.recipe is None:
        return records_of("title", "test", count), NO_EXAMPLES
    shots = read_records(work.recipe, "train", work.shots)
    return read_records(work.recipe, "test", count), FewShot(tuple(shots), work.shots)


def read_records(recipe: str, split: str, count: int) -> list[Record]:
    """Return the first records of a recipe's split."""
    rows = build_dataset(recipe, [data_folder(recipe)], Request(split=split))
    return [Record(row, str(row["id"])) for row in itertools.islice(rows, count)]


def all_sides(
    base: Base,
    records: Sequence[Record],
    settings: GenerationSettings,
    rounds: int,
    few_shot: FewShot = NO_EXAMPLES,
    peers: Sequence[str] = (SORTED, AS_THEY_COME),
) -> Turns:
    """Return what lorakit and the peers write and take in every round, after a short warm-up."""

    few = replace(settings, max_new_tokens=2)
    by_lorakit(base, records[:2], few, few_shot)
    by_transformers(base, records[:2], few, few_shot, SORTED)
    sides: dict[str, Callable[[], list[str]]] = {
        "ours": functools.partial(by_lorakit, base, records, settings, few_shot)
    }
    for peer in peers:
        sides[peer] = functools.partial(by_transformers, base, records, settings, few_shot, peer)
    timings = {name: functools.partial(timed, side, base.device) for name, side in sides.items()}
    return all_in_turns(timings, rounds)


def by_lorakit(
    base: Base, records: Sequence[Record], settings: GenerationSettings, few_shot: FewShot
) -> list[str]:
    """Return the texts that `generate` writes."""
    encoder = base.encoder_for(settings)
    written = generate(base, encoder, records, settings, few_shot=few_shot)
    return [record.prediction for record, _ in written]


def by_transformers(
    base: Base,
    records: Sequence[Record],
    settings: GenerationSettings,
    few_shot: FewShot,
    batches: str,
) -> list[str]:
    """Return the texts that transformers' loop writes, in batches by length or as records come."""
    prompts = prompts_of(base, records, settings, few_shot)
    order = list(range(len(prompts)))
    if batches == SORTED:
        order.sort(key=lambda place: -len(prompts[place].ids))
    texts = [""] * len(prompts)
    with as_transformers_has_it(base.model):
        for start in range(0, len(order), settings.batch_size):
            places = order[start : start + settings.batch_size]
            rows = complete(base, [prompts[place].ids for place in places], settings)
            for place, ids in zip(places, rows, strict=True):
                texts[place] = completion_of(base, ids).prediction
    return texts


def prompts_of(
    base: Base, records: Sequence[Record], settings: GenerationSettings, few_shot: FewShot
) -> list[Example]:
    """Return the prompts in tokens."""
    encoder, room = base.encoder_for(settings), settings.max_new_tokens
    return [encoder.prompt(record, room, few_shot.before(record)) for record in records]


def compared(
    base: Base,
    records: Sequence[Record],
    settings: GenerationSettings,
    turns: Turns,
    few_shot: FewShot = NO_EXAMPLES,
    *,
    name: str,
) -> Result:
    """Return the result of all sides' rounds; the peer is the first after ours."""
    ours, peers = turns["ours"], {peer: turns[peer] for peer in turns if peer != "ours"}
    theirs = next(iter(peers.values()))
    ratio = ratio_of([r.seconds for r in ours], [r.seconds for r in theirs])
    prompts = [prompt.ids for prompt in prompts_of(base, records, settings, few_shot)]
    encode = base.tokenizer
    texts = [encode(text, add_special_tokens=False)["input_ids"] for text in ours[0].output]
    seconds, rate = min(r.seconds for r in ours), matrix_rate(base.device, base.dtype)
    machine = describe_machine(base.device, base.dtype)
    written = sum(map(len, texts))
    return Result(
        name=name,
        unit="s",
        ours=seconds,
        peer=min(r.seconds for r in theirs),
        ratio=ratio.median,
        spread=ratio.spread,
        limit=f"{rate / 1e9:.0f} GFLOP/s, the matrix rate in {machine.dtype}",
        limit_share=least_flops(base, prompts, written) / seconds / rate,
        machine=machine,
        details={
            **{
                key: value
                for peer in peers
                for key, value in ratios_to(peer, ours, peers[peer]).items()
            },
            "records": len(records),
            "batch size": settings.batch_size,
            "tokens a prompt": sum(map(len, prompts)) / len(prompts),
            "tokens that all prompts begin with": shared_prefix(prompts),
            "tokens a text": written / len(prompts),
            "tokens written/s": written / seconds,
            "texts that differ": sum(
                differing(ours[0].output, side[0].output) for side in peers.values()
            ),
        },
    )


def ratios_to(
    peer: str, ours: Sequence[Timed[list[str]]], theirs: Sequence[Timed[list[str]]]
) -> dict[str, float | None]:
    """Return how many times as much a peer takes, and the part of its memory that ours is."""
    by_clock = ratio_of([r.seconds for r in ours], [r.seconds for r in theirs])
    by_processor = ratio_of([r.processor for r in ours], [r.processor for r in theirs])
    own, other = (max(r.memory for r in side) for side in (ours, theirs))
    return {
        f"ratio, batches {peer}": by_clock.median,
        f"processor ratio, batches {peer}": by_processor.median,
        f"memory, of that of batches {peer}": own / other if other else None,
    }


def least_flops(base: Base, prompts: Sequence[Sequence[int]], written: int) -> float:
    """Return the multiplications and additions that no program can do without.

    Every token goes through the layers once, what all prompts begin with once for all, and the head
    where a token is written. Attention is left out.
    """
    shared = shared_prefix(prompts)
    read = shared + sum(len(prompt) - shared for prompt in prompts)
    head = int(base.model.get_output_embeddings().weight.numel())
    return 2.0 * ((weights_of(base) - head) * (read + written) + head * written)


def differing(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """Return how many texts are not the same."""
    return sum(own != other for own, other in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main(__doc__, measure, Options(), SMOKE)

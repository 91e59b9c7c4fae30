"""The kinds of work whose growth is measured, and how each must grow with each size.

A work's `prepare` builds what it needs for some sizes and returns the call to measure. To add one,
write such a function and add a line to WORKS.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import torch

from lorakit.boundary.cuts import bottom
from lorakit.boundary.decode import Pool
from lorakit.boundary.gates import Gates
from lorakit.merging.static import merge_adapters
from lorakit.models.base import Base
from lorakit.models.batches import fill_packs
from lorakit.models.generation import generate
from lorakit.models.lora import attach
from lorakit.models.tokens import Example
from lorakit.scoring.metrics import compute_statistics
from lorakit.scoring.significance import bootstrap, p_values
from lorakit.settings import GenerationSettings, SignificanceSettings, StaticSettings
from tests.benchmarks.gpu_parts import batches_of, random_records
from tests.benchmarks.shapes import Shape, random_adapter, random_base
from tests.benchmarks.static_merge import random_factors, weights_of
from tests.benchmarks.steps import merging_trainer

CPU = torch.device("cpu")
TRIALS = 1000
Run = Callable[[], None]


@dataclass(frozen=True)
class Sizes:
    """What costs can hang on: lengths in tokens, `records` those of a batch, sample or file."""

    length: int = 128
    layers: int = 4
    adapters: int = 3
    rank: int = 8
    records: int = 8
    vocabulary: int = 4096


USUAL = Sizes()
SMALLEST = Sizes(length=16, layers=2, records=2, vocabulary=64)
SIZES = tuple(entry.name for entry in fields(Sizes))


@dataclass(frozen=True)
class Growth:
    """The values of a size, the exponent that the work must have, and why, where that is not 1."""

    values: tuple[int, ...]
    must: float = 1.0
    why: str = ""

    @property
    def smoke_values(self) -> tuple[int, ...]:
        first = max(1, self.values[0] // 8)
        return first, 2 * first


@dataclass(frozen=True)
class Work:
    """What is measured, and over which sizes."""

    prepare: Callable[[Sizes], Run]
    growth: Mapping[str, Growth]
    sizes: Sizes = USUAL
    smoke: Sizes = SMALLEST


def base_of(sizes: Sizes) -> Base:
    """Return a random Llama of width 256 on the CPU, in float32."""
    shape = Shape(sizes.vocabulary, 256, 688, sizes.layers, 4, 4, context=8192, spread=0.1)
    return random_base(shape, CPU, torch.float32)


def merge_step(sizes: Sizes) -> Run:
    """A step of `merge`, pruning included, on one batch."""
    base = base_of(sizes)
    adapters = [random_adapter(base, rank=sizes.rank, seed=seed) for seed in range(sizes.adapters)]
    trainer, _ = merging_trainer(base, adapters, 2048, prunes=True)
    shape = Shape(sizes.vocabulary, 256, 688, sizes.layers, 4, 4)
    (batch,) = batches_of(shape, sizes.length, sizes.records, 1)
    trainer.validate(batch)

    def run() -> None:
        with trainer._training_mode():
            trainer._step(batch, 10**6)

    return run


def generation(sizes: Sizes) -> Run:
    """`generate` with an adapter: prompts of this length, a quarter of it written."""
    base = base_of(sizes)
    attach(base, random_adapter(base, rank=sizes.rank))
    new = max(2, sizes.length // 4)
    records = random_records(base, sizes.records, sizes.length, sizes.length)
    settings = GenerationSettings(batch_size=8, max_new_tokens=new, chat="off")
    encoder = base.encoder(chat="off")

    def run() -> None:
        list(generate(base, encoder, records, settings))

    return run


def boundary(sizes: Sizes) -> Run:
    """find-boundary at every boundary: prompts of this length, an eighth of it written."""
    base = base_of(sizes)
    layers = attach(base, random_adapter(base, rank=sizes.rank))
    draw, new = random.Random(0), max(2, sizes.length // 8)
    prompts = [
        [draw.randrange(3, sizes.vocabulary) for _ in range(sizes.length)]
        for _ in range(sizes.records)
    ]

    def run() -> None:
        with Gates(layers).standing() as gates:
            pool = Pool(base, gates, prompts, new, 8)
            list(pool.run([bottom(k, base.layers) for k in range(base.layers + 1)]))

    return run


def static_merge(sizes: Sizes) -> Run:
    """`merge --method svd` of adapters in memory, on four projections a layer of width 512."""
    names = {
        f"model.layers.{layer}.self_attn.{name}": (512, 512)
        for layer in range(sizes.layers)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    adapters = [random_factors(names, sizes.rank, seed) for seed in range(sizes.adapters)]
    settings = StaticSettings(weights=weights_of(sizes.adapters), rank=sizes.rank)

    def run() -> None:
        merge_adapters(adapters, "svd", settings=settings)

    return run


def score(sizes: Sizes) -> Run:
    """`score` of two systems by ROUGE-L and BLEU, with intervals and p-values of 1,000 trials."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(f"w{draw.randrange(50)}" for _ in range(max(2, sizes.length // 8)))

    references = [[text()] for _ in range(sizes.records)]
    systems = [[text() for _ in range(sizes.records)] for _ in range(2)]
    settings = SignificanceSettings(trials=TRIALS)

    def run() -> None:
        ours, theirs = (
            [
                [compute_statistics(texts, references, metric=name, lang="en")]
                for name in ("rougeL", "bleu")
            ]
            for texts in systems
        )
        bootstrap(ours, settings)
        p_values(ours, theirs, settings)

    return run


def packing(sizes: Sizes) -> Run:
    """How the rows of a validation set are distributed over packs of 2,048 tokens."""
    draw = random.Random(0)
    rows = [
        Example(tuple(range(draw.randint(8, sizes.length))), 4, f"row {number}")
        for number in range(sizes.records)
    ]

    def run() -> None:
        fill_packs(rows, 2048)

    return run


_QUADRATIC_ATTENTION = (
    "a token attends to all before it: quadratic where attention outweighs the rest"
)
_BOUNDARIES = "there are as many boundaries as layers, and each runs the layers above it"
_WRITTEN = (
    "fans, which read prompts and drafts, grow linearly; but boundaries leave a draft after as "
    "many tokens whatever its length, so that of more tokens a larger part is written in steps, "
    "and each step attends to all before it"
)
_TRIES = "one pack more is tried until all rows fit, more often where rows are long"
_QR = "QR of d × R factors costs d·R², and the SVD of their core R³, with R the sum of the ranks"
_FACTORS = f"linear while factors are copied; then {_QR}, a quarter of the width at 16 adapters"

WORKS: dict[str, Work] = {
    "merge step": Work(
        merge_step,
        {
            "length": Growth((64, 128, 256, 512, 1024), 1.0, _QUADRATIC_ATTENTION),
            "layers": Growth((1, 2, 4, 8)),
            "adapters": Growth((1, 2, 4, 8, 16)),
            "rank": Growth((4, 8, 16, 32, 64)),
            "records": Growth((4, 8, 16, 32)),
            "vocabulary": Growth((2048, 8192, 32_768)),
        },
    ),
    "generate": Work(
        generation,
        {
            "length": Growth((64, 128, 256, 512), 1.0, _QUADRATIC_ATTENTION),
            "layers": Growth((1, 2, 4, 8)),
            "rank": Growth((4, 16, 64)),
            "records": Growth((8, 16, 32, 64)),
            "vocabulary": Growth((2048, 8192, 32_768)),
        },
    ),
    "find-boundary": Work(
        boundary,
        {
            "length": Growth((64, 128, 256), 1.0, _WRITTEN),
            "layers": Growth((2, 4, 8, 16), 2.0, _BOUNDARIES),
            "records": Growth((4, 8, 16)),
            "vocabulary": Growth((2048, 8192, 32_768)),
        },
    ),
    "static merge": Work(
        static_merge,
        {
            "layers": Growth((2, 4, 8, 16)),
            "adapters": Growth((1, 2, 4, 8, 16), 1.0, _FACTORS),
            "rank": Growth((4, 8, 16, 32), 2.0, _QR),
        },
    ),
    "score": Work(
        score,
        {
            "length": Growth((64, 128, 256, 512), 2.0, "ROUGE-L compares every two words"),
            "records": Growth((250, 500, 1000, 2000)),
        },
        sizes=Sizes(records=500),
        smoke=Sizes(length=64, records=20),
    ),
    "packing": Work(
        packing,
        {"records": Growth((2000, 4000, 8000, 16_000), 1.0, _TRIES)},
        smoke=Sizes(records=100),
    ),
}

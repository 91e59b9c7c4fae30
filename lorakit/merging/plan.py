"""What a dry run says of a merge that trains: training's lines for the stack, or LoRAHub's.

A search over pruning settings is planned as so many merges; only one is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from lorakit.adapters.adapter import Adapter
from lorakit.merging.criteria import VALUES
from lorakit.merging.joint import Merge, assemble
from lorakit.merging.learned_weights import weight_trainer
from lorakit.merging.lorahub import EVALUATIONS, check_alike
from lorakit.merging.pruning_search import Values
from lorakit.merging.search import BUDGET
from lorakit.merging.stack import Stack, stack
from lorakit.models.base import Base
from lorakit.models.devices import device_name
from lorakit.models.estimate import (
    Part,
    lora_parameters,
    trained_parts,
    training_pass,
)
from lorakit.models.lengths import Row, read_lengths
from lorakit.models.lora import attach, check_fits
from lorakit.models.plan import (
    adapter_parts,
    lora_size,
    memory_rows,
    parameter_row,
    reading_part,
    time_row,
    timed,
)
from lorakit.models.sharing import new_accelerator
from lorakit.models.skeleton import Skeleton
from lorakit.records.jsonl import load_records
from lorakit.reporting import Reporter, Silent
from lorakit.settings import PruningSettings, SelectionSettings, TrainingSettings
from lorakit.training.loss import BatchLoss
from lorakit.training.plan import (
    corpus_rows,
    example_rows,
    micro_batches_of,
    step_row,
    time_rows,
    training_memory_rows,
)
from lorakit.training.train import resolve_auto
from lorakit.training.trainer import Trainer


def plan_merge(
    skeleton: Skeleton,
    adapters: Sequence[Adapter],
    data: str,
    val: str | None,
    *,
    settings: TrainingSettings,
    selection: SelectionSettings,
    reporter: Reporter,
    pruning: PruningSettings | None,
    values: Values = (),
    load: Callable[[], Base] | None = None,
) -> Iterator[Row]:
    """Yield what joint training would do: a line each; with `load` also the time.

    Without `pruning` it is method learned-weights, which trains a weight for each block and module
    alone. Raises LorakitError as the merge does, for records that are too long after the lines on
    their lengths.
    """
    settings = resolve_auto(settings, adapters, skeleton.base, skeleton.device)
    encoder = skeleton.base.encoder_for(settings)
    for adapter in adapters:
        check_fits(skeleton.base, adapter)
    stacked = stack(adapters)
    corpus = yield from corpus_rows(data, val, encoder, settings, reporter)
    merges = BUDGET if values == "auto" else max(1, len(set(values)))
    yield step_row(skeleton, corpus, settings, merges)
    size = lora_parameters(stacked.ranks, skeleton.shapes)
    trained = size if pruning else sum(len(block.modules) for block in stacked.blocks)
    yield parameter_row(skeleton, trained, size)
    lasting = trained_parts(size, gradients=pruning is not None)
    if pruning is not None and (pruning.prunes or values):
        lasting.append(pruning_part(stacked, size, pruning))
    yield from training_memory_rows(
        skeleton, stacked.ranks, corpus, settings, selection, lasting=lasting
    )
    if load is not None:
        loaded = load()
        merge = assemble(
            adapters,
            loaded,
            stacked,
            corpus,
            settings=settings,
            selection=SelectionSettings(),
            encoder=encoder,
        )
        yield from time_rows(_trainer(merge, pruning, values), corpus, merges)


def _trainer(merge: Merge, pruning: PruningSettings | None, values: Values) -> Trainer:
    """Return the trainer of which a step is measured; of several values the first is tried."""
    if pruning is None:
        return weight_trainer(merge, Silent())
    return merge.trainer(pruning if values == "auto" or not values else pruning.at(values[0]))


def pruning_part(stacked: Stack, size: int, pruning: PruningSettings) -> Part:
    """Return what pruning takes: the scores of all parameters in float32, and two masks of bytes.

    The masks are a step's and the one before. The gradient criterion has two running means, and
    value `init` the parameters at the start; the input criterion sums squares by feature.
    """
    gradient = 8 * size if pruning.importance == "gradient" else 0
    start = 4 * size if VALUES[pruning.prune_value].reads_start else 0
    features = sum(a.shape[0] + a.shape[1] for a, _ in stacked.factors.values())
    norms = 4 * features if pruning.importance == "input" else 0
    return Part("pruning", 6 * size + gradient + start + norms, "scores and masks")


def plan_lorahub(
    skeleton: Skeleton,
    adapters: Sequence[Adapter],
    data: str,
    *,
    settings: TrainingSettings,
    reporter: Reporter,
    load: Callable[[], Base] | None = None,
) -> Iterator[Row]:
    """Yield what `merge --method lorahub` would do: a line each; with `load` also the time.

    Raises LorakitError as `merge_lorahub` does.
    """
    settings = resolve_auto(settings, adapters, skeleton.base, skeleton.device)
    check_alike(adapters, reporter.note)
    encoder = skeleton.base.encoder_for(settings)
    reading = read_lengths(load_records(data, "prompt", "completion")[0], encoder)
    yield from example_rows(reading)
    check_fits(skeleton.base, adapters[0])
    tokens = sum(len(example.ids) for example in reading.examples)
    yield {
        "section": "work",
        "records": len(reading.examples),
        "evaluations": EVALUATIONS,
        "tokens": EVALUATIONS * tokens,
    }
    yield parameter_row(skeleton, len(adapters), lora_size(adapters[0]))
    runs = micro_batches_of(reading.examples, skeleton, settings)
    passes = {training_pass(rows, packed=skeleton.packs) for rows in runs}
    yield from memory_rows(
        skeleton,
        [skeleton.base_part(), *adapter_parts(adapters[:1])],
        [max((reading_part(skeleton, size) for size in passes), key=lambda part: part.bytes)],
    )
    if load is not None:
        loaded = load()
        attach(loaded, adapters[0])
        accelerator = new_accelerator(loaded.device.type)
        losses = BatchLoss(loaded, [], tokens=settings.micro_batch_tokens, accelerator=accelerator)
        few = runs[0]
        losses.means(few)  # warms up
        part = sum(len(example.ids) for example in few)
        seconds = timed(lambda: losses.means(few)) * tokens / part
        where = device_name(loaded.device)
        yield time_row("evaluation", seconds, f"measured on {where}: one micro-batch, by tokens")
        yield time_row("run", seconds * EVALUATIONS, f"extrapolated to {EVALUATIONS} evaluations")

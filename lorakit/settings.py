"""The settings of every command, frozen: the only place where a default is written.

What the values do is up to the functions that take them; how they are written on the command line
is up to commands/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from typing import Literal, NamedTuple

SCHEDULES = ("linear", "cosine", "constant")
LEARNED_WEIGHTS_LR = 3e-2  # of `merge --method learned-weights`, whose weights move by tenths
HOLD_OUT = 0.2  # the share of --data that validates when --val is missing
_NOT_IN_HISTORY = ("device",)  # where a run computes should not change its result
_IN_HISTORY_IF_SET = ("cut", "system", "chat_args", "keep", "group", "prune_every")

# Ratios or thresholds to choose from: none (pruning stays as set), one or several; with "auto" a
# ladder search picks them.
PruningValues = tuple[Decimal, ...] | Literal["auto"]


def _without_defaults(fields: Mapping[str, object], kind: type) -> dict[str, object]:
    """Return the fields of a kind of settings without those of _IN_HISTORY_IF_SET at default."""
    return {
        name: value
        for name, value in fields.items()
        if name not in _IN_HISTORY_IF_SET or value != getattr(kind, name)
    }


@dataclass(frozen=True)
class RunSettings:
    """How a training run reports and resumes; `log` is the path of its log, None without one.

    `track` names the tracker that is fed with the same lines.

    `checkpoint_every` is in optimiser steps; None: a checkpoint after every epoch alone.
    """

    resume: bool = False
    checkpoint_every: int | None = None
    log: str | None = None
    track: str | None = None
    quiet: bool = False


@dataclass(frozen=True)
class DryRunSettings:
    """Whether a command only says what it would do; `measure` loads the base and times a step.

    `layout` is that of what it says: `json`, `table`, or `auto`, a table on a terminal.
    """

    dry_run: bool = False
    measure: bool = False
    layout: str = "auto"


@dataclass(frozen=True)
class ModelSettings:
    """Which base model is loaded, and how; no `model` means the adapter's own, else the default.

    `load_in` quantises its weights, to `4bit` or `8bit`; `shard` shares them out over the processes
    of a launcher.
    """

    model: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    load_in: str | None = None
    shard: bool = False


@dataclass(frozen=True)
class TrainingSettings:
    """How LoRA weights are trained, by `train-adapter` and `merge` alike.

    Lengths are in tokens; `batch_size` is in examples an optimiser step, `warmup` a share of all
    steps, `patience` in epochs without a lower validation loss. `keep` says whose epoch's weights
    are the result: those of the `best` epoch on the validation set, or of the `last`, for which
    `patience` does not count. `cut` is the part of a prompt that `truncate` shortens; `system` and
    `chat_args` (names and values) go to the chat template. Without `micro_batch_tokens` the device
    decides.
    """

    lr: float = 2e-4
    epochs: int = 20
    patience: int = 3
    keep: str = "best"
    batch_size: int = 8
    micro_batch_tokens: int | None = None
    max_length: int | None = None
    truncate: bool = False
    dropout: float = 0.05
    warmup: float = 0.05
    schedule: str = "linear"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0
    cut: str = "auto"
    chat: str = "auto"
    system: str | None = None
    chat_args: tuple[tuple[str, object], ...] = ()
    dtype: str = "auto"
    device: str = "auto"

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records; some of them only where set."""
        fields = {n: value for n, value in asdict(self).items() if n not in _NOT_IN_HISTORY}
        fields = _without_defaults(fields, TrainingSettings)
        if self.chat_args:
            fields["chat_args"] = dict(self.chat_args)
        if self.keep == "last":
            del fields["patience"]
        if math.isinf(self.max_grad_norm):  # which JSON cannot hold
            fields["max_grad_norm"] = None
        return fields


LOSS = "loss"


@dataclass(frozen=True)
class SelectionSettings:
    """What decides on the validation set: `loss`, or a metric of `score` on greedy outputs.

    `select_by` compares the epochs of a run, `metric` the runs of a search over pruning settings
    (None: as `select_by`); `max_new_tokens` bounds the outputs.
    """

    select_by: str = LOSS
    metric: str | None = None
    lang: str = "en"
    max_new_tokens: int = 128

    @property
    def search_metric(self) -> str:
        """What the runs of a search are compared by."""
        return self.metric or self.select_by

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records: only those that had an effect."""
        if {self.select_by, self.search_metric} == {LOSS}:
            return {"select_by": LOSS}
        return {**asdict(self), "metric": self.search_metric}


@dataclass(frozen=True)
class LoraSettings:
    """The shape of a new adapter; no `target_modules` means query and value, no `layers` all."""

    rank: int = 8
    alpha: float = 16
    target_modules: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class PruningSettings:
    """What is reset after a step, and to what.

    With unit `parameter`, `prune_ratio` of each `group`, an exact decimal; with unit `module`, as
    many A/B pairs as make up that share, or, where there is a `prune_threshold`, those whose mean
    importance is below it. `prune_every` and `calibrate_every` are in optimiser steps; `epoch`
    prunes after the last step of each epoch, and None refreshes the input norms once an epoch.
    """

    prune_ratio: Decimal = Decimal(0)
    importance: str = "input"
    calibrate_every: int | None = None
    unit: str = "parameter"
    prune_threshold: Decimal | None = None
    prune_value: str = "zero"
    group: str = "matrix"
    prune_every: int | Literal["epoch"] = 1

    @property
    def by_threshold(self) -> bool:
        """Whether a threshold, not a ratio, says how much is reset."""
        return self.unit == "module" and self.prune_threshold is not None

    @property
    def amount_option(self) -> str:
        """The name of the setting that says how much is reset."""
        return "prune_threshold" if self.by_threshold else "prune_ratio"

    @property
    def value(self) -> Decimal:
        """How much is reset: the ratio, or the threshold."""
        threshold = self.prune_threshold if self.by_threshold else None
        return self.prune_ratio if threshold is None else threshold

    @property
    def prunes(self) -> bool:
        """Whether anything can ever be reset."""
        return bool(self.value)

    def at(self, value: Decimal) -> PruningSettings:
        """Return the same settings with another ratio or threshold."""
        if self.by_threshold:
            return replace(self, prune_threshold=value)
        return replace(self, prune_ratio=value)

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records, decimals as floats.

        Those of _IN_HISTORY_IF_SET only where they are not the default.
        """
        threshold = self.prune_threshold
        fields = {
            **asdict(self),
            "prune_ratio": float(self.prune_ratio),
            "prune_threshold": None if threshold is None else float(threshold),
        }
        return _without_defaults(fields, PruningSettings)


class LayerRun(NamedTuple):
    """The weight of the layers `first` to `last` (None: the top one) in a merge without data.

    It is `start` at the first and `end` at the last layer, and on a line in between.
    """

    first: int
    last: int | None
    start: float
    end: float


@dataclass(frozen=True)
class StaticSettings:
    """How adapters are merged without data; `density` is an exact decimal.

    No `weights` means 1 each, no `rank` the largest of the adapters'. `weights_by_layer` multiply
    them, by the names of the adapters. `keep_energy`, an exact decimal, is the share of
    ‖ΔW‖² that is kept, in each module, at the lowest rank that does, up to `max_rank`.
    """

    weights: tuple[float, ...] = ()
    weights_by_layer: tuple[tuple[str, tuple[LayerRun, ...]], ...] | None = None
    density: Decimal = Decimal(1)
    rank: int | None = None
    keep_energy: Decimal | None = None
    max_rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class ExtractSettings:
    """Which modules' differences become LoRA, and at which rank; no `layers` means all.

    Either `rank` or `keep_energy`, an exact decimal, is set; the latter up to `max_rank`.
    """

    rank: int | None = None
    keep_energy: Decimal | None = None
    max_rank: int | None = None
    target_modules: tuple[str, ...] = ("all-linear",)
    layers: tuple[int, ...] | None = None

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records, without those that are unset."""
        energy = self.keep_energy
        fields = {**asdict(self), "keep_energy": None if energy is None else float(energy)}
        return {name: value for name, value in fields.items() if value is not None}


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are written; temperature 0 is greedy decoding, top-k 0 all tokens.

    A completion ends before the first of the `stop` texts. `shots` of the examples are shown before
    each prompt, None: all; `samples` completions are written for each record.
    """

    max_new_tokens: int = 128
    batch_size: int = 16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    samples: int = 1
    shots: int | None = None
    seed: int = 0
    truncate: bool = False
    cut: str = "auto"
    max_length: int | None = None
    chat: str = "auto"
    system: str | None = None
    chat_args: tuple[tuple[str, object], ...] = ()
    dtype: str = "auto"
    device: str = "auto"


def _default_request() -> dict[str, object]:
    return {"max_tokens": 16, "temperature": 0}


@dataclass(frozen=True)
class AskingSettings:
    """How a server is asked; `timeout` is in seconds."""

    concurrency: int = 4
    timeout: float = 60.0
    retries: int = 5


@dataclass(frozen=True)
class JudgeSettings(AskingSettings):
    """How judges are asked; `request` holds the fields besides the question."""

    request: Mapping[str, object] = field(default_factory=_default_request)


@dataclass(frozen=True)
class SheetSettings:
    """How many records of each file a sheet holds (None: all), and the seed of its order."""

    sample: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class PushSettings:
    """How a folder is published; no `revision` means the main branch of the repository."""

    private: bool = False
    revision: str | None = None
    commit_message: str | None = None


@dataclass(frozen=True)
class SignificanceSettings:
    """How often a significance test swaps or draws the examples, and the seed of its draws."""

    trials: int = 10_000
    seed: int = 0


@dataclass(frozen=True)
class LayerChoiceSettings:
    """Which layers keep their LoRA, where data decides.

    `by` is what their importance is: `importance` or `output`. Either `share`, of the layers, or
    `threshold`, of the importance, says how many are kept; both are exact decimals.
    """

    by: str
    share: Decimal | None = None
    threshold: Decimal | None = None

    def history_fields(self) -> dict[str, object]:
        """Return the settings that an adapter's history records, decimals as floats."""
        amounts = {"share": self.share, "threshold": self.threshold}
        set_amounts = {name: float(value) for name, value in amounts.items() if value is not None}
        return {"by": self.by, **set_amounts}


@dataclass(frozen=True)
class BoundarySettings:
    """How the boundary layer is searched for.

    `sample` is in records; no `boundaries` means 1 … L. By evaluation, `metric` (`loss`, or one of
    `score`) decides by `rule`: best, or 1se, the smallest boundary within one standard error of it.
    `keep` says which layers keep their LoRA; the change of the others is multiplied by each of the
    `factors`, None: by 0, a plain cut. By probability, the first `tokens` positions of the
    completion are read, and the curves of the boundaries in `compare` are set beside the whole
    adapter's.
    """

    by: str = "evaluation"
    metric: str = "rougeL"
    rule: str = "best"
    keep: str = "bottom"
    factors: tuple[float, ...] | None = None
    lang: str = "en"
    sample: int = 100
    boundaries: tuple[int, ...] | None = None
    tokens: int = 4
    compare: tuple[int, ...] = ()

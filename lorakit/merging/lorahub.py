"""LoRAHub (Huang et al., 2024): weights for adapters, fitted to a few examples without gradients.

A and B are summed separately, A = Σ w_i·A_i and B = Σ w_i·B_i with the first adapter's scale, so
that ΔW has cross terms and a single adapter acts with w². The weights minimise the mean over the
examples of their mean token losses, plus 0.05·mean|w_i|; the best point tried is used. The
published optimiser, nevergrad's NGOpt, resolves to COBYLA for these problems; here it is scipy's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.adapter import Adapter, Factors, LoraModule, tensors_of
from lorakit.adapters.blocks import block_names
from lorakit.adapters.history import HistoryEntry, new_entry
from lorakit.adapters.portable import make_portable
from lorakit.adapters.storage import save_adapter
from lorakit.adapters.tensors import Pair
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.lora import attach, set_factors
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import encode_all
from lorakit.records.jsonl import load_records
from lorakit.reporting import Reporter
from lorakit.runs.resume import SavedValues, completing, path_beside, run_key
from lorakit.runs.sole_writer import sole_writer
from lorakit.settings import TrainingSettings
from lorakit.training.loss import BatchLoss
from lorakit.training.train import resolve_auto, trained_header, versions

EVALUATIONS = 40
BOUND = 1.5  # of every |w|
PENALTY = 0.05  # of the mean |w|, in nats
_SETTINGS_READ = ("max_length", "truncate", "micro_batch_tokens", "chat", "dtype")
_SHAPING = (*_SETTINGS_READ, "cut", "system", "chat_args", "device")  # what losses depend on


@dataclass(frozen=True)
class Point:
    """Weights that were tried, in the adapters' order, and their loss (nats) and objective."""

    weights: tuple[float, ...]
    loss: float
    objective: float


def merge_lorahub(
    adapters: Sequence[Adapter],
    base: Base,
    data: str,
    *,
    settings: TrainingSettings,
    output: str,
    reporter: Reporter,
    resume: bool = False,
    portable: bool = False,
) -> None:
    """Fit the weights to the records of `data` and write the composed adapter to `output`.

    The losses are saved as they are measured: with `resume`, the search takes its steps again by
    those of a killed run. Raises LorakitError naming the module in which the adapters' shapes
    differ, and for records that cannot be used.
    """
    settings = resolve_auto(settings, adapters, base)
    check_alike(adapters, reporter.note)
    encoder = base.encoder_for(settings)
    records, digest = load_records(data, "prompt", "completion")
    examples = encode_all(records, encoder.example, reporter.note)
    layers = attach(base, adapters[0])
    losses = BatchLoss(
        base, [], tokens=settings.micro_batch_tokens, accelerator=new_accelerator(base.device.type)
    )
    is_main = losses.accelerator.is_main_process
    key = run_key([getattr(settings, name) for name in _SHAPING], digest, base.record)
    key = run_key(key, [adapter.sha256 for adapter in adapters])
    side = path_beside(output, "search.resume")
    entry = _entry(adapters, settings, digest)
    reporter.describe(entry)
    reporter.start(EVALUATIONS, 1, 0)

    def loss_at(weights: Sequence[float]) -> float:
        def measure() -> list[float]:
            for name, (a, b) in compose(adapters, weights).items():
                set_factors(layers[name], a, b)
            return [float(np.mean(losses.means(examples)))]

        return saved.find(json.dumps(list(weights)), float, measure)[0]

    def report(number: int, point: Point) -> None:
        shown = ", ".join(f"{weight:.3f}" for weight in point.weights)
        text = f"evaluation {number}: weights {shown}, loss {point.loss:.4f}"
        reporter.event({"evaluation": number, **asdict(point)}, text)

    with (
        sole_writer(output, writes=is_main, adapter=True),
        SavedValues(side, resume=resume, writer="merge", writes=is_main, key=key) as saved,
    ):
        saved.values = losses.team.from_first(saved.values)
        points = search_weights(loss_at, len(adapters), report)
        best = min(points, key=lambda point: point.objective)
        if not any(best.weights):
            reporter.note(
                "the best weights are all 0: these adapters do not help the base model here"
            )
        if is_main:
            merged = _export(adapters, base, settings, entry, points, best)
            with completing(output, saved.delete):
                save_adapter(make_portable(merged) if portable else merged, output)


def compose(adapters: Sequence[Adapter], weights: Sequence[float]) -> Factors:
    """Return Σ w_i·A_i (rank, d_in) and Σ w_i·B_i (d_out, rank) by module, float32."""
    composed: dict[str, Pair] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for module in adapter.modules():
            a, b = np.float32(weight) * module.a, np.float32(weight) * module.b
            sums = composed.get(module.name)
            composed[module.name] = (a, b) if sums is None else (sums[0] + a, sums[1] + b)
    return composed


def check_alike(adapters: Sequence[Adapter], note: Callable[[str], None]) -> None:
    """Raise LorakitError naming the first module whose shapes differ between adapters.

    Scales may differ; a note warns of those that do.
    """
    first = {module.name: module for module in adapters[0].modules()}
    for adapter in adapters[1:]:
        others = {module.name: module for module in adapter.modules()}
        for name in [*first, *others]:
            shape, other = _shapes(first.get(name)), _shapes(others.get(name))
            if shape != other:
                raise LorakitError(
                    f"{adapter.name}: {name} has {other}, in {adapters[0].name} {shape}; "
                    "LoRAHub sums factors of one shape only: use --method svd or cat"
                )
        if any(first[name].scale != others[name].scale for name in first):
            note(
                f"Warning: {adapter.name} has another alpha/r than {adapters[0].name}, whose own "
                "LoRAHub applies to all"
            )


def _shapes(module: LoraModule | None) -> str:
    """Return the shapes of a module's A and B as they are put in messages."""
    if module is None:
        return "no LoRA"
    return f"A of {module.tensor_a.shape} and B of {module.tensor_b.shape}"


def search_weights(
    loss_at: Callable[[Sequence[float]], float], count: int, report: Callable[[int, Point], None]
) -> list[Point]:
    """Return the points that COBYLA tried, at most EVALUATIONS; at the first all weights are 0."""
    from scipy.optimize import minimize

    points: list[Point] = []

    def objective(z: NDArray[np.float64]) -> float:
        weights = tuple(float(weight) for weight in bounded(z))
        loss = loss_at(weights)
        penalty = PENALTY * sum(map(abs, weights)) / count
        points.append(Point(weights, loss, loss + penalty))
        report(len(points), points[-1])
        return points[-1].objective

    minimize(
        objective,
        np.zeros(count),
        method="COBYLA",
        options={"rhobeg": 1.0, "maxiter": EVALUATIONS},
    )
    return points[:EVALUATIONS]


def bounded(z: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the weights at a point z of the search: 0.5·z, reflected at ±1.5, then clipped."""
    weights = 0.5 * np.asarray(z, np.float64)
    reflected = 2 * np.clip(weights, -BOUND, BOUND) - weights
    return np.clip(reflected, -BOUND, BOUND)


def _entry(adapters: Sequence[Adapter], settings: TrainingSettings, digest: str) -> HistoryEntry:
    """Return the history entry of a search, without what it finds."""
    names = block_names(adapter.name for adapter in adapters)
    return new_entry(
        "merge",
        versions=versions(),
        settings={
            "method": "lorahub",
            **{name: getattr(settings, name) for name in _SETTINGS_READ},
        },
        parents={n: adapter.sha256 for n, adapter in zip(names, adapters, strict=True)},
        hashes={"data": digest},
    )


def _export(
    adapters: Sequence[Adapter],
    base: Base,
    settings: TrainingSettings,
    entry: HistoryEntry,
    points: Sequence[Point],
    best: Point,
) -> Adapter:
    """Return the composed adapter, with the first one's config and all points in its history."""
    weights = dict(zip(entry["parents"], best.weights, strict=True))
    complete: HistoryEntry = {
        **entry,
        "settings": {**entry["settings"], "weights": weights},
        "best": asdict(best),
        "evaluations": [asdict(point) for point in points],
    }
    header = trained_header(base, settings, complete, parents=adapters)
    return Adapter(tensors_of(compose(adapters, best.weights)), adapters[0].config, header)

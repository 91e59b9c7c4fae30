"""LoRA from the difference of two models: A and B with B·A near W_tuned - W_base, module by module.

Weights are mapped, and one difference is in memory at a time. What is no projection of a decoder
layer, such as norms and embeddings, LoRA does not hold: where it differs, a note says by how much.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from decimal import Decimal

import numpy as np

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.history import new_entry, new_header
from lorakit.adapters.names import layer_of
from lorakit.adapters.targets import peft_config
from lorakit.adapters.tensors import FLOATS, FloatArray, Pair, Tensor
from lorakit.errors import LorakitError
from lorakit.export.model_folder import ModelFolder
from lorakit.export.weight_files import open_weights
from lorakit.merging.low_rank import Matrix, energy_rank, fit
from lorakit.merging.spectrum import fit_lines, layer_fit
from lorakit.models.lora import is_transposed, pick_modules, projections
from lorakit.reporting import Reporter
from lorakit.settings import ExtractSettings
from lorakit.versions import version_of

# Factors near a difference, the square of what they leave out, and that of the whole.
Fit = tuple[Pair, float, float]
_FIRST_RANK = 16  # tried for an energy; doubled until it is kept


def extract(
    base: ModelFolder, tuned: ModelFolder, *, settings: ExtractSettings, reporter: Reporter
) -> Adapter:
    """Return the adapter, float32, at scale 1, whose ΔW are nearest to the models' difference.

    Modules that do not differ get no LoRA. Notes say rank and error by layer, and what else
    differs. Raises LorakitError for models of other shapes, for quantised ones, for values that
    are not finite, and where no module differs.
    """
    stored, changed = (_weights(model) for model in (base, tuned))
    _check_shapes(stored, changed, base, tuned)
    modules = pick_modules(base.as_base, settings.target_modules, settings.layers)
    keys = {module: base.weight_of(module, stored.keys()) for module in modules}
    fits: dict[str, Fit] = {}
    for module in reporter.track(modules, "extracting"):
        key = keys[module]
        difference = _difference(stored[key], changed[key], f"{tuned.name}: {key}")
        if base.stores_transposed(module):
            difference = np.ascontiguousarray(difference.T)
        if difference.any():
            fits[module] = nearest(difference, settings)
    if not fits:
        raise LorakitError(
            f"{tuned.name} does not differ from {base.name} in {', '.join(settings.target_modules)}"
            "; give the tuned model by --tuned"
        )
    _report_fits(fits, reporter)
    if warning := _rest_line(stored, changed, {key for key in stored if key not in keys.values()}):
        reporter.note(warning)
    return _adapter(base, {name: pair for name, (pair, _, _) in fits.items()}, changed, settings)


def _report_fits(fits: Mapping[str, Fit], reporter: Reporter) -> None:
    """Note the ranks and the error of every layer."""
    layers: dict[int | None, list[tuple[int, float, float]]] = {}
    for module, ((a, _), lost, whole) in fits.items():
        layers.setdefault(layer_of(module), []).append((len(a), lost, whole))
    for line in fit_lines(layer_fit(layer, sizes) for layer, sizes in layers.items()):
        reporter.note(line)


def _weights(model: ModelFolder) -> Mapping[str, Tensor]:
    """Return a model's tensors by name; LorakitError where they are quantised."""
    if (method := model.quantisation) is not None:
        raise LorakitError(
            f"{model.name} is quantised ({method}); give the model it was made from, whose weights "
            "are plain numbers"
        )
    return open_weights(model.folder, model.name).tensors


def _check_shapes(
    stored: Mapping[str, Tensor],
    changed: Mapping[str, Tensor],
    base: ModelFolder,
    tuned: ModelFolder,
) -> None:
    """Raise LorakitError for a tensor that only one model has, or that has another shape."""
    if odd := sorted(stored.keys() ^ changed.keys()):
        lacks = tuned.name if odd[0] in stored else base.name
        raise LorakitError(f"{lacks} has no {odd[0]}; give two models of one architecture")
    for key, tensor in stored.items():
        if tensor.shape != changed[key].shape:
            shapes = f"{_dims(tensor)} in {base.name}, {_dims(changed[key])} in {tuned.name}"
            raise LorakitError(
                f"{key} is {shapes}; LoRA cannot hold added tokens or other sizes: give two models "
                "of one size"
            )


def _dims(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _difference(before: Tensor, after: Tensor, where: str) -> FloatArray:
    """Return W_tuned - W_base in float32; LorakitError where it is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        difference = after.array() - before.array()
    before.release()
    after.release()
    if not np.isfinite(difference).all():
        raise LorakitError(f"{where} holds values that are not finite; take a new copy")
    return difference


def nearest(difference: FloatArray, settings: ExtractSettings) -> Fit:
    """Return factors near a matrix, the square of what they leave out, and of the whole.

    Of rank `settings.rank`, or of the lowest rank that keeps `settings.keep_energy`, which doubling
    the rank of the fit finds: its error is at most a thousandth above that of the best fit.
    """
    whole = float(np.sum(difference.astype(np.float64) ** 2))
    most = min(*difference.shape, settings.rank or settings.max_rank or max(difference.shape))
    if settings.keep_energy is None:
        pair = fit(difference, most)
    else:
        pair = _keeping(difference, settings.keep_energy, whole, most)
    a, b = pair
    left = difference - b @ a
    return pair, float(np.sum(left.astype(np.float64) ** 2)), whole


def _keeping(difference: FloatArray, energy: Decimal, whole: float, most: int) -> Pair:
    """Return the fit of the lowest rank that keeps a share of the energy, and of at most `most`."""
    rank = min(_FIRST_RANK, most)
    while True:
        a, b = fit(difference, rank)
        values: Matrix = np.linalg.norm(a.astype(np.float64), axis=1) ** 2
        kept = float(np.sum(values**2))
        if kept >= float(energy) * whole:
            needed = _lowest(values, energy, whole)
            return np.ascontiguousarray(a[:needed]), np.ascontiguousarray(b[:, :needed])
        if rank == most:
            needed = energy_rank(values, Decimal(1))
            return np.ascontiguousarray(a[:needed]), np.ascontiguousarray(b[:, :needed])
        rank = min(2 * rank, most)


def _lowest(values: Matrix, energy: Decimal, whole: float) -> int:
    """Return how many of the falling values have the share `energy` of the whole as squares."""
    return min(len(values), 1 + int(np.searchsorted(np.cumsum(values**2), float(energy) * whole)))


def _rest_line(
    stored: Mapping[str, Tensor], changed: Mapping[str, Tensor], rest: set[str]
) -> str | None:
    """Return a warning about the other tensors that differ, and the one that does most."""
    shares = {}
    for key in sorted(rest):
        before, after = stored[key], changed[key]
        if bytes(before.data) == bytes(after.data) or before.dtype not in FLOATS:
            continue
        values = before.array().astype(np.float64)
        norm = math.sqrt(float(np.sum(values**2)))
        difference = float(np.linalg.norm(after.array().astype(np.float64) - values))
        if difference:
            shares[key] = difference / norm if norm else math.inf
        before.release()
        after.release()
    if not shares:
        return None
    most = max(shares, key=lambda key: shares[key])
    return (
        f"Warning: {len(shares)} other tensors differ, which the adapter leaves as in the base: "
        f"most {most}, by {shares[most]:.2g} of its norm"
    )


def _adapter(
    base: ModelFolder,
    pairs: Mapping[str, Pair],
    changed: Mapping[str, Tensor],
    settings: ExtractSettings,
) -> Adapter:
    ranks = {module: len(a) for module, (a, _) in pairs.items()}
    config = peft_config(
        ranks,
        base=base.name,
        transposed=is_transposed(base.as_base, list(ranks)),
        projections=projections(base.model),
    )
    entry = new_entry(
        "extract",
        versions={package: version_of(package) for package in ("lorakit", "numpy")},
        settings=settings.history_fields(),
        parents={"tuned": _sha256(changed)},
    )
    return Adapter(tensors_of(pairs), config, new_header(entry, base=base.as_base.record))


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of tensors' names, formats, shapes and bytes, whatever files hold them."""
    rows = []
    for key, tensor in sorted(tensors.items()):
        digest = hashlib.sha256()
        for piece in tensor.pieces():
            digest.update(piece)
        rows.append([key, tensor.dtype, tensor.shape, digest.hexdigest()])
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

"""DoRA as plain LoRA: factors near W' - W0, where W' is what DoRA makes of the base's weights.

DoRA gives every output's weights another length, which no matrix of low rank does exactly; how much
is lost is told layer by layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lorakit.adapters.adapter import Adapter, LoraModule, tensors_of
from lorakit.adapters.base_model import base_name
from lorakit.adapters.blocks import plain_name
from lorakit.adapters.history import Header, new_entry, with_entry
from lorakit.adapters.names import whole_key
from lorakit.adapters.targets import merged_config
from lorakit.adapters.tensors import FloatArray, Pair
from lorakit.export.dequantised import Weight, plain_weights
from lorakit.export.fuse import check_fusible
from lorakit.export.fused import Fused
from lorakit.export.model_folder import ModelFolder
from lorakit.export.weight_files import open_weights
from lorakit.merging.extract import nearest
from lorakit.merging.spectrum import fit_lines, layer_fit
from lorakit.reporting import Reporter
from lorakit.settings import ExtractSettings
from lorakit.versions import version_of


def approximate_dora(
    adapters: Sequence[Adapter], base: ModelFolder, *, rank: int | None, reporter: Reporter
) -> list[Adapter]:
    """Return the adapters, those of DoRA as plain LoRA of `rank`, None: of each module's own.

    Notes say the error ‖ΔW - fit‖ / ‖ΔW‖ by layer. Raises LorakitError where one does not fit the
    base.
    """
    return [
        _approximated(adapter, base, rank, reporter) if adapter.is_dora else adapter
        for adapter in adapters
    ]


def _approximated(
    adapter: Adapter, base: ModelFolder, rank: int | None, reporter: Reporter
) -> Adapter:
    check_fusible(adapter, base)
    files = plain_weights(base, open_weights(base.folder, base.name))
    stored = {key: weight for weights in files.values() for key, weight in weights.items()}
    pairs: dict[str, Pair] = {}
    sizes: dict[int | None, list[tuple[int, float, float]]] = {}
    for module in reporter.track(adapter.modules(), "approximating"):
        own = adapter.whole.get(f"{module.name}.weight")
        weight = own or stored[base.weight_of(module.name, stored.keys())]
        change = _change(module, weight, transposed=base.stores_transposed(module.name))
        pair, lost, whole = nearest(change, ExtractSettings(rank=rank or module.rank))
        pairs[module.name] = pair
        sizes.setdefault(module.layer, []).append((len(pair[0]), lost, whole))
    for line in fit_lines(layer_fit(layer, of_layer) for layer, of_layer in sizes.items()):
        reporter.note(f"{plain_name(adapter.name)} without DoRA, {line}")
    return _plain(adapter, pairs, rank)


def _change(module: LoraModule, weight: Weight, *, transposed: bool) -> FloatArray:
    """Return W' - W0 (d_out × d_in) in float32."""
    fused = Fused(module.name, weight, "F32", module, transposed)
    rows = [np.frombuffer(piece, "<f4") for piece in fused.pieces()]
    change: FloatArray = np.concatenate(rows).reshape(weight.shape) - weight.array()
    return np.ascontiguousarray(change.T) if transposed else change


def _plain(adapter: Adapter, pairs: dict[str, Pair], rank: int | None) -> Adapter:
    """Return an adapter of these factors, at scale 1, with the whole weights of another."""
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    whole = {whole_key(name, pairs): tensor for name, tensor in adapter.whole.items()}
    entry = new_entry(
        "merge",
        versions={package: version_of(package) for package in ("lorakit", "numpy", "torch")},
        settings={"approximate": "dora"} | ({} if rank is None else {"rank": rank}),
        parents={plain_name(adapter.name): adapter.sha256},
    )
    header: Header = with_entry(adapter.header, entry)
    header.pop("blocks", None)
    config = merged_config([adapter.config], ranks, base=base_name(adapter))
    return Adapter(tensors_of(pairs) | whole, config, header, adapter.name)

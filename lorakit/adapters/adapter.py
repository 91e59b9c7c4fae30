"""LoRA adapters in memory: one A and one B for each module they change, by PEFT's names.

This module knows no files: storage.py reads, checks and writes them. What the config means is in
config.py, what the header holds in history.py, what a tensor is in tensors.py.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lorakit.adapters.config import Config, config_text, scale_of
from lorakit.adapters.history import Header
from lorakit.adapters.names import (
    layer_of,
    lora_name,
    magnitude_name,
    module_names,
    whole_name,
)
from lorakit.adapters.tensors import FloatArray, Pair, Tensor
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote

Factors = Mapping[str, Pair]  # by module


@dataclass(frozen=True)
class LoraModule:
    """A view of one A/B pair: the weights of the module `name` change by s·B·A.

    `a` (r × d_in) and `b` (d_out × r) are float32 and read-only. F32 tensors are not copied; others
    are widened at each access, so that a whole adapter is never in memory twice. With DoRA's
    `magnitude` m (d_out), the weights become m · (W0 + s·B·A) / ‖W0 + s·B·A‖, row by row.
    """

    name: str
    layer: int | None
    tensor_a: Tensor
    tensor_b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def a(self) -> FloatArray:
        return self.tensor_a.array()

    @property
    def b(self) -> FloatArray:
        return self.tensor_b.array()

    @property
    def rank(self) -> int:
        return self.tensor_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of ΔW, (d_out, d_in)."""
        return self.tensor_b.shape[0], self.tensor_a.shape[1]

    def delta(self) -> NDArray[np.float64]:
        """Return ΔW = s·B·A (d_out × d_in), dense, computed in float64."""
        product: NDArray[np.float64] = self.b.astype(np.float64) @ self.a.astype(np.float64)
        return self.scale * product

    def norm(self) -> float:
        """Return the Frobenius norm of ΔW, |s|·√tr((BᵀB)(AAᵀ)), without the dense ΔW."""
        return abs(self.scale) * product_norm(self.a, self.b)


@dataclass(frozen=True)
class Adapter:
    """An adapter: tensors by PEFT's names, PEFT's config, and lorakit's header.

    Tensors are A and B of modules, and may be DoRA's magnitudes and whole weights of the base's.
    The header is {} for an adapter of another program. `name` is what messages call the adapter.
    Operations return a new one; nothing here is changed in place.
    """

    tensors: Mapping[str, Tensor]
    config: Config
    header: Header = field(default_factory=Header)
    name: str = "the adapter"

    @functools.cached_property
    def sha256(self) -> str:
        """The SHA-256 of what the adapter computes: of its config's text and its tensors' hashes.

        Header, file layout and the order of keys are left out, so that an adapter has the same hash
        as a single file, as a folder, and when it is written again.
        Raises LorakitError for a value that is not finite.
        """
        hashes = _finite_hashes(self.tensors, self.name)
        listed = sorted(self.tensors.items())
        rows = [[key, tensor.dtype, tensor.shape, hashes[key]] for key, tensor in listed]
        return hashlib.sha256((config_text(self.config) + json.dumps(rows)).encode()).hexdigest()

    def modules(self) -> list[LoraModule]:
        """Return the A/B pairs by layer, then name. Cheap: values are converted only on access."""
        return list(self._modules)

    @functools.cached_property
    def whole(self) -> Mapping[str, Tensor]:
        """The weights that replace the base's own, by their names there: PEFT's modules_to_save."""
        named = {whole_name(key): tensor for key, tensor in sorted(self.tensors.items())}
        return {name: tensor for name, tensor in named.items() if name is not None}

    @property
    def is_dora(self) -> bool:
        """Whether modules have DoRA's magnitudes besides A and B."""
        return bool(self.config.get("use_dora"))

    @functools.cached_property
    def _modules(self) -> tuple[LoraModule, ...]:
        return tuple(self._module(name) for name in module_names(self.tensors))

    def _module(self, name: str) -> LoraModule:
        a, b = (self.tensors[lora_name(name, factor)] for factor in ("A", "B"))
        magnitude = self.tensors.get(magnitude_name(name))
        return LoraModule(name, layer_of(name), a, b, scale_of(self.config, name), magnitude)


def tensors_of(factors: Factors) -> dict[str, Tensor]:
    """Return the factors as the float32 tensors of an adapter, by PEFT's names."""
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[lora_name(name, "A")] = Tensor.from_array(a)
        tensors[lora_name(name, "B")] = Tensor.from_array(b)
    return tensors


def product_norm(a: FloatArray, b: FloatArray) -> float:
    """Return the Frobenius norm of B·A for A (r × d_in) and B (d_out × r), in float64."""
    a64, b64 = a.astype(np.float64), b.astype(np.float64)
    square = float(np.sum((b64.T @ b64) * (a64 @ a64.T)))
    return math.sqrt(max(square, 0.0))


def _finite_hashes(tensors: Mapping[str, Tensor], name: str) -> dict[str, str]:
    """Return the SHA-256 of every tensor.

    Raises LorakitError for a tensor with a value that is not finite. Nothing else done to an
    adapter takes as long, so each tensor is checked and hashed in one pass, by several threads with
    a share of the tensors each: those of one projection take less than to hand them to a thread.
    """
    from concurrent.futures import ThreadPoolExecutor

    keys = sorted(tensors)
    threads = os.cpu_count() or 1
    size = -(-len(keys) // threads) or 1
    shares = [keys[first : first + size] for first in range(0, len(keys), size)]
    hashes: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(lambda share: [tensors[key].finite_sha256() for key in share], shares)
        for key, digest in zip(keys, itertools.chain.from_iterable(found), strict=True):
            if digest is None:
                where = f"{name}: tensor {quote(key)}"
                raise LorakitError(f"{where} holds values that are not finite; train it again")
            hashes[key] = digest
    return hashes

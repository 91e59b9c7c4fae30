"""Blocks: the parts of a merged adapter that came from one source adapter each.

An adapter that was merged side by side is a stack: a block is a run of rows of A, and the same
columns of B, in every module its source adapter had. Everything that reads or writes the blocks in
an adapter's header is here. Another program may have written the header, so any field may be
missing or null, and unknown ones present: BlockFields is a block as the header has it, Block a
complete one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TypedDict

import numpy as np

from lorakit.adapters.tensors import FloatArray, Pair
from lorakit.errors import LorakitError
from lorakit.foreign_text import quote


class SliceFields(TypedDict, total=False):
    """A slice as the header has it."""

    offset: int
    rank: int
    scale: float


class BlockFields(TypedDict, total=False):
    """A block as the header has it; `zeros` is its share of zero parameters.

    `reset`, where pruning resets to another value than zero, is the share that stood at that value.
    """

    name: str
    sha256: str
    zeros: float
    reset: float
    modules: dict[str, SliceFields]


@dataclass(frozen=True)
class Slice:
    """Where a block lies in one module: rows offset … offset+rank of A, and those columns of B.

    `scale` is the factor by which the source's B is multiplied, or will be once it is folded in.
    """

    offset: int
    rank: int
    scale: float

    @property
    def span(self) -> slice:
        return slice(self.offset, self.offset + self.rank)


@dataclass(frozen=True)
class Block:
    """The part of a stacked adapter that came from one source adapter, whose SHA-256 it records."""

    name: str
    sha256: str
    modules: Mapping[str, Slice]

    def pairs(self, factors: Mapping[str, Pair]) -> Iterator[Pair]:
        """Yield the block's rows of A and columns of B in each of its modules."""
        for name, part in self.modules.items():
            a, b = factors[name]
            yield a[part.span], b[:, part.span]

    def fields(self, zeros: float, reset: float | None = None) -> BlockFields:
        """Return the block as the header has it, with its share of zero parameters.

        `reset` is the share that stands at the value that pruning resets to, None to leave it out.
        """
        modules: dict[str, SliceFields] = {
            name: {"offset": part.offset, "rank": part.rank, "scale": part.scale}
            for name, part in self.modules.items()
        }
        fields: BlockFields = {
            "name": self.name,
            "sha256": self.sha256,
            "zeros": zeros,
            "modules": modules,
        }
        if reset is not None:
            fields["reset"] = reset
        return fields


def share_of_zeros(pairs: Iterable[Pair]) -> float:
    """Return the share of parameters, A and B together, that are exactly zero; 0 for no pairs."""
    zeros = count = 0
    for pair in pairs:
        for values in pair:
            zeros += values.size - int(np.count_nonzero(values))
            count += values.size
    return zeros / count if count else 0.0


def read_blocks(blocks: Sequence[BlockFields] | None) -> list[Block] | None:
    """Return the blocks of a header; None if there are none or one of them lacks a field."""
    try:
        return [_read_block(fields) for fields in blocks or ()] or None
    except (AttributeError, KeyError, TypeError):
        return None


def _read_block(fields: BlockFields) -> Block:
    modules = {
        name: Slice(int(part["offset"]), int(part["rank"]), float(part["scale"]))
        for name, part in fields["modules"].items()
    }
    return Block(str(fields["name"]), str(fields["sha256"]), modules)


def narrowed(block: BlockFields, modules: Mapping[str, SliceFields], zeros: float) -> BlockFields:
    """Return a header's block with fewer modules, or the same, and their share of zeros.

    The share `reset` is dropped with a module, since it cannot be counted again.
    """
    fields: BlockFields = {**block, "modules": dict(modules), "zeros": zeros}
    if modules.keys() != slices_of(block).keys():
        fields.pop("reset", None)
    return fields


def slices_of(block: BlockFields) -> dict[str, SliceFields]:
    """Return the slices of a header's block by module, with {} for a null slice."""
    return {name: part or {} for name, part in (block.get("modules") or {}).items()}


def span_of(part: SliceFields) -> slice:
    """Return the rows of A, or columns of B, that a header's slice names."""
    first = part.get("offset") or 0
    return slice(first, first + (part.get("rank") or 0))


def pair_of(part: SliceFields, a: FloatArray, b: FloatArray) -> Pair:
    """Return the rows of A and the columns of B that a header's slice names."""
    span = span_of(part)
    return a[span], b[:, span]


def check_blocks(
    blocks: Sequence[BlockFields] | None, ranks: Mapping[str, int], where: str
) -> None:
    """Raise LorakitError for two blocks of the same name and for a slice outside the adapter.

    `ranks` holds the rank of each of the adapter's modules; `where` names the header in messages.
    """
    blocks = [block or {} for block in blocks or ()]
    names = [name for block in blocks if (name := block.get("name")) is not None]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise LorakitError(f"{where} names two blocks {quote(repeated[0])}; take a new copy")
    for block in blocks:
        for module, part in slices_of(block).items():
            _check_slice(part, ranks.get(module), f"{where}: block {quote(module)}")


def _check_slice(part: SliceFields, rank: int | None, where: str) -> None:
    first, length = part.get("offset") or 0, part.get("rank") or 0
    if rank is None or first < 0 or length < 0 or first + length > rank:
        raise LorakitError(f"{where} is outside the adapter; take a new copy of the adapter")


def block_names(adapter_names: Iterable[str]) -> list[str]:
    """Return a name for the block of each adapter; a second `xs` becomes `xs-2`."""
    return unique_names(plain_name(name) for name in adapter_names)


def plain_name(adapter_name: str) -> str:
    """Return a short name of an adapter: its file's, or its folder's if PEFT named the file."""
    path = PurePath(adapter_name)
    plain = path.parent.name if path.stem in ("adapter_model", "adapter") else path.stem
    return plain or path.stem or "adapter"


def unique_names(plain_names: Iterable[str]) -> list[str]:
    """Return the names in order, a second and third `xs` as `xs-2` and `xs-3`."""
    names: list[str] = []
    for plain in plain_names:
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names

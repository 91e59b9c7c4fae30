"""Blocks: their names, and what is read from the headers of other programs."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.adapters.blocks import Block, Slice, block_names, narrowed, read_blocks, slices_of


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.safetensors", "b/a.safetensors"], ["a", "a-2"]),
        (["x/adapter_model.safetensors", "x"], ["x", "x-2"]),
        (["stdin"], ["stdin"]),
        (["hf://me/my-lora@main"], ["my-lora@main"]),
    ],
    ids=["same stem", "folder", "pipe", "hub"],
)
def test_block_names_come_from_file_names(names: list[str], expected: list[str]) -> None:
    assert block_names(names) == expected


def test_a_block_is_read_as_it_was_written() -> None:
    block = Block("xs", "11", {"q": Slice(2, 4, 0.5)})
    assert read_blocks([block.fields(0.25)]) == [block]


def test_the_share_reset_is_written_where_it_is_known() -> None:
    block = Block("xs", "11", {"q": Slice(2, 4, 0.5)})
    assert "reset" not in block.fields(0.25)
    assert block.fields(0.25, 0.0)["reset"] == 0
    assert read_blocks([block.fields(0.25, 0.1)]) == [block]


@pytest.mark.parametrize(("names", "reset"), [("qv", 0.1), ("q", None)], ids=["all", "fewer"])
def test_the_share_reset_goes_with_a_module(names: str, reset: float | None) -> None:
    block = Block("xs", "11", {name: Slice(0, 4, 0.5) for name in "qv"}).fields(0.25, 0.1)
    less = narrowed(block, {name: block["modules"][name] for name in names}, 0.5)
    assert (list(less["modules"]), less["zeros"], less.get("reset")) == ([*names], 0.5, reset)
    assert block["reset"] == 0.1


INCOMPLETE = {
    "no list": None,
    "an empty list": [],
    "a null": [None],
    "no modules": [{"name": "x", "sha256": "1"}],
    "null modules": [{"name": "x", "sha256": "1", "modules": None}],
    "a null slice": [{"name": "x", "sha256": "1", "modules": {"q": None}}],
    "no scale": [{"name": "x", "sha256": "1", "modules": {"q": {"offset": 0, "rank": 1}}}],
}


@pytest.mark.parametrize("blocks", INCOMPLETE.values(), ids=INCOMPLETE.keys())
def test_blocks_that_lack_a_field_are_none(blocks: Any) -> None:
    assert read_blocks(blocks) is None


@pytest.mark.parametrize("block", [{}, {"modules": None}], ids=str)
def test_a_block_without_modules_has_no_slices(block: Any) -> None:
    assert slices_of(block) == {}

"""Rows with new tokens in different numbers attend as each row does by itself."""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers

from lorakit.models import ragged as ragged_module
from lorakit.models import shared_keys
from lorakit.models.attention import BY_ROW
from lorakit.models.ragged import RaggedRows, ragged
from lorakit.models.shared_keys import RowsAlike

HEADS, WIDTH = 6, 8
LOWEST = torch.finfo(torch.float32).min
plain_attention = transformers.AttentionInterface()["sdpa"]


def layer_of(group: int) -> Any:
    """Return what attention asks of a layer in which so many heads share keys."""
    return types.SimpleNamespace(num_key_value_groups=group, is_causal=True)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many keys each call of the kernel with sums sees, however few rows share them."""
    monkeypatch.setattr(shared_keys, "_LEAST", 1)
    seen: list[int] = []
    attend = shared_keys.attend_with_sums

    def noting(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments[2].shape[2])
        return attend(*arguments, **settings)

    monkeypatch.setattr(shared_keys, "attend_with_sums", noting)
    return seen


def layout_of(
    lengths: Sequence[int], starts: Sequence[int], alike: int = 0
) -> tuple[RowsAlike, torch.Tensor]:
    """Return the rows, and the positions (rows, columns) of their new tokens, 0 in the padding."""
    width = max(lengths)
    positions = torch.full((len(lengths), width), -1)
    for place, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        positions[place, width - length :] = torch.arange(start, start + length)
    row, column = torch.where(positions >= 0)
    visible = [a + b for a, b in zip(lengths, starts, strict=True)]
    return RowsAlike(row, column, list(lengths), visible, alike=alike), positions.clamp_min(0)


def mask_of(positions: torch.Tensor, visible: int, window: int | None) -> torch.Tensor:
    back = positions[:, None, :, None] - torch.arange(visible)
    hidden = (back < 0) | (back >= (window or visible + 1))
    return torch.zeros(hidden.shape).masked_fill(hidden, LOWEST)


def way_of(rows: RaggedRows, group: int) -> str:
    """Return how rows attend where so many heads share keys."""
    if rows.width >= ragged_module._WIDE:
        return "divided"
    return "padded" if rows._pads(group) else "planned"


@pytest.mark.parametrize("alike", [0, 9])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(
    ("way", "lengths", "starts"),
    [
        ("planned", [1, 1, 1], [7, 3, 11]),
        ("planned", [1, 9, 1, 1, 1, 1, 1, 1], [7, 3, 11, 0, 2, 9, 4, 4]),
        ("planned", [14, 1, 1, 1, 1, 1, 1, 2], [7, 3, 11, 0, 2, 9, 4, 4]),
        ("padded", [2, 3, 1], [7, 3, 11]),
        ("padded", [4], [2]),
        ("divided", [20, 3, 1], [0, 3, 11]),
        ("divided", [17, 30], [0, 9]),
        ("divided", [1, 1, 1, 16, 2, 40], [7, 3, 11, 0, 5, 0]),
        ("divided", [1, 5, 1, 1, 1, 1, 1, 1, 18], [7, 3, 11, 0, 2, 9, 4, 4, 20]),
        ("divided", [2, 3, 1, 19], [7, 3, 60, 0]),
    ],
)
def test_every_row_attends_as_by_itself(
    way: str,
    lengths: list[int],
    starts: list[int],
    group: int,
    window: int | None,
    alike: int,
    kernels: list[int],
) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, positions = layout_of(lengths, [alike + start for start in starts], alike)
    assert way_of(rows, group) == way
    visible, total = max(rows.visible), sum(lengths)
    query = torch.randn(1, HEADS, total, WIDTH, generator=draw)
    key, value = torch.randn(2, len(lengths), HEADS // group, visible, WIDTH, generator=draw)
    key[:, :, :alike], value[:, :, :alike] = key[:1, :, :alike], value[:1, :, :alike]
    mask, layer = mask_of(positions, visible, window), layer_of(group)
    attend = transformers.AttentionInterface()[BY_ROW]
    with ragged(rows), torch.no_grad():
        found = [attend(layer, query, key, value, mask)[0] for _ in range(2)]
    begin = 0
    for row, (length, seen) in enumerate(zip(lengths, rows.visible, strict=True)):
        own = slice(row, row + 1)
        expected, _ = plain_attention(
            layer,
            query[:, :, begin : begin + length],
            key[own, :, :seen],
            value[own, :, :seen],
            mask[own, :, -length:, :seen],
        )
        for attended in found:
            assert attended.shape == (1, total, HEADS, WIDTH)
            torch.testing.assert_close(attended[:, begin : begin + length], expected)
        begin += length
    shares = alike and window is None and len(lengths) > 1
    assert (alike in kernels) == bool(shares), "all tokens attend at once to what rows begin with"
    assert visible not in kernels


def attend_by_two_rows(**settings: Any) -> None:
    """Let two rows attend, of which nine positions are the same."""
    rows, positions = layout_of([1, 1], [18, 12], alike=9)
    query = torch.randn(1, HEADS, 2, WIDTH)
    key, value = torch.randn(2, 2, HEADS, 19, WIDTH)
    attend = transformers.AttentionInterface()[BY_ROW]
    with ragged(rows), torch.no_grad():
        attend(layer_of(1), query, key, value, mask_of(positions, 19, None), **settings)


@pytest.mark.parametrize(
    "settings", [{"position_bias": torch.zeros(1, 6, 1, 19)}, {"dropout": 0.1}]
)
def test_what_changes_attention_is_left_to_transformers(
    settings: dict[str, Any], kernels: list[int]
) -> None:
    attend_by_two_rows(**settings)
    assert not kernels


def test_few_rows_attend_to_all_their_keys_at_once(
    kernels: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_keys, "_LEAST", 19)
    attend_by_two_rows()
    assert not kernels


def test_padding_is_for_few_queries_and_many_rows_with_several_tokens() -> None:
    one, many = ([*lengths, *[1] * 8] for lengths in ([5], [5, 5, 5]))
    ways = [
        way_of(layout_of(each, [9] * len(each))[0], group)
        for each in (one, many)
        for group in (1, 3)
    ]
    assert ways == ["padded", "planned", "padded", "padded"]


@pytest.mark.parametrize("lengths", [[1, 1], [1, 20]], ids=["planned", "divided"])
def test_layers_of_two_masks_attend_by_their_own(lengths: list[int]) -> None:
    """Families such as Gemma have windows in some layers."""
    draw = torch.Generator().manual_seed(0)
    rows, positions = layout_of(lengths, [9, 6])
    total, visible = sum(lengths), max(rows.visible)
    query = torch.randn(1, HEADS, total, WIDTH, generator=draw)
    key, value = torch.randn(2, 2, HEADS, visible, WIDTH, generator=draw)
    attend = transformers.AttentionInterface()[BY_ROW]
    masks = [mask_of(positions, visible, window) for window in (None, 2)]
    with ragged(rows):
        results = [attend(layer_of(1), query, key, value, mask)[0] for mask in [*masks, *masks]]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
    for token in (0, total - 1):
        assert not torch.allclose(results[0][:, token], results[1][:, token])


def test_the_result_has_the_dtype_of_the_queries() -> None:
    rows, positions = layout_of([8, 1, 1, 1, 1, 1, 1, 1, 1], [3] * 9)
    assert way_of(rows, 1) == "planned"
    query = torch.randn(1, HEADS, 16, WIDTH).bfloat16()
    key, value = torch.randn(2, 9, HEADS, 11, WIDTH).bfloat16()
    attend = transformers.AttentionInterface()[BY_ROW]
    mask = mask_of(positions, 11, None).bfloat16()
    with ragged(rows):
        attended, _ = attend(layer_of(1), query, key, value, mask)
    assert attended.dtype == torch.bfloat16

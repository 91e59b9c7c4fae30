"""Attention of rows that begin alike, on a CPU: all their tokens attend to that part at once.

The keys of what all prompts begin with are the same in every row. So they are read once for all
rows, not once for each, and each row attends by itself to its own keys only:

    row 0 holds p q r a    its token attends to  p q r  with all tokens,  a  by itself
    row 1 holds p q r b c                        p q r                    b c

Either part gives weighted values and the sum that their weights were divided by, of which the
attention to all keys is put together (as flash attention does with blocks of keys: Dao et al.,
2022, arXiv:2205.14135, section 3.1).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lorakit.models.gpu_attention import Kernel, attend_in_groups, pytorchs
from lorakit.models.ragged import RaggedRows

_LEAST = 1024  # keys of all rows that are read once instead, from which that gains
_OTHERWISE = ("position_bias", "cache", "softcap", "s_aux")  # settings that change what attends


@dataclass(frozen=True)
class RowsAlike(RaggedRows):
    """Rows whose first `alike` visible tokens are the same in all rows (0: none are)."""

    alike: int = 0
    _rests: dict[int, tuple[torch.Tensor, _Rest | None]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @functools.cached_property
    def _gains(self) -> bool:
        rows = len(self.lengths)
        return rows > 1 and rows * self.alike >= _LEAST and _gives_sums()

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        *,
        kernel: Kernel = pytorchs,
        **settings: Any,
    ) -> torch.Tensor:
        """Compute attention as RaggedRows does."""
        whole = query, key, value
        rest = self._rest(mask) if self._gains and _is_plain(query, value, **settings) else None
        if rest is None:
            return super().attend(module, *whole, mask, kernel=kernel, **settings)
        query, key, value = (tensor.float() for tensor in whole)
        first, after = slice(None, self.alike), slice(self.alike, None)
        group = query.shape[1] // key.shape[1]
        seen_by_all = key[:1, :, first], value[:1, :, first], None
        settings["kernel"] = attend_with_sums
        shared = attend_in_groups(
            module, query, *seen_by_all, group, **{**settings, "is_causal": False}
        )
        seen = key[:, :, after], value[:, :, after], rest.mask
        own = rest.rows.attend(module, query, *seen, **settings)
        return _put_together(shared, own).to(whole[0].dtype)

    def _rest(self, mask: torch.Tensor) -> _Rest | None:
        """Return what rows see besides, None if a mask hides some of what they begin with."""
        known = self._rests.get(id(mask))
        if known is None:
            known = self._rests[id(mask)] = mask, self._without_alike(mask)
        return known[1]

    def _without_alike(self, mask: torch.Tensor) -> _Rest | None:
        if mask[self.row, 0, self.column, : self.alike].any():
            return None
        visible = [seen - self.alike for seen in self.visible]
        rows = RaggedRows(self.row, self.column, self.lengths, visible)
        return _Rest(rows, mask[..., self.alike :])


class _Rest(NamedTuple):
    """Rows without what all of them begin with, and their mask."""

    rows: RaggedRows
    mask: torch.Tensor


def _is_plain(query: torch.Tensor, value: torch.Tensor, **settings: Any) -> bool:
    """Return whether attention is no other than `attend_with_sums`, but for the sums."""
    plain = all(settings.get(name) is None for name in _OTHERWISE) and not settings.get("dropout")
    return plain and query.shape[-1] == value.shape[-1] and not torch.is_grad_enabled()


def attend_with_sums(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **settings: Any,
) -> tuple[torch.Tensor, None]:
    """Compute what transformers' function does, and the logarithms of sums in one more column.

    query is (rows, heads, tokens, width), key and value (rows, heads or fewer, visible, width), and
    the mask is added. The result is (rows, tokens, heads, width + 1), in float32.
    """
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    causal = bool(causal) and mask is None and query.shape[2] > 1
    values, sums = _flash(query, key, value, 0.0, causal, mask, settings.get("scaling"))
    return torch.cat([values, sums[..., None]], -1).transpose(1, 2), None


def _put_together(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return attention (…, width) to two sets of keys, each of `attend_with_sums`."""
    share = torch.sigmoid(one[..., -1:] - other[..., -1:])
    return torch.lerp(other[..., :-1], one[..., :-1], share)


def _flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout: float,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PyTorch's attention on a CPU, and the logarithms of sums (rows, heads, tokens)."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    values, sums = attend(query, key, value, dropout, causal, attn_mask=mask, scale=scale)
    return values, sums


@functools.cache
def _gives_sums() -> bool:
    """Return whether PyTorch's function gives sums by which parts can be put together."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, n, 8, generator=draw) for n in (3, 40, 40))
    mask = torch.zeros(2, 1, 3, 40)
    mask[0, 0, :, 30:] = -torch.inf
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    try:
        parts = [
            attend_with_sums(
                torch.nn.Module(), query, key[:, :, own], value[:, :, own], mask[..., own]
            )[0]
            for own in (slice(None, 20), slice(20, None))
        ]
        return torch.allclose(_put_together(*parts).transpose(1, 2), whole, atol=1e-5)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # other builds, other signatures
        return False

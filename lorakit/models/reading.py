"""Reading tokens into rows that come and go: one pass of a model, and what it predicts.

Rows of any lengths share a batch. Their keys and values are in a cache (kv_cache.py); here is
decided how new tokens lie in the batch and what each sees: the positions of its row up to its own,
within the layer's window if it has one. Three rows that read a b c, d and e f:

    extend     a b c   as a batch, padded on the left, or without padding as one sequence,
               · · d   a b c d e f, where attention is lorakit's own (`ragged`)
               · e f
    step       the same for all rows of the batch, padded to one of few shapes, which are recorded
               on a GPU (step_graphs.py)
    fan_out    rows that read the same tokens, but differ from some layer on, are one row below it

Which tokens are read, guessed ones among them, and which rows come and go, is decided in
decoding.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lorakit.models.architecture import Model, ModelConfig, decoder_layers, text_config
from lorakit.models.attention import BY_ROW
from lorakit.models.gpu_attention import in_groups
from lorakit.models.kv_cache import Extended, Fanned, KVCache, cache_parameter
from lorakit.models.last_layer import last_layer_at
from lorakit.models.prefixes import Prefix
from lorakit.models.ragged import ragged
from lorakit.models.shared_keys import RowsAlike
from lorakit.models.step_graphs import StepGraphs

_WIDTHS = (1, 5)  # new tokens of a row to which recorded steps are padded
_POSITIONS = 128  # of which a multiple is visible in a recorded step
_LayerInputs = tuple[torch.Tensor, ...]


class Reader:
    """Reads tokens into `rows` rows of up to `length` positions, whose keys are in its `cache`.

    The rows of a pass are a run that begins at row `first`. The first `alike` positions hold the
    same in all rows, once whoever calls says so. `check` gets the logits that tokens are taken
    from. `records`: steps are padded to few shapes, by default on a GPU.
    """

    def __init__(
        self,
        model: Model,
        rows: int,
        length: int,
        check: Callable[[torch.Tensor], None] = lambda logits: None,
        *,
        records: bool | None = None,
    ) -> None:
        self.model, self._check = model, check
        self._rows, self._length = rows, length
        attention = getattr(text_config(model), "_attn_implementation", None)
        self.ragged = attention == BY_ROW  # whether new tokens come as one sequence
        self.device = next(model.parameters()).device
        self._places = torch.arange(length + 1, device=self.device)
        self._numbers = torch.arange(rows, device=self.device)
        self._windows, self._dtype = _windows(text_config(model)), model.dtype
        on_gpu = self.device.type == "cuda" and not _is_sharded(model)
        self.records = not self.ragged and (on_gpu if records is None else records)
        self.alike = 0
        self._graphs = StepGraphs(model, self.device)
        self.cache = KVCache(rows, length, self._graphs.forget)
        self._cache_name = str(cache_parameter(model))

    def step(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Extend all rows, from the first on, by a few tokens each; return what `extend` returns.

        The last tokens of each list belong to the row's new tokens.
        """
        longest = max(map(len, tokens))
        width = next((width for width in _WIDTHS if width >= longest), None)
        if not self.records or width is None:
            return self.extend(tokens, starts, 0, longest)
        rows = self._rows
        while rows >= 2 * len(tokens):
            rows = -(-rows // 2)
        visible = max(map(sum, zip(starts, map(len, tokens), strict=True)))
        self.cache.visible = min(self._length, -(-visible // _POSITIONS) * _POSITIONS)
        read = torch.tensor([[0], [-1]]).repeat(1, rows * width).view(2, rows, width)
        for place, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            read[0, place, width - len(row) :] = torch.tensor(row)
            read[1, place, width - len(row) :] = torch.arange(start, start + len(row))
        shape = rows, width, self.cache.visible  # what is replayed does not say what it `expected`
        predicted, wrong = self._graphs(shape, read, self._compute_step)
        if bool(wrong):
            self._check(torch.full((1,), torch.nan))
        return _lists(predicted[: len(tokens)])

    def _compute_step(self, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most probable token after each of `read`, and whether a logit is no number.

        `read` (2, rows, width) are tokens and their positions, -1 for padding.
        """
        ids, places = read
        count = len(ids)
        self.cache.expected = Extended(0, count, self._numbers[:count, None], places + 1)
        positions = places.clamp_min(0)
        with in_groups():
            logits = self._logits(ids, positions, self._mask(positions), ids.shape[1])
        return logits.float().argmax(-1), logits.isnan().any()

    def extend(
        self, tokens: Sequence[Sequence[int]], starts: Sequence[int], first: int, keep: int
    ) -> list[list[int]]:
        """Read new tokens into rows `first` …, each row's from its start on.

        Return, for each row, the most probable token after each of its last `keep` tokens. For a
        row with fewer new tokens, the values on the left belong to padding and mean nothing.
        """
        visible = list(map(sum, zip(starts, map(len, tokens), strict=True)))
        self.cache.visible = max(visible)
        width, count = max(map(len, tokens)), len(tokens)
        positions = [
            [-1] * (width - len(row)) + list(range(start, start + len(row)))
            for row, start in zip(tokens, starts, strict=True)
        ]
        if self.ragged:
            return self._extend_ragged(tokens, visible, positions, first, keep)
        ids = [[0] * (width - len(row)) + list(row) for row in tokens]
        position_ids = torch.tensor(positions, device=self.device)
        rows = self._numbers[first : first + count, None]
        self.cache.expected = Extended(first, count, rows, position_ids + 1)
        position_ids.clamp_(min=0)
        ids_tensor = torch.tensor(ids, device=self.device)
        logits = self._logits(ids_tensor, position_ids, self._mask(position_ids), keep)
        return _lists(self._predicted(logits))

    def _extend_ragged(
        self,
        tokens: Sequence[Sequence[int]],
        visible: Sequence[int],
        positions: Sequence[Sequence[int]],
        first: int,
        keep: int,
    ) -> list[list[int]]:
        """Extend by tokens in one sequence; `positions` (rows, width) has -1 where none is."""
        laid_out = torch.tensor(positions, device=self.device)
        row, column = torch.where(laid_out >= 0)
        layout = RowsAlike(row, column, list(map(len, tokens)), visible, alike=self.alike)
        position_ids = laid_out[row, column][None]
        self.cache.expected = Extended(first, len(tokens), first + row[None], position_ids + 1)
        kept = column >= layout.width - keep
        ids = torch.tensor([[token for new in tokens for token in new]], device=self.device)
        mask = self._mask(laid_out.clamp_min(0))
        with ragged(layout):
            flat = self._predicted(self._logits(ids, position_ids, mask, torch.where(kept)[0]))
        predicted = laid_out.new_zeros(len(tokens), keep)
        predicted[row[kept], column[kept] - (layout.width - keep)] = flat[0]
        return _lists(predicted)

    def fan_out(
        self,
        tokens: Sequence[int],
        splits: Sequence[int],
        first: int,
        keep: int,
        prefix: Prefix | None = None,
    ) -> list[list[int]]:
        """Read the same tokens, after a prefix, into a row and one more for each of `splits`.

        A single row enters the model, and each of the others splits off before the layer where it
        begins to differ: `splits`, from the lowest up. The rows are `first` …. With [0, 1], layer 0
        computes the first two rows, and layers 1 and above all three. A prefix was read with the
        same splits. Returns what `extend` returns.
        """
        start = 0 if prefix is None else prefix.tokens
        self.cache.visible = start + len(tokens)
        self.cache.expected = Fanned(first, len(splits) + 1, prefix)
        ids = torch.tensor([list(tokens)], device=self.device)
        positions = self._places[None, start : self.cache.visible]
        with _splitting(self.model, splits):
            logits = self._logits(ids, positions, self._mask(positions), keep)
        return _lists(self._predicted(logits))

    def read_prefix(
        self, tokens: Sequence[int], first: int = 0, splits: Sequence[int] = ()
    ) -> Prefix:
        """Read tokens with which rows begin, once for all that do; rows `first` … are overwritten.

        `splits` are those of the rows that begin so: see `fan_out`.
        """
        self.fan_out(tokens, splits, first, 1)

        def rows_in(layer: int) -> int:
            return 1 + sum(split <= layer for split in splits)

        return self.cache.copy_prefix(first, rows_in)

    def _predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """Check logits and return the most probable tokens."""
        self._check(logits)
        return logits.float().argmax(-1)

    def _logits(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        mask: torch.Tensor | dict[str, torch.Tensor],
        keep: int | torch.Tensor,
    ) -> torch.Tensor:
        """Return the model's logits after the last `keep` tokens of each row, or those places."""
        width = ids.shape[1]
        places = self._places[width - keep : width] if isinstance(keep, int) else keep
        with last_layer_at(self.model, places, width):
            logits: torch.Tensor = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                use_cache=True,
                logits_to_keep=keep,
                **{self._cache_name: self.cache},
            ).logits
        return logits[:, -keep:] if isinstance(keep, int) else logits

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the additive mask (rows, 1, new, visible), by kind of layer if there are two."""
        masks = {kind: self._mask_of(positions, window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask_of(self, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        """Return the mask for a window in tokens; None is no window."""
        back = positions[:, None, :, None] - self._places[: self.cache.visible]
        hidden = back < 0
        if window is not None and window < self.cache.visible:
            hidden |= back >= window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)


def _is_sharded(model: Model) -> bool:
    """Return whether processes share a model's weights out: they wait for one another."""
    return any(type(weight).__name__ == "DTensor" for weight in model.parameters())


def _lists(tokens: torch.Tensor) -> list[list[int]]:
    rows: list[list[int]] = tokens.tolist()
    return rows


def _windows(config: ModelConfig) -> Mapping[str, int | None]:
    """Return the window in tokens of every kind of layer in the model; None is no window."""
    window = getattr(config, "sliding_window", None)
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    if not kinds:
        kinds = {"sliding_attention": None}
    return {kind: window if kind == "sliding_attention" else None for kind in kinds}


@contextlib.contextmanager
def _splitting(model: Model, splits: Sequence[int]) -> Iterator[None]:
    """Append a copy of the first row before each of the layers in `splits`."""
    layers = decoder_layers(model) or ()
    hooks = [
        layers[layer].register_forward_pre_hook(_append_first_row, with_kwargs=True)
        for layer in splits
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _append_first_row(
    layer: torch.nn.Module, inputs: _LayerInputs, kwargs: dict[str, torch.Tensor]
) -> tuple[_LayerInputs, dict[str, torch.Tensor]]:
    """Append a copy of the first row to a layer's hidden states, its first or named input."""
    if inputs:
        return (torch.cat([inputs[0], inputs[0][:1]]), *inputs[1:]), kwargs
    hidden = kwargs["hidden_states"]
    return inputs, {**kwargs, "hidden_states": torch.cat([hidden, hidden[:1]])}

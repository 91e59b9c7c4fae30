"""A cache of keys and values for rows that come and go: a slot for each position of each row.

A token's keys and values lie in the slot of its own position, so rows of any lengths share a batch
without padding between their tokens, and wrong guesses are overwritten by the tokens that come
next. A token sees the slots of its row up to its own, within the layer's window if it has one.
Two rows of four slots, given tokens by `extend`, row by row:

    row 0   row 1     starts   the model reads   then row 0 and row 1 hold
    a b c   d         0, 0     a b c / · · d     a b c .   d . . .
    x       e f       3, 1     · x   / e f       a b c x   d e f .      e f was a guess, f is wrong:
    .       g         -, 2             g         a b c x   d e g .      g goes into the slot of f

The padding (·) of shorter rows is on the left and goes into an extra slot that no token sees; where
attention is lorakit's own, there is none (`ragged`). When rows differ only from some layer on,
`fan_out` fills several at once. What all rows begin with is read once, by `read_prefix`. On a GPU,
`step` pads rows to few shapes, which are recorded (step_graphs.py). Which tokens are guessed, and
which rows come and go, is decided in decoding.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from lorakit.models.architecture import (
    Model,
    ModelConfig,
    decoder_layers,
    forward_parameters,
    text_config,
)
from lorakit.models.attention import BY_ROW, RaggedRows, ragged
from lorakit.models.gpu_attention import in_groups
from lorakit.models.prefixes import KeysAndValues, Prefix
from lorakit.models.step_graphs import StepGraphs

_CACHES = ("cache", "past_key_values")  # what transformers calls the cache, since 5.24 and before
_AHEAD = 128  # positions for which slots are added at once, and to which recorded steps are padded
_STEP_WIDTHS = (1, 5)  # new tokens of a row to which recorded steps are padded
_LayerInputs = tuple[torch.Tensor, ...]


def cache_parameter(model: Model) -> str | None:
    """Return the name by which a model's forward takes a cache, None where it takes none."""
    parameters = forward_parameters(model)
    return next((name for name in _CACHES if name in parameters), None)


class Slots:
    """A model's cache of `rows` rows of up to `length` positions; the model calls `update`.

    The batch that is being computed is the run of rows that begins at row `first`. Position p lies
    in slot p + 1, padding in slot 0; slots are added as rows grow. `check` gets the logits that
    tokens are taken from. `records`: steps are padded to few shapes, by default on a GPU.
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
        self._model, self._rows, self._length, self._check = model, rows, length, check
        self._cache_name = str(cache_parameter(model))
        self._stored: dict[int, KeysAndValues] = {}
        self._fanned = 0  # how many rows the batch is fanned out to; 0 while rows are extended
        self._prefix: Prefix | None = None  # which those rows begin with
        attention = getattr(text_config(model), "_attn_implementation", None)
        self.ragged = attention == BY_ROW  # whether new tokens come as one sequence
        self.device = next(model.parameters()).device
        self._places = torch.arange(length + 1, device=self.device)
        self._numbers = torch.arange(rows, device=self.device)
        self._windows = _windows(text_config(model))
        self._dtype = model.dtype
        on_gpu = self.device.type == "cuda" and not _is_sharded(model)
        self.records = not self.ragged and (on_gpu if records is None else records)
        self._graphs = StepGraphs(model, self.device)

    @property
    def nbytes(self) -> int:
        """How many bytes the slots take."""
        return sum(slots.nbytes for stored in self._stored.values() for slots in stored)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: the model asks, but needs no length, since it is always given positions."""
        return 0

    def update(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new keys and values (rows, heads, new, width); return all visible ones.

        A fanned-out batch sees the new ones alone, where its rows begin at position 0.
        """
        stored = self._stored[layer_idx] = self._roomy(self._stored.get(layer_idx), key, value)
        first = self._first
        if self._fanned:
            count, end = len(key), 1 + self._visible
            for slots, new in zip(stored, (key, value), strict=True):
                slots[first : first + count, end - new.shape[2] : end] = new.transpose(1, 2)
            self._begin(layer_idx, first, count, self._prefix)
            for slots in stored:  # rows that split off above this layer are the first row here
                slots[first + count : first + self._fanned, 1:end] = slots[first, 1:end]
            if self._prefix is None:
                return key, value
            keys, values = (slots[first : first + count, 1:end] for slots in stored)
            return keys.transpose(1, 2), values.transpose(1, 2)
        visible = []
        for slots, new in zip(stored, (key, value), strict=True):
            slots[self._row_numbers, self._targets] = new.transpose(1, 2)
            seen = slots[first : first + self._extended, 1 : 1 + self._visible]
            visible.append(seen.transpose(1, 2))
        return visible[0], visible[1]

    def _roomy(
        self, stored: KeysAndValues | None, key: torch.Tensor, value: torch.Tensor
    ) -> KeysAndValues:
        """Return a layer's slots (rows, slots, heads, width), enough for what is visible now."""
        count = 0 if stored is None else stored[0].shape[1]
        if count > self._visible and stored is not None:
            return stored
        wanted = 1 + min(self._length, self._visible + max(_AHEAD, self._visible // 2))
        self._graphs.forget()
        roomy = self._empty(key, wanted), self._empty(value, wanted)
        for slots, before in zip(roomy, stored or (), strict=False):
            slots[:, :count] = before
        return roomy

    def _empty(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """Return zeros (rows, count, heads, width) for a layer's keys or values."""
        return like.new_zeros(self._rows, count, like.shape[1], like.shape[3])

    def read_prefix(
        self, tokens: Sequence[int], first: int = 0, splits: Sequence[int] = ()
    ) -> Prefix:
        """Read tokens with which rows begin, once for all that do; rows `first` … are overwritten.

        `splits` are those of the rows that begin so: see `fan_out`.
        """
        self.fan_out(tokens, splits, first, 1)
        end, layers = 1 + len(tokens), {}
        for layer, (keys, values) in self._stored.items():
            rows = slice(first, first + 1 + sum(split <= layer for split in splits))
            layers[layer] = keys[rows, 1:end].clone(), values[rows, 1:end].clone()
        return Prefix(len(tokens), layers)

    def begin(self, first: int, count: int, prefix: Prefix) -> None:
        """Let `count` rows from `first` on hold a prefix, which was read for one row."""
        for layer in self._stored:
            self._begin(layer, first, count, prefix)

    def _begin(self, layer: int, first: int, count: int, prefix: Prefix | None) -> None:
        """Let rows hold a layer's part of a prefix, if there is one."""
        parts = () if prefix is None else prefix.layers.get(layer, ())
        for slots, part in zip(self._stored[layer], parts, strict=False):
            slots[first : first + count, 1 : 1 + part.shape[1]] = part

    def step(self, tokens: Sequence[Sequence[int]], starts: Sequence[int]) -> list[list[int]]:
        """Extend all rows, from the first on, by a few tokens each; return what `extend` returns.

        The last tokens of each list belong to the row's new tokens.
        """
        longest = max(map(len, tokens))
        width = next((width for width in _STEP_WIDTHS if width >= longest), None)
        if not self.records or width is None:
            return self.extend(tokens, starts, 0, longest)
        rows = self._rows
        while rows >= 2 * len(tokens):
            rows = -(-rows // 2)
        visible = max(map(sum, zip(starts, map(len, tokens), strict=True)))
        self._first, self._fanned, self._extended = 0, 0, rows
        self._visible = min(self._length, -(-visible // _AHEAD) * _AHEAD)
        read = torch.tensor([[0], [-1]]).repeat(1, rows * width).view(2, rows, width)
        for place, (row, start) in enumerate(zip(tokens, starts, strict=True)):
            read[0, place, width - len(row) :] = torch.tensor(row)
            read[1, place, width - len(row) :] = torch.arange(start, start + len(row))
        shape = rows, width, self._visible
        predicted, wrong = self._graphs(shape, read, self._compute_step)
        if bool(wrong):
            self._check(torch.full((1,), torch.nan))
        return _lists(predicted[: len(tokens)])

    def _compute_step(self, read: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the most probable token after each of `read`, and whether a logit is no number.

        `read` (2, rows, width) are tokens and their positions, -1 for padding.
        """
        ids, places = read
        self._row_numbers = self._numbers[: len(ids), None]
        self._targets = places + 1
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
        self._first, self._fanned, self._extended = first, 0, len(tokens)
        visible = list(map(sum, zip(starts, map(len, tokens), strict=True)))
        self._visible = max(visible)
        width = max(map(len, tokens))
        positions = [
            [-1] * (width - len(row)) + list(range(start, start + len(row)))
            for row, start in zip(tokens, starts, strict=True)
        ]
        if self.ragged:
            return self._extend_ragged(tokens, visible, positions, keep)
        ids = [[0] * (width - len(row)) + list(row) for row in tokens]
        position_ids = torch.tensor(positions, device=self.device)
        self._row_numbers = self._numbers[first : first + len(tokens), None]
        self._targets = position_ids + 1
        position_ids.clamp_(min=0)
        ids_tensor = torch.tensor(ids, device=self.device)
        logits = self._logits(ids_tensor, position_ids, self._mask(position_ids), keep)
        return _lists(self._predicted(logits))

    def _extend_ragged(
        self,
        tokens: Sequence[Sequence[int]],
        visible: Sequence[int],
        positions: Sequence[Sequence[int]],
        keep: int,
    ) -> list[list[int]]:
        """Extend by tokens in one sequence; `positions` (rows, width) has -1 where none is."""
        laid_out = torch.tensor(positions, device=self.device)
        row, column = torch.where(laid_out >= 0)
        layout = RaggedRows(row, column, list(map(len, tokens)), visible)
        position_ids = laid_out[row, column][None]
        self._row_numbers, self._targets = self._first + row[None], position_ids + 1
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
        self._first, self._fanned, self._prefix = first, len(splits) + 1, prefix
        self._visible = start + len(tokens)
        ids = torch.tensor([list(tokens)], device=self.device)
        positions = self._places[None, start : self._visible]
        with _splitting(self._model, splits):
            logits = self._logits(ids, positions, self._mask(positions), keep)
        return _lists(self._predicted(logits))

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
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            use_cache=True,
            logits_to_keep=keep,
            **{self._cache_name: self},
        ).logits
        return logits[:, -keep:] if isinstance(keep, int) else logits

    def _mask(self, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return the additive mask (rows, 1, new, visible), by kind of layer if there are two."""
        masks = {kind: self._mask_of(positions, window) for kind, window in self._windows.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _mask_of(self, positions: torch.Tensor, window: int | None) -> torch.Tensor:
        """Return the mask for a window in tokens; None is no window."""
        back = positions[:, None, :, None] - self._places[: self._visible]
        hidden = back < 0
        if window is not None and window < self._visible:
            hidden |= back >= window
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self.device)
        return mask.masked_fill_(hidden, torch.finfo(self._dtype).min)

    def move(self, source: int, target: int) -> None:
        """Copy a row onto another, as far as the last batch goes."""
        end = 1 + self._visible
        for stored in self._stored.values():
            for slots in stored:
                slots[target, 1:end] = slots[source, 1:end]


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

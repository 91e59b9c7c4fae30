"""Cuts by row: in each row of a batch, the LoRA of every layer is multiplied by its own factor.

Rows with different cuts can share a batch, because a cut only decides how much a row gets of a
layer's LoRA. Inside `standing`, PEFT's layers compute W0·x + s·B·(g·A·x), where the gate g of a row
is the factor of the layer in the row's cut; where it is 0, exactly 0 is added. Three rows in a
model of four layers, cut above the bottom 3, 1 and 0:

    layer 0   g = 1 1 0
    layer 1   g = 1 0 0
    layer 2   g = 1 0 0
    layer 3   only W0·x, as no row has this layer's LoRA

If all rows have a layer's LoRA whole, there is no multiplication by a gate. Where the rows come
from is not known here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.nn.functional import linear

from lorakit.adapters.names import layer_of
from lorakit.boundary.cuts import Cut
from lorakit.models.architecture import Forward, other_forwards
from lorakit.models.lora import ADAPTER, PeftLayer, factors


class Gates:
    """The LoRA of a model, switched by the cuts of the rows that go through it next."""

    def __init__(self, layers: Mapping[str, PeftLayer]) -> None:
        self._layers = layers
        self._cuts: tuple[Cut, ...] = ()
        self._tokens: Sequence[int] | None = None
        self._gates: dict[int | None, torch.Tensor | float] = {}
        self._numbers = sorted(
            {layer_of(name) for name in layers}, key=lambda n: -1 if n is None else n
        )
        self._held: torch.Tensor | None = None

    def hold(self, cuts: Sequence[Cut], rows: int, device: torch.device) -> None:
        """Set the cut of every row of the next batches, of up to `rows` rows, as `set` does.

        The factors are written to the same places in memory in every call, and rows without a cut
        have any, so that what is recorded on a GPU can be replayed (models/step_graphs.py).
        """
        if self._held is None or self._held.shape[1] != rows:
            self._held = torch.zeros(len(self._numbers), rows, 1, 1, device=device)
        self._held[:, : len(cuts), 0, 0] = torch.tensor(self._by_layer(cuts)).to(device)
        self._cuts, self._tokens = (), None  # what `set` gets next is new to it
        self._gates = dict(zip(self._numbers, self._held, strict=True))

    def set(self, cuts: Sequence[Cut], tokens: Sequence[int] | None = None) -> None:
        """Set the cut of every row of the next batches; a single one applies to all rows.

        A batch with fewer rows uses the first ones. With `tokens`, how many each row has, the rows
        come as one sequence.
        """
        tokens = None if tokens is None else tuple(tokens)
        if (self._cuts, self._tokens) != (tuple(cuts), tokens):
            self._cuts, self._tokens = tuple(cuts), tokens
            self._gates = {}

    @contextlib.contextmanager
    def standing(self) -> Iterator[Gates]:
        """Gate PEFT's layers inside the block, and restore them afterwards."""
        layers = self._layers.items()
        with other_forwards({layer: self._gated(layer, layer_of(name)) for name, layer in layers}):
            yield self

    def _gated(self, layer: PeftLayer, number: int | None) -> Forward:
        """Return the gated forward of a PEFT layer in decoder layer `number`."""
        base_layer, scale = layer.get_base_layer(), layer.scaling[ADAPTER]
        a, b = factors(layer)

        def forward(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
            plain: torch.Tensor = base_layer(x, *args, **kwargs)
            gate = self._gate(number, x.device)
            if isinstance(gate, float) and gate == 0.0:
                return plain
            low = linear(x.to(a.dtype), a)
            if isinstance(gate, torch.Tensor):
                low = low * (gate[: len(x)] if self._tokens is None else gate)
            elif gate != 1.0:
                low = low * gate
            adapted: torch.Tensor = plain + linear(low, b) * scale
            return adapted.to(plain.dtype)

        return forward

    def _gate(self, number: int | None, device: torch.device) -> torch.Tensor | float:
        """Return the factor of each row in layer `number`, a number if all agree.

        It is (rows, 1, 1), or (1, tokens, 1) where rows come as one sequence.
        """
        if not self._gates:
            by_layer = self._by_layer(self._cuts)
            table = torch.tensor(by_layer, device=device)[:, :, None, None]
            if self._tokens is not None:
                lengths = torch.tensor(self._tokens, device=device)
                table = table.repeat_interleave(lengths, 1).transpose(1, 2)
            self._gates = {
                number: own[0] if len(set(own)) == 1 else gate
                for number, own, gate in zip(self._numbers, by_layer, table, strict=True)
            }
        return self._gates[number]

    def _by_layer(self, cuts: Sequence[Cut]) -> list[list[float]]:
        """Return, for each layer with LoRA, its factor in each of the cuts."""
        return [[cut.left_in(number) for cut in cuts] for number in self._numbers]

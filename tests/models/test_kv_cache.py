"""The worked examples of the cache: which token lies in which slot, and what a token sees."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.models.kv_cache import KVCache
from lorakit.models.reading import Reader

LAYERS = 3


class Layer(torch.nn.Module):
    """A layer whose keys and values are the tokens."""

    def __init__(self, model: Model, number: int) -> None:
        super().__init__()
        self.seen, self.number = model.seen, number

    def forward(self, hidden: torch.Tensor, cache: KVCache) -> torch.Tensor:
        states = hidden[:, None, :, None]
        keys, _ = cache.update(states, states, self.number)
        self.seen[self.number] = keys[:, 0, :, 0].int().tolist()
        return hidden


class Model(torch.nn.Module):
    """A model of three such layers that keeps what each saw, and the last mask."""

    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, list[list[int]]] = {}
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.layers = torch.nn.ModuleList([Layer(self, number) for number in range(LAYERS)])
        text: Any = SimpleNamespace(num_hidden_layers=LAYERS)
        self.config = SimpleNamespace(get_text_config=lambda: text)

    def get_decoder(self) -> Model:
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: KVCache,
        **others: Any,
    ) -> Any:
        self.read = input_ids.tolist()
        self.visible = (attention_mask[:, 0] == 0).int().tolist()
        hidden = input_ids.float()
        for layer in self.layers:
            hidden = layer(hidden, past_key_values)
        return SimpleNamespace(logits=torch.zeros(*hidden.shape, 2))


class RenamedModel(Model):
    """The same model, whose forward calls the cache as transformers does since 5.24."""

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: KVCache, **others: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, cache, **others)


A, B, C, D, E, F, G, X = range(1, 9)


@pytest.mark.parametrize("kind", [Model, RenamedModel])
def test_the_worked_example_is_what_lies_in_the_slots(kind: type[Model]) -> None:
    model = kind()
    reader = Reader(model, rows=2, length=4)
    reader.extend([[A, B, C], [D]], [0, 0], 0, 1)
    assert model.read == [[A, B, C], [0, 0, D]]
    assert model.seen[0] == [[A, B, C], [D, 0, 0]]
    reader.extend([[X], [E, F]], [3, 1], 0, 2)
    assert model.read == [[0, X], [E, F]]
    assert model.seen[0] == [[A, B, C, X], [D, E, F, 0]]
    assert model.visible[0][1] == [1, 1, 1, 1]
    assert model.visible[1] == [[1, 1, 0, 0], [1, 1, 1, 0]]
    reader.extend([[G]], [2], 1, 1)
    assert model.seen[0] == [[D, E, G]]


def test_a_row_splits_off_before_the_layer_of_its_boundary() -> None:
    model = Model()
    reader = Reader(model, rows=4, length=4)
    reader.fan_out([A, B], [0, 1], 1, 1)
    assert [len(model.seen[layer]) for layer in range(LAYERS)] == [2, 3, 3]
    reader.extend([[C], [C], [C]], [2, 2, 2], 1, 1)
    assert all(model.seen[layer] == [[A, B, C]] * 3 for layer in range(LAYERS))


def test_a_row_of_the_last_pass_moves_with_all_that_it_has() -> None:
    model = Model()
    reader = Reader(model, rows=3, length=4)
    reader.extend([[A], [B, C, D]], [0, 0], 0, 1)
    reader.cache.move(1, 0)
    reader.extend([[E]], [3], 0, 1)
    assert model.seen[0] == [[B, C, D, E]]
    assert model.seen[LAYERS - 1] == [[B, C, D, E]]


def test_rows_that_split_off_hold_a_prefix_that_is_read_once() -> None:
    model = Model()
    reader = Reader(model, rows=4, length=5)
    prefix = reader.read_prefix([A, B], 1, [0, 2])
    assert prefix.tokens == 2
    assert [len(prefix.layers[layer][0]) for layer in range(LAYERS)] == [2, 2, 3]
    for first in (0, 1):
        reader.fan_out([C, D], [0, 2], first, 1, prefix)
        assert model.read == [[C, D]]
        assert model.visible == [[[1, 1, 1, 0], [1, 1, 1, 1]]]
        assert [model.seen[layer] for layer in range(LAYERS)] == [
            [[A, B, C, D]] * rows for rows in (2, 2, 3)
        ]
        reader.extend([[E], [E], [E]], [4, 4, 4], first, 1)
        assert all(model.seen[layer] == [[A, B, C, D, E]] * 3 for layer in range(LAYERS))


def test_rows_begin_with_a_prefix_that_is_read_once() -> None:
    model = Model()
    reader = Reader(model, rows=3, length=4)
    prefix = reader.read_prefix([A, B], 2)
    reader.cache.hold(0, 2, prefix)
    reader.extend([[C], [D]], [2, 2], 0, 1)
    assert model.seen[0] == [[A, B, C], [A, B, D]]

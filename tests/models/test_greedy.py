"""Continuous batching against transformers' own loop, batch after batch."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

from lorakit.models import (
    cache_trial,
    decoding,
    generation,
    greedy,
    kv_cache,
    reading,
    shared_keys,
)
from lorakit.models.base import Base
from lorakit.models.generation import complete, complete_prompts, generate
from lorakit.models.greedy import complete_greedily
from lorakit.models.kv_cache import KVCache
from lorakit.models.prefixes import shared_prefix
from lorakit.models.reading import Reader
from lorakit.models.step_graphs import StepGraphs
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.support.models import FAMILIES, open_base, save_model
from tests.support.training_data import rows

SETTINGS = GenerationSettings(max_new_tokens=14, batch_size=5, device="cpu", dtype="float32")


def prompts_of(base: Base, count: int, before: str = "") -> list[Sequence[int]]:
    encoder = base.encoder(chat="off")
    records = [Record({**row, "prompt": before + row["prompt"]}, "a row") for row in rows(count)]
    return [encoder.prompt(record, SETTINGS.max_new_tokens).ids for record in records]


def ending_variously(base: Base, prompts: Sequence[Sequence[int]]) -> Base:
    """Return the base with an end token such that texts end at as many lengths as can be."""
    texts = complete(base, prompts, SETTINGS)

    def lengths(token: int) -> int:
        return len({text.index(token) if token in text else -1 for text in texts})

    return replace(
        base, end_tokens=(max({token for text in texts for token in text}, key=lengths),)
    )


@pytest.fixture(scope="module")
def base(llama: str) -> Base:
    base = open_base(llama)
    return ending_variously(base, prompts_of(base, 23))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens each pass through the model reads, row by row."""
    lengths: list[list[int]] = []
    extend, fan_out = Reader.extend, Reader.fan_out

    def counted(self: Reader, tokens: Any, *others: Any) -> list[list[int]]:
        lengths.append(list(map(len, tokens)))
        return extend(self, tokens, *others)

    def counted_once(self: Reader, tokens: Any, *others: Any) -> list[list[int]]:
        lengths.append([len(tokens)])
        return fan_out(self, tokens, *others)

    monkeypatch.setattr(Reader, "extend", counted)
    monkeypatch.setattr(Reader, "fan_out", counted_once)
    return lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_completions_are_those_of_transformers_own_loop(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_base(save_model(tmp_path, family))
    assert whole.batches_continuously
    begins = "All prompts begin so. "
    for before, least in (("", 1), (begins, shared_keys._LEAST), (begins, 1)):
        monkeypatch.setattr(shared_keys, "_LEAST", least)
        prompts = prompts_of(whole, 23, before)
        base = ending_variously(whole, prompts)
        expected = complete(base, prompts, SETTINGS)
        assert len({len(ids) for ids in expected}) > 1, "texts should end at various lengths"
        for at_once in (1, random.Random(family).randrange(2, 9), 40):
            assert complete_greedily(base, prompts, SETTINGS, at_once=at_once) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_padded_to_few_shapes_write_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_base(save_model(tmp_path, family))
    if whole.packs:
        whole.model.set_attn_implementation("sdpa")  # as on a GPU
    shapes: set[Any] = set()
    call = StepGraphs.__call__

    def noting(self: StepGraphs, key: Any, *others: Any) -> Any:
        shapes.add(key)
        return call(self, key, *others)

    monkeypatch.setattr(StepGraphs, "__call__", noting)
    monkeypatch.setattr(kv_cache, "_AHEAD", 8)
    monkeypatch.setattr(reading, "_POSITIONS", 8)
    monkeypatch.setattr(greedy, "Reader", functools.partial(Reader, records=True))
    prompts = prompts_of(whole, 23)
    base = ending_variously(whole, prompts)
    expected = complete(base, prompts, SETTINGS)
    assert complete_greedily(base, prompts, SETTINGS, at_once=6) == expected
    rows, widths, visible = zip(*shapes, strict=True)
    assert set(widths) == {1, 5}
    assert {6, 3} <= set(rows) <= {6, 3, 2, 1}
    longest = max(map(len, prompts)) + SETTINGS.max_new_tokens - 1
    assert all(count % 8 == 0 or count == longest for count in visible)


@pytest.mark.parametrize("family", ["mistral", "gemma2"])
def test_a_sliding_window_shorter_than_the_prefix_is_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FAMILIES[family]()
    config.sliding_window = 8
    monkeypatch.setitem(FAMILIES, family, lambda: config)
    base = open_base(save_model(tmp_path, family))
    prompts = prompts_of(base, 7, "Twelve words or more. ")
    expected = complete(base, prompts, SETTINGS)
    assert complete_greedily(base, prompts, SETTINGS, at_once=3) == expected


def test_a_row_that_ends_makes_room_for_the_next(base: Base, passes: list[list[int]]) -> None:
    prompts = prompts_of(base, 23)
    longest = max(map(len, complete(base, prompts, SETTINGS)))
    complete_greedily(base, prompts, SETTINGS, at_once=4)
    assert max(map(len, passes)) == 4
    joins = [lengths for lengths in passes if max(lengths) > 5]
    assert len(joins) > 23 // 4, "rows join a batch that others are in"
    assert len(passes) < 23 / 4 * longest
    beside = [lengths for lengths in joins if min(lengths) <= 5]
    assert len(beside) > len(joins) // 2, "others go on in the same pass"
    assert all(len(lengths) == 4 for lengths in beside[:-1]), "as soon as there is a place"


def test_prompts_too_long_to_be_read_beside_others_join_by_themselves(
    base: Base, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(base, 23, "You are asked many things. ")
    expected = complete(base, prompts, SETTINGS)
    lengths, shared = sorted(map(len, prompts)), len(shared_prefix(prompts))
    visible, new, mixed = lengths[-1] + SETTINGS.max_new_tokens, lengths[11] - shared, []
    for largest in (0, 4 * new * visible, 10**9):
        passes.clear()
        monkeypatch.setattr(decoding, "_LARGEST_MASK", largest)
        assert complete_greedily(base, prompts, SETTINGS, at_once=4) == expected
        mixed.append(sum(lengths[0] <= 5 < max(lengths) for lengths in passes))
    assert mixed[0] == 0 < mixed[1] < mixed[2]


def test_a_process_that_is_alone_decodes_a_window_as_one_batch(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    decode = complete_greedily

    def counted(base: Base, prompts: Any, *others: Any, **named: Any) -> list[list[int]]:
        sizes.append(len(prompts))
        return decode(base, prompts, *others, **named)

    monkeypatch.setattr(generation, "complete_greedily", counted)
    records = [Record(row, "a row") for row in rows(23)]
    assert len(list(generate(base, base.encoder(chat="off"), records, SETTINGS))) == 23
    assert sizes == [23]


def test_what_all_prompts_begin_with_is_read_once(base: Base, passes: list[list[int]]) -> None:
    before = "You are asked many things. "
    prompts = prompts_of(base, 9, before)
    complete_greedily(base, prompts, SETTINGS, at_once=3)
    columns = enumerate(zip(*prompts, strict=False))
    shared = next(place for place, column in columns if len(set(column)) > 1)
    assert passes[0] == [shared]
    assert shared > len(before)
    reading = [length - shared for length in map(len, prompts)]
    joining = [length for lengths in passes[1:] for length in lengths if length in reading]
    assert sorted(reading) == sorted(joining)


def test_keys_of_what_all_prompts_begin_with_are_read_once_for_all_rows(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(base, 9, "You are asked many things. ")
    expected = complete_greedily(base, prompts, SETTINGS, at_once=3)
    attend = shared_keys.attend_with_sums
    keys: set[tuple[int, int]] = set()

    def noting(module: Any, query: Any, key: Any, *others: Any, **settings: Any) -> Any:
        keys.add((key.shape[0], key.shape[2]))
        return attend(module, query, key, *others, **settings)

    monkeypatch.setattr(shared_keys, "attend_with_sums", noting)
    assert complete_greedily(base, prompts, SETTINGS, at_once=3) == expected
    assert not keys, "so few gain nothing"
    monkeypatch.setattr(shared_keys, "_LEAST", 1)
    assert complete_greedily(base, prompts, SETTINGS, at_once=3) == expected
    shared = len(shared_prefix(prompts))
    assert (1, shared) in keys
    own = max(visible for rows, visible in keys if rows > 1)
    assert own < max(map(len, prompts)) + SETTINGS.max_new_tokens - shared


def test_long_prompts_are_read_in_portions(
    base: Base, passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = prompts_of(base, 9, "You are asked many things. ")
    expected = complete(base, prompts, SETTINGS)
    complete_greedily(base, prompts, SETTINGS, at_once=6)
    [[shared], *_] = passes
    new = sorted(len(prompt) - shared for prompt in prompts)
    for most in (new[0] - 1, new[-1] + new[-2]):
        passes.clear()
        monkeypatch.setattr(decoding, "_READ_ON_A_CPU", most)
        assert complete_greedily(base, prompts, SETTINGS, at_once=6) == expected
        by_pass = [[length for length in lengths if length > 5] for lengths in passes[1:]]
        joins = [lengths for lengths in by_pass if lengths]
        assert sorted(length for lengths in joins for length in lengths) == new
        assert all(sum(lengths) <= most or len(lengths) == 1 for lengths in joins)
        assert (max(map(len, joins)) > 1) == (most > new[0])


def test_a_single_prompt_has_no_prefix_of_its_own(base: Base, passes: list[list[int]]) -> None:
    (prompt,) = prompts_of(base, 1)
    complete_greedily(base, [prompt], SETTINGS, at_once=3)
    assert passes[0] == [len(prompt)]
    passes.clear()
    complete_greedily(base, [prompt, prompt], SETTINGS, at_once=3)
    assert passes[:2] == [[len(prompt) - 1], [1, 1]]


def test_slots_are_added_as_texts_grow(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    base, settings = open_base(base.name), replace(SETTINGS, max_new_tokens=60)
    prompts = prompts_of(base, 6)
    expected = complete(base, prompts, settings)
    monkeypatch.setattr(kv_cache, "_AHEAD", 3)
    assert complete_greedily(base, prompts, settings, at_once=4) == expected


def test_guesses_that_come_true_save_passes(llama: str, passes: list[list[int]]) -> None:
    """A model repeats itself soon: each guess is verified in the pass that reads it."""
    base, settings = open_base(llama), replace(SETTINGS, max_new_tokens=60)
    prompts = prompts_of(base, 4)
    expected = complete(base, prompts, settings)
    assert complete_greedily(base, prompts, settings, at_once=4) == expected
    assert len(passes) < 60
    assert any(max(lengths) > 2 for lengths in passes[1:])


def test_a_model_without_slots_takes_transformers_loop(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = open_base(llama)
    expected = complete(base, prompts_of(base, 3), SETTINGS)
    monkeypatch.setattr(cache_trial, "can_read", lambda model: False)
    monkeypatch.delattr(generation, "complete_greedily")
    assert complete_prompts(base, prompts_of(base, 3), SETTINGS, at_once=2) == expected
    assert not base.batches_continuously


def tiny(**others: Any) -> dict[str, Any]:
    """The sizes of a small model of the byte tokenizer's vocabulary."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return {**sizes, "num_attention_heads": 4, "bos_token_id": 1, "eos_token_id": 2, **others}


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


LOCAL = {"attention_types": [[["global", "local"], 1]], "window_size": 256}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
LONG: dict[str, Any] = {"rope_type": "longrope", "original_max_position_embeddings": 48}
LONG |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPTNeoConfig(**without(tiny(**LOCAL), "num_attention_heads"), num_heads=4),
        transformers.LlamaConfig(**tiny(sliding_window=20)),
    ],
    ids=["a mask of its own", "a window that it does not heed"],
)
def test_a_window_that_slots_would_get_wrong_is_found(
    config: transformers.PretrainedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "other", lambda: config)
    base = open_base(save_model(tmp_path, "other"))
    assert not base.batches_continuously
    assert getattr(base.model.config, "sliding_window", None) in (None, 20)


@pytest.mark.parametrize("rope", [LONG, DYNAMIC], ids=["longrope", "dynamic"])
def test_frequencies_that_change_with_the_length_leave_long_prompts_to_transformers_loop(
    rope: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[list[int]]
) -> None:
    sizes = tiny(max_position_embeddings=48, rope_parameters=rope)
    monkeypatch.setitem(FAMILIES, "other", lambda: transformers.LlamaConfig(**sizes))
    base = open_base(save_model(tmp_path, "other"))
    assert base.batches_continuously
    for length, continuous in ((48 - SETTINGS.max_new_tokens, True), (40, False), (60, False)):
        prompts = [range(3, 3 + length)]
        passes.clear()
        written = complete_prompts(base, prompts, SETTINGS, at_once=2)
        assert written == complete(base, prompts, SETTINGS)
        assert bool(passes) == continuous


def test_a_cache_that_loses_its_prefix_is_found_by_the_trial(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "hold", lambda *arguments: None)
    assert not open_base(llama).batches_continuously

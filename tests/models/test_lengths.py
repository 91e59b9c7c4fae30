"""Lengths of records before a run: histograms, what is too long, what is passed over."""

from __future__ import annotations

import itertools

import pytest

from lorakit.models.lengths import cut_row, histogram, length_row, read_lengths
from lorakit.records.record import Record
from tests.support.models import open_base


@pytest.mark.parametrize(
    "lengths",
    [[1], [7, 7], [1, 2, 3], [1, 10], [9, 10], [1, 11], [99, 101], [3, 10_000], [5, 6, 200, 411]],
    ids=str,
)
def test_every_length_is_in_one_of_at_most_ten_bins(lengths: list[int]) -> None:
    bins = histogram(lengths)
    assert len(bins) <= 10
    assert bins[0]["from"] <= min(lengths)
    assert bins[-1]["to"] >= max(lengths)
    for part, following in itertools.pairwise(bins):
        assert part["to"] + 1 == following["from"]
    for part in bins:
        within = [length for length in lengths if part["from"] <= length <= part["to"]]
        assert part["records"] == len(within)
    assert min(bins[0]["records"], bins[-1]["records"]) > 0


@pytest.mark.parametrize(
    ("lengths", "width"), [([1, 9], 1), ([1, 10], 2), ([1, 90], 10), ([1, 91], 20), ([0, 401], 50)]
)
def test_bins_have_a_round_width(lengths: list[int], width: int) -> None:
    first = histogram(lengths)[0]
    assert first["to"] - first["from"] + 1 == width


def test_quantiles_are_lengths_that_records_have() -> None:
    row = length_row("prompts", [*range(1, 11)])
    assert [row[name] for name in ("least", "median", "ninth_decile", "most")] == [1, 5, 9, 10]
    assert row["mean"] == 5.5
    assert length_row("prompts", []) == {
        "section": "lengths",
        "of": "prompts",
        "records": 0,
        "bins": [],
    }


def test_a_record_that_cannot_be_used_is_passed_over_and_its_error_kept(llama: str) -> None:
    encoder = open_base(llama).encoder(chat="off", max_length=20)
    texts = ["ab", "x" * 40, "abc", "y" * 50]
    fields = [{"prompt": text, "completion": "!"} for text in texts]
    records = [Record(row, f"f:{number}") for number, row in enumerate(fields, 1)]
    records.insert(0, Record({"messages": [{"role": "user", "content": "a"}] * 2}, "f:0"))
    reading = read_lengths(records, encoder)
    assert [length.where for length in reading.whole] == ["f:1", "f:2", "f:3", "f:4"]
    assert [example.where for example in reading.examples] == ["f:1", "f:3"]
    assert "f:0" in str(reading.error)  # the first, as the run would
    row = cut_row(reading)
    assert (row["too_long"], row["share"], row["tokens_cut"]) == (2, 0.5, 0)
    assert row["longest"] == [{"where": "f:4", "tokens": 53}, {"where": "f:2", "tokens": 43}]


def test_what_is_not_kept_is_measured_all_the_same(llama: str) -> None:
    encoder = open_base(llama).encoder(chat="off", max_length=20, truncate=True)
    records = [Record({"prompt": "x" * 40, "completion": "!"}, "f:1")]
    kept, light = read_lengths(records, encoder), read_lengths(records, encoder, keep=False)
    assert light.fitted == kept.fitted == [(18, 2, "f:1", 23)]
    assert (len(kept.examples), light.examples) == (1, [])

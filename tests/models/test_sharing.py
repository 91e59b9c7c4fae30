"""What several processes share out comes back as one process computes it, in order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch

from lorakit.errors import LorakitError
from lorakit.models.devices import pick_device
from lorakit.models.generation import generate
from lorakit.models.sharing import ALONE, Team, exchange, new_accelerator, new_team
from lorakit.records.record import Record
from lorakit.runs.processes import LostProcessError
from lorakit.settings import GenerationSettings
from tests.support.models import open_base
from tests.support.teams import Threads, run_as_team
from tests.support.training_data import rows

COUNTS = [1, 2, 3]
SETTINGS = GenerationSettings(max_new_tokens=6, batch_size=2, device="cpu", dtype="float32")


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("items", range(8))
def test_items_come_back_in_order_and_each_is_computed_once(count: int, items: int) -> None:
    computed: list[tuple[int, int]] = []

    def work(team: Team) -> list[int]:
        def square(item: int) -> int:
            computed.append((item, team.number))
            return item * item

        return list(team.in_turn(range(items), square))

    assert run_as_team(count, work) == [[item * item for item in range(items)]] * count
    assert sorted(computed) == [(item, item % count) for item in range(items)]


@pytest.mark.parametrize("count", COUNTS)
def test_tensors_are_added_up_in_the_order_of_one_process(count: int) -> None:
    """The summands differ so much in size that another order would round to another sum."""
    draw = torch.Generator().manual_seed(0)
    summands = [torch.randn(3, 2, generator=draw) * 10.0 ** (5 * n % 7) for n in range(7)]

    def work(team: Team) -> tuple[torch.Tensor, torch.Tensor]:
        whole, first = torch.zeros(3, 2), torch.zeros(())
        for part, corner in team.tensors_in_turn(summands, lambda part: [part, part[0, 0]]):
            whole += part
            first += corner
        return whole, first

    expected = torch.zeros(3, 2)
    for part in summands:
        expected += part
    backwards = torch.zeros(3, 2)
    for part in reversed(summands):
        backwards += part
    assert not torch.equal(expected, backwards)
    for whole, first in run_as_team(count, work):
        assert torch.equal(whole, expected)
        assert torch.equal(first, expected[0, 0])


@pytest.mark.parametrize("value", [0, "", {}, None, False, [3]])
def test_every_process_has_the_firsts_value_even_an_empty_one(value: object) -> None:
    values = run_as_team(3, lambda team: team.from_first(value if team.is_first else "another's"))
    assert values == [value] * 3


def test_a_process_that_fails_ends_the_others() -> None:
    def work(team: Team) -> None:
        for _ in team.in_turn(range(6), lambda item: 1 // (4 - item)):
            pass

    first, second = Threads(2).run(work)
    assert isinstance(first, ZeroDivisionError)
    assert isinstance(second, LostProcessError)


@pytest.mark.parametrize("kind", [RuntimeError, torch.distributed.DistBackendError])
@pytest.mark.parametrize("value", [torch.zeros(2), "an object"], ids=["tensor", "object"])
def test_a_lost_connection_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], value: object
) -> None:
    def broken(*arguments: object) -> None:
        raise kind("[gloo/pair.cc:537]\nConnection closed by peer")

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather", broken)
    monkeypatch.setattr(torch.distributed, "all_gather_object", broken)
    with pytest.raises(LostProcessError, match=r"^another process of this run has ended; "):
        exchange(value)


def test_a_process_without_a_launcher_is_alone() -> None:
    assert new_team("cpu") is ALONE
    assert ALONE.exchange("a") == ["a"]


def test_processes_that_accelerate_has_not_connected_are_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "Accelerator", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(LorakitError, match="accelerate has connected 1 of 2 processes; "):
        new_accelerator("cpu")


@pytest.mark.parametrize(
    ("rank", "processes", "device"), [(None, None, 0), (1, 2, 1), (0, 3, None), (2, None, None)]
)
def test_every_process_has_a_gpu_of_its_own_or_all_say_how_many_there_are(
    monkeypatch: pytest.MonkeyPatch, rank: int | None, processes: int | None, device: int | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", processes)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))
    if device is None:
        with pytest.raises(LorakitError, match="fewer GPUs than processes, 2 for 3; start at most"):
            pick_device("cuda")
    else:
        assert pick_device("cuda") == torch.device("cuda", device)


# — rows of generate —

SAMPLING = {
    "greedy": {},
    "sampled": {"temperature": 1.5, "seed": 3},
    "several samples": {"temperature": 1.5, "samples": 3, "top_k": 20},
}


@pytest.mark.parametrize("changes", SAMPLING.values(), ids=SAMPLING.keys())
@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_generate_what_one_generates_in_order(
    llama: str, count: int, changes: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, **changes)
    sample = [Record(row, f"data:{row['id']}") for row in rows(37)]
    read: list[int] = []

    def records() -> Iterator[Record]:
        for record in sample:
            read.append(1)
            yield record

    def work(team: Team) -> list[Any]:
        base = open_base(llama)
        source = records() if team.is_first else ()
        completed = generate(base, base.encoder(chat="off"), source, settings, team=team)
        return [dict(record.fields) for record, _ in completed]

    (one,) = run_as_team(1, work)
    assert len(one) == len(sample) > 32  # more than a window
    assert len({row["prediction"] for row in one}) > 3
    read.clear()
    assert run_as_team(count, work) == [one] * count
    assert len(read) == len(sample)


def test_no_more_than_a_window_is_read_ahead(llama: str) -> None:
    taken: list[int] = []

    def records() -> Iterator[Record]:
        for row in rows(80):
            taken.append(1)
            yield Record(row, "data")

    def work(team: Team) -> int:
        base = open_base(llama)
        source = records() if team.is_first else ()
        completed = generate(base, base.encoder(chat="off"), source, SETTINGS, team=team)
        return len(list(itertools.islice(completed, 32)))

    assert run_as_team(2, work) == [32, 32]
    assert len(taken) == 32

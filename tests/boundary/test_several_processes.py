"""`find-boundary` over several processes gives the records of one, and saves what all computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.boundary.evaluate import evaluate
from lorakit.boundary.loss import evaluate_loss
from lorakit.boundary.probability import read_probabilities
from lorakit.models.sharing import Team
from lorakit.runs.resume import SavedValues
from lorakit.settings import BoundarySettings
from tests.support.boundary_models import SETTINGS, Notes, random_adapter
from tests.support.models import open_base
from tests.support.teams import run_as_team
from tests.support.training_data import rows, save_rows

FEW = replace(SETTINGS, batch_size=2, max_new_tokens=4)


def evaluated(*arguments: Any, **options: Any) -> list[Any]:
    return list(evaluate(*arguments, **options).as_records())


def by_loss(*arguments: Any, **options: Any) -> list[Any]:
    return list(evaluate_loss(*arguments, **options).as_records())


SEARCHES: dict[str, tuple[Callable[..., list[Any]], BoundarySettings]] = {
    "evaluation": (evaluated, BoundarySettings(metric="rouge1")),
    "loss": (by_loss, BoundarySettings(metric="loss")),
    "probability": (read_probabilities, BoundarySettings(by="probability", compare=(1, 2))),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "val.jsonl", rows(11))


@pytest.mark.parametrize("name", SEARCHES)
def test_three_processes_find_what_one_finds(
    llama: str, data: str, tmp_path: Path, name: str
) -> None:
    search, settings = SEARCHES[name]

    def work(team: Team, before: dict[str, object]) -> tuple[list[Any], dict[str, object], int]:
        base, path = open_base(llama), tmp_path / str(team.count)
        with SavedValues(path, resume=False, writer="test", writes=team.is_first) as saved:
            saved.values |= team.from_first(before if team.is_first else {})
            options = {"generation": FEW, "reporter": Notes(), "saved": saved, "team": team}
            records = search(base, random_adapter(base), data, settings=settings, **options)
            lines = len(path.read_text().splitlines()) if team.is_first else 0
        return records, saved.values, lines

    ((records, values, lines),) = run_as_team(1, lambda team: work(team, {}))
    assert lines == len(values) > 1
    first, *others = run_as_team(3, lambda team: work(team, {}))
    assert first == (records, values, lines)
    assert others == [(records, values, 0)] * 2
    half = dict(list(values.items())[: lines // 2])  # of a run that was killed
    first, *others = run_as_team(3, lambda team: work(team, half))
    assert first == (records, values, lines - lines // 2)
    assert others == [(records, values, 0)] * 2


def test_the_first_process_alone_writes_the_outputs(llama: str, data: str, tmp_path: Path) -> None:
    def work(team: Team) -> str:
        base = open_base(llama)
        path = tmp_path / f"{team.count}.{team.number}"
        evaluate(
            base,
            random_adapter(base),
            data,
            settings=BoundarySettings(metric="rouge1"),
            generation=FEW,
            reporter=Notes(),
            predictions=str(path),
            team=team,
        )
        return path.read_text() if path.exists() else ""

    (one,) = run_as_team(1, work)
    assert len(one.splitlines()) > 11
    assert run_as_team(2, work) == [one, ""]

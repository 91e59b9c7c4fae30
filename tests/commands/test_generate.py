"""`lorakit generate`: where the predictions of each adapter go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from lorakit.adapters.storage import save_adapter
from lorakit.cli import lorakit
from tests.support.boundary_models import random_adapter
from tests.support.models import open_base


def generate(*arguments: object) -> None:
    result = CliRunner().invoke(lorakit, ["generate", *map(str, arguments)])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("count", "names"),
    [
        pytest.param(0, ["zero-shot"], id="none"),
        pytest.param(1, ["xs"], id="one"),
        pytest.param(2, ["xs", "xs-2"], id="two of one name"),
    ],
)
def test_predictions_go_to_files_named_after_the_adapters(
    count: int, names: list[str], llama: str, records: Path, tmp_path: Path
) -> None:
    base = open_base(llama)
    adapters = []
    for number in range(count):
        (tmp_path / str(number)).mkdir()
        path = str(tmp_path / str(number) / "xs.safetensors")
        adapters.append(save_adapter(random_adapter(base, seed=number), path))
    options = ("--model", llama, "--device", "cpu", "--max-new-tokens", 4)
    generate(*adapters, "--data", records, *options, "-o", tmp_path / "{name}.out")
    assert sorted(path.stem for path in tmp_path.glob("*.out")) == sorted(names)
    for name in names:
        rows = [json.loads(line) for line in (tmp_path / f"{name}.out").read_text().splitlines()]
        assert [row["id"] for row in rows] == ["a", "b", "c"]
        assert all("prediction" in row for row in rows)

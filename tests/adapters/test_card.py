from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import card_text, command_line
from lorakit.adapters.history import Header, HistoryEntry
from lorakit.adapters.storage import load_adapter, save_adapter
from tests.support.adapters import tiny

MERGE: HistoryEntry = {
    "command": "merge",
    "versions": {"numpy": "2.0", "lorakit": "0.1.0"},
    "settings": {
        "method": "adaptive",
        "lr": 0.001,
        "epochs": 2,
        "truncate": False,
        "gradient_checkpointing": True,
        "max_length": None,
        "prune_ratio": 0.1,
        "target_modules": ["q_proj", "v_proj"],
    },
    "parents": {"xs": "1" * 64, "two words": "2" * 64},
    "data": "3" * 64,
    "val": "4" * 64,
    "search": {
        "by": "loss",
        "tried": [
            {"prune_ratio": 0.0, "steps": 9, "loss": 1.25, "stopped": True, "best": False},
            {"prune_ratio": 0.1, "steps": 9, "loss": 1.125, "stopped": False, "best": True},
        ],
        "test": {"against": 0.0, "difference": -0.125, "p_value": 0.25, "trials": 99, "seed": 0},
    },
}
HUB: dict[str, object] = {"name": "owner/name", "revision": "abc", "fingerprint": "f"}
FOLDER: dict[str, object] = {"name": "/home/me/models/llama", "local": True}


def made_on(base: dict[str, object] | None) -> Adapter:
    header: dict[str, object] = {"format": 1, "chat": "on", "history": [MERGE]}
    if base is not None:
        header["base"] = base
    adapter = tiny()
    return Adapter(adapter.tensors, adapter.config, Header(**header))  # type: ignore[typeddict-item]


def front_matter(text: str) -> dict[str, object]:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    fields = yaml.safe_load(matter)
    assert isinstance(fields, dict)
    return fields


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        (
            HUB,
            {
                "base_model": "owner/name",
                "base_model_relation": "adapter",
                "base_model_revision": "abc",
            },
        ),
        ({"name": "1e5"}, {"base_model": "1e5", "base_model_relation": "adapter"}),
        (FOLDER, {}),
        ({"name": "../llama"}, {}),
        ({"name": "tiny"}, {}),
        (None, {}),
    ],
    ids=["hub", "a name like a number", "folder", "path", "tiny", "none"],
)
def test_the_front_matter_names_a_base_of_the_hub_and_no_folder(
    base: dict[str, object] | None, fields: dict[str, object]
) -> None:
    matter = front_matter(card_text(made_on(base)))
    assert matter == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorakit"],
        **fields,
    }


def test_a_card_tells_base_parents_data_command_and_scores() -> None:
    text = card_text(made_on(HUB))
    assert "- base model: `owner/name`\n- revision: `abc`\n" in text
    assert f"- parent `xs`: SHA-256 `{'1' * 64}`\n" in text
    assert f"- `--data`: SHA-256 `{'3' * 64}`\n- `--val`: SHA-256 `{'4' * 64}`\n" in text
    assert "- loss 1.25, prune ratio 0, steps 9, stopped\n" in text
    assert (
        "- test of the best: against 0, difference -0.125, p value 0.25, seed 0, trials 99" in text
    )
    assert "- loss 1.125, prune ratio 0.1, steps 9, best\n" in text
    assert "- versions: lorakit 0.1.0, numpy 2.0\n" in text
    assert 'from_pretrained("owner/name", revision="abc")' in text


def test_a_card_holds_no_path() -> None:
    text = card_text(made_on(FOLDER))
    assert "/home" not in text
    assert "- base model: `llama`\n" in text


def test_a_command_line_gives_the_settings_of_the_history() -> None:
    assert command_line(MERGE) == (
        "lorakit merge xs 'two words' --data DATA --val VAL --method adaptive --lr 0.001 "
        "--epochs 2 --gradient-checkpointing --prune-ratio 0.1 --target-modules q_proj,v_proj"
    )


def test_lorahubs_weights_are_a_result_and_no_option() -> None:
    settings = {"method": "lorahub", "seed": 1, "weights": {"xs": [0.5, 1.0]}}
    assert command_line({"command": "merge", "settings": settings}) == (
        "lorakit merge --method lorahub --seed 1"
    )
    best = {"weights": [0.5, 1.0], "loss": 2.5, "objective": 2.75}
    adapter = tiny()
    header: Header = {"history": [{"command": "merge", "settings": settings, "best": best}]}
    text = card_text(Adapter(adapter.tensors, adapter.config, header))
    assert "- best: loss 2.5, objective 2.75, weights 0.5 1\n" in text


def test_a_name_that_could_end_a_fence_or_a_line_does_not() -> None:
    entry: HistoryEntry = {"command": "merge", "parents": {"a`\n```": "5"}}
    adapter = tiny()
    text = card_text(Adapter(adapter.tensors, adapter.config, {"history": [entry]}))
    assert text.count("```") % 2 == 0 or "\\n" in text
    assert "a'\\n'''" in text


@pytest.mark.parametrize("name", ["x", "x/", "runs/x", ".hidden"])
def test_a_name_without_suffix_is_a_folder_with_a_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_adapter(made_on(HUB), name)
    assert sorted(path.name for path in Path(name).iterdir()) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors"),
    ]
    assert Path(name, "README.md").read_text(encoding="utf-8") == card_text(load_adapter(name))


def test_the_same_adapter_has_the_same_card_in_any_folder(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_adapter(made_on(FOLDER), str(tmp_path / name))
    one, other = ((tmp_path / name / "README.md").read_bytes() for name in ("a", "b"))
    assert one == other


PEFTS = "---\nbase_model: x\nlibrary_name: peft\n---\n\n# Model Card for Model ID\n"


@pytest.mark.parametrize(
    ("old", "stays"),
    [("# My project\n", True), (PEFTS, False), (card_text(tiny()), False)],
    ids=["a page of the user's", "PEFT's card", "an old card"],
)
def test_only_the_card_of_an_adapter_is_replaced(old: str, stays: bool, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(old)
    save_adapter(made_on(HUB), str(tmp_path))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (text == old) is stays
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 2

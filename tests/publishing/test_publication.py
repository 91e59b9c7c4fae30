"""What of a folder is published, and its page: huggingface_hub's own classes read it back."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.card import RELATIONS, card_text, model_card_text
from lorakit.adapters.storage import save_adapter
from lorakit.errors import LorakitError
from lorakit.publishing.page import check_page, with_scores
from lorakit.publishing.publication import open_publication
from tests.support.adapters import tiny
from tests.support.training_data import save_rows

TINY = Path(__file__).parents[2] / "lorakit" / "tiny"
NUMBERS = {"rougeL": 31.25, "em": 4.0}
SIGNATURES = {"rougeL": "rougeL|lang:en", "em": "em|lang:en"}
LINE = {"file": "runs/test.jsonl", "count": 60, "lang": "en", **NUMBERS, "signatures": SIGNATURES}


def on_the_hub(name: str = "owner/base") -> Adapter:
    adapter = tiny()
    return Adapter(adapter.tensors, adapter.config, {"base": {"name": name, "revision": "abc"}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A PEFT folder with its card."""
    save_adapter(on_the_hub(), f"{tmp_path / 'adapter'}/")
    return tmp_path / "adapter"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder without a page."""
    shutil.copytree(TINY, tmp_path / "model", ignore=shutil.ignore_patterns("*.md", "__*"))
    return tmp_path / "model"


def scores(folder: Path, *lines: dict[str, object]) -> str:
    save_rows(folder / "scores.jsonl", list(lines))
    return str(folder / "scores.jsonl")


def test_an_adapter_is_its_three_files(folder: Path) -> None:
    (folder / ".adapter_model.safetensors.lock").write_text("")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("url = secret")
    publication = open_publication(str(folder), "owner/name")
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert publication.files == {name: (folder / name).stat().st_size for name in names}
    assert (publication.kind, publication.rewrites) == ("adapter", False)


def test_an_adapter_without_a_page_gets_its_card(folder: Path) -> None:
    (folder / "README.md").unlink()
    publication = open_publication(str(folder), "owner/name")
    assert publication.page == card_text(on_the_hub())
    assert not (folder / "README.md").exists()
    publication.write_page()
    assert (folder / "README.md").read_text() == publication.page


def test_a_model_is_whole_and_keeps_the_page_it_has(model: Path) -> None:
    publication = open_publication(str(model), "owner/name")
    assert (publication.kind, publication.page) == ("model", None)
    assert {"config.json", "model.safetensors"} <= publication.files.keys()
    scored = open_publication(str(model), "owner/name", scores(model.parent, LINE))
    assert scored.files["README.md"] == len(str(scored.page).encode())
    assert str(scored.page).startswith("---\nmodel-index:\n")
    assert "| test | 60 | 31.25 | 4.00 |" in str(scored.page)


def test_gguf_files_are_known_by_their_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "model-q8_0.gguf").write_bytes(b"GGUF" + bytes(4))
    assert open_publication(str(tmp_path), "owner/name").kind == "gguf"
    (tmp_path / "model-q8_0.gguf").write_bytes(b"XXXX")
    with pytest.raises(LorakitError, match="is no GGUF file; write it again"):
        open_publication(str(tmp_path), "owner/name")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("half.part", "is of a run that was stopped; finish it with --resume"),
        (".adapter_model.safetensors.abcdefgh.part", "is of a run that was stopped"),
        (".fuse.resume", "is of a run that was stopped"),
        ("pytorch_model.bin", "is a pickle, or may hold one"),
        ("deep/weights.PT", "is a pickle, or may hold one"),
        ("optimizer.pt", "is a trainer's state"),
        ("optimizer.safetensors", "is a trainer's state"),
        ("rng_state_0.pth", "is a trainer's state"),
    ],
)
def test_a_file_that_is_no_product_is_refused_by_name(
    name: str, message: str, folder: Path
) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(b"x")
    with pytest.raises(LorakitError, match=f"{name} {message}"):
        open_publication(str(folder), "owner/name")


def test_what_is_damaged_or_incomplete_is_refused(folder: Path, model: Path) -> None:
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LorakitError, match=r"holds no adapter_config\.json; run: lorakit convert"):
        open_publication(str(folder), "owner/name")
    tensors = model / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-8])
    with pytest.raises(LorakitError, match=r"model\.safetensors"):
        open_publication(str(model), "owner/name")
    (model / "config.json").unlink()
    with pytest.raises(LorakitError, match=r"holds no config\.json, which is written last"):
        open_publication(str(model), "owner/name")


def test_a_folder_of_anything_else_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(LorakitError, match="there is no folder missing; check the path"):
        open_publication("missing", "owner/name")
    with pytest.raises(LorakitError, match="is no folder"):
        open_publication(str(folder / "adapter_model.safetensors"), "owner/name")
    (tmp_path / "empty").mkdir()
    with pytest.raises(LorakitError, match="holds neither an adapter, nor a model"):
        open_publication(str(tmp_path / "empty"), "owner/name")
    shutil.copy(TINY / "config.json", folder)
    with pytest.raises(LorakitError, match="holds an adapter and a model"):
        open_publication(str(folder), "owner/name")


@pytest.mark.parametrize(
    ("text", "library", "relation"),
    [
        (card_text(on_the_hub()), "peft", "adapter"),
        (model_card_text(on_the_hub()), "transformers", "finetune"),
        (model_card_text(on_the_hub(), "quantized"), "transformers", "quantized"),
    ],
    ids=["adapter", "fused", "quantised"],
)
def test_huggingface_hub_reads_base_and_relation(
    text: str, library: str, relation: str, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text(text)
    assert metadata_load(tmp_path / "README.md") == {
        "base_model": "owner/base",
        "base_model_relation": relation,
        "base_model_revision": "abc",
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": ["lora", "lorakit"],
    }
    assert relation in RELATIONS
    check_page(text, "README.md")


def test_scores_are_a_model_index_that_comes_back_from_huggingface_hub(folder: Path) -> None:
    other = {**LINE, "file": "other.jsonl", "rougeL": 20.0, "group": {"lang": "de"}}
    publication = open_publication(str(folder), "owner/name", scores(folder.parent, LINE, other))
    page = folder.parent / "page.md"
    page.write_text(str(publication.page))
    metadata = metadata_load(page) or {}
    index = metadata["model-index"]
    name, results = model_index_to_eval_results(index)
    assert eval_results_to_model_index(name, results) == index
    assert name == "name"
    found = [
        (r.dataset_name, r.dataset_config, r.metric_type, r.metric_value, r.metric_args)
        for r in results
    ]
    assert found == [
        (data, group, metric, value, {"signature": SIGNATURES[metric]})
        for data, group, values in [
            ("test", None, NUMBERS),
            ("other", "lang: de", {"rougeL": 20.0, "em": 4.0}),
        ]
        for metric, value in values.items()
    ]
    assert {r.task_type for r in results} == {"text-generation"}
    assert metadata["base_model"] == "owner/base"


def test_scores_are_a_table_that_new_ones_replace(folder: Path) -> None:
    page = (folder / "README.md").read_text()
    significance = {"baseline": "b.jsonl", "intervals": {"rougeL": [30.0, 32.5], "em": [3, 5]}}
    lines = [{**LINE, "significance": significance}, {**LINE, "file": "b.jsonl", "rougeL": 9.0}]
    scored = with_scores(page, "name", scores(folder.parent, *lines))
    assert scored.endswith(
        "\n## Scores\n\n"
        "|  | records | rougeL | em |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| test | 60 | 31.25 [30.00, 32.50] | 4.00 [3.00, 5.00] |\n"
        "| b | 60 | 9.00 | 4.00 |\n\n"
        "In brackets: 95 % intervals.\n\n"
        "- rougeL: `rougeL|lang:en`\n- em: `em|lang:en`\n"
    )
    assert "name: b" not in scored.split("---")[1]  # a baseline's scores are not the model's
    again = with_scores(scored, "name", scores(folder.parent, LINE))
    assert again == with_scores(page, "name", scores(folder.parent, LINE))


def test_the_text_of_a_users_page_is_left_alone(folder: Path) -> None:
    text = "# Mine\n\n## Scores\n\nGood.\n"
    (folder / "README.md").write_text(text)
    assert open_publication(str(folder), "owner/name").page == text
    page = with_scores(text, "name", scores(folder.parent, LINE))
    assert page.endswith(f"---\n{text}")
    assert len(ModelCard(page).data.get("eval_results")) == 2


@pytest.mark.parametrize(
    "line",
    [{"id": "1", "prediction": "x"}, {**LINE, "rougeL": "high"}, {**LINE, "signatures": {}}],
    ids=["a record", "a text", "no metrics"],
)
def test_a_file_of_anything_but_scores_is_refused(line: dict[str, object], folder: Path) -> None:
    path = scores(folder.parent, line)
    with pytest.raises(LorakitError, match=rf"{path}:1 is no line of lorakit score"):
        open_publication(str(folder), "owner/name", path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("base_model: /home/me/llama", "is no model of the hub"),
        ("base_model: [owner/a, 3]", "is no model of the hub"),
        ("base_model: a/b\nbase_model_relation: child", "write one of adapter, finetune, merge"),
        ("a: [", "its metadata cannot be read"),
        ("- a", "its metadata cannot be read"),
        ("model-index:\n- name: x", "its metadata cannot be read"),
    ],
    ids=["a path", "a number", "relation", "no YAML", "a list", "model-index"],
)
def test_metadata_that_the_hub_refuses_is_refused_here(
    metadata: str, message: str, folder: Path
) -> None:
    (folder / "README.md").write_text(f"---\n{metadata}\n---\n\n# x\n")
    with pytest.raises(LorakitError, match=rf"README\.md: .*{message}"):
        open_publication(str(folder), "owner/name")


def test_a_shard_that_the_index_names_has_to_be_there(model: Path) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    with open(model / "model-00001-of-00002.safetensors", "rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    places = {key: "model-00001-of-00002.safetensors" for key in header if key[:2] != "__"}
    places["lost.weight"] = "model-00002-of-00002.safetensors"
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(LorakitError):
        open_publication(str(model), "owner/name")

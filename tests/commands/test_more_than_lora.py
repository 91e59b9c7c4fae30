"""Every command that reads an adapter, on each kind that holds more than A and B."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import transformers
from click.testing import CliRunner, Result

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from tests.support.peft_models import with_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]
LAYERS = 8  # of tiny
TINY = Path(__file__).parents[2] / "lorakit" / "tiny"
PLAIN = {"target_modules": ["q_proj", "v_proj"], "r": 2, "task_type": "CAUSAL_LM"}
KINDS: dict[str, dict[str, Any]] = {
    "head": {**PLAIN, "modules_to_save": ["lm_head", "embed_tokens"]},
    "norms": {**PLAIN, "modules_to_save": ["input_layernorm", "model.norm"]},
    "DoRA": {**PLAIN, "use_dora": True},
}
FUSE = "fuse it and go on with that model: lorakit fuse"
CARRIED = "carried"
ROWS = {
    "convert to a file": ("convert {a} -o {o}.safetensors", CARRIED, CARRIED, CARRIED),
    "convert to a folder": ("convert {a} -o {o}/", CARRIED, CARRIED, CARRIED),
    "convert to MLX": ("convert {a} --to mlx -o {o}/", FUSE, FUSE, FUSE),
    "convert to GGUF": ("convert {a} --to gguf -o {o}.gguf", *("--to gguf -o fused.gguf",) * 3),
    "convert for vLLM": ("convert {a} --to vllm -o {o}/", FUSE, FUSE, FUSE),
    "push": ("push {a} owner/name --dry-run", CARRIED, CARRIED, CARRIED),
    "strip-layers": ("strip-layers {a} --boundary 1 -o {o}/", CARRIED, CARRIED, CARRIED),
    "strip-layers by importance": (
        "strip-layers {a} --by importance --share 0.5 --data {d} -o {o}/",
        *(FUSE, FUSE, FUSE),
    ),
    "scale-layers": (
        "scale-layers {a} --from 1 --factor 0.5 -o {o}/",
        CARRIED,
        "input_layernorm.weight whole, and how that differs from the base is not known",
        "q_proj with DoRA's magnitude, and how that differs",
    ),
    "scale-layers by 1": (
        "scale-layers {a} --from 1 --factor 1 -o {o}/",
        *(CARRIED, CARRIED, CARRIED),
    ),
    "merge of one": ("merge {a} --rank 1 -o {o}/", CARRIED, CARRIED, "--approximate dora"),
    "merge of equals": ("merge {a} {a} --method cat -o {o}/", CARRIED, CARRIED, "--approximate"),
    "merge with plain LoRA": (
        "merge {a} {p} --method linear -o {o}/",
        "differ in 'lm_head.weight', which is held whole",
        "differ in 'model.layers.0.input_layernorm.weight', which is held whole",
        "--approximate dora",
    ),
    "portable merge": (
        "merge {a} --rank 1 --portable -o {o}/",
        "which vLLM or llama.cpp cannot read; fuse",
        "which vLLM or llama.cpp cannot read; fuse",
        "--approximate dora",
    ),
    "merge that trains": ("merge {a} {p} --data {d} -o {o}/", FUSE, FUSE, FUSE),
    "LoRAHub": ("merge {a} {p} --data {d} --method lorahub -o {o}/", FUSE, FUSE, FUSE),
    "learned weights": (
        "merge {a} {p} --data {d} --method learned-weights -o {o}/",
        *(FUSE, FUSE, FUSE),
    ),
    "find-boundary": ("find-boundary {a} --data {d}", FUSE, FUSE, FUSE),
    "inspect": ("inspect {a}", CARRIED, CARRIED, CARRIED),
    "inspect --spectrum": ("inspect {a} --spectrum", FUSE, FUSE, FUSE),
    "inspect --importance": ("inspect {a} --importance --data {d}", FUSE, FUSE, FUSE),
    "generate": ("generate {a} --data {d} --max-new-tokens 2", CARRIED, CARRIED, CARRIED),
    "generate --dry-run": ("generate {a} --data {d} --dry-run --measure", *(CARRIED,) * 3),
    "fuse": ("fuse {a} -o {o}/", CARRIED, CARRIED, CARRIED),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with PEFT's adapters of all kinds on tiny, and a record."""
    folder = tmp_path_factory.mktemp("kinds")
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    for kind, config in {**KINDS, "plain": PLAIN}.items():
        model = with_lora(copy.deepcopy(base), config)
        for name, parameter in model.named_parameters():
            parameter.data *= 0.2 if ".lora_A." in name else 1
        model.peft_config["default"].base_model_name_or_path = "tiny"
        if kind == "head":
            head = model.base_model.model.lm_head.modules_to_save["default"].weight
            model.base_model.model.model.embed_tokens.modules_to_save["default"].weight = head
        model.save_pretrained(folder / kind, save_embedding_layers=False)
        (folder / kind / "README.md").unlink()  # PEFT's, in which the base is a path
    record = {"id": "1", "prompt": "The town", "completion": " is old"}
    (folder / "data.jsonl").write_text(
        json.dumps(record) + "\n" + json.dumps({**record, "id": "2"})
    )
    return folder


def call(line: str) -> Result:
    return CliRunner().invoke(lorakit, line.split())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_command_takes_a_kind_or_refuses_it_in_one_line(
    row: tuple[str, ...], kind: str, folder: Path, tmp_path: Path
) -> None:
    line, *outcomes = row
    outcome = outcomes[list(KINDS).index(kind)]
    names = {"a": kind, "p": "plain", "d": "data.jsonl"}
    paths = {key: f"{folder}/{name}" for key, name in names.items()}
    done = call(line.format(**paths, o=tmp_path / "out"))
    if outcome == CARRIED:
        assert done.exit_code == 0, done.exception
        if "-o {o}" in line and not line.startswith("fuse"):
            check_is_carried(line, kind, folder, tmp_path)
        return
    assert done.exit_code == 1
    assert isinstance(done.exception, LorakitError)
    assert outcome in str(done.exception)
    assert str(done.exception).isprintable()
    assert not (tmp_path / "out").exists()


def check_is_carried(line: str, kind: str, folder: Path, tmp_path: Path) -> None:
    """Check that what stands besides A and B is as before, and that PEFT loads all there is."""
    (output,) = (path for path in tmp_path.iterdir() if not path.name.startswith("."))
    before, after = (load_adapter(str(p), plain=False) for p in (folder / kind, output))
    expected = {**extras(before)}
    if line.startswith("strip-layers"):
        expected = {key: t for key, t in expected.items() if ".layers." not in key or ".0." in key}
    assert {key: bytes(tensor.data) for key, tensor in extras(after).items()} == {
        key: bytes(tensor.data) for key, tensor in expected.items()
    }
    if output.is_dir():
        base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
        model: Any = peft.PeftModel.from_pretrained(base, str(output))
        theirs = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert theirs.keys() == after.tensors.keys()
        for key, tensor in after.tensors.items():
            assert np.array_equal(tensor.array(), theirs[key].float().numpy())


def extras(adapter: Adapter) -> dict[str, Tensor]:
    return {
        key: t
        for key, t in adapter.tensors.items()
        if ".lora_A." not in key and ".lora_B." not in key
    }


def test_a_merge_that_trains_takes_dora_as_the_nearest_lora(folder: Path, tmp_path: Path) -> None:
    done = call(
        f"merge {folder}/DoRA {folder}/plain --data {folder}/data.jsonl --approximate dora "
        f"--epochs 1 -o {tmp_path}/out/"
    )
    assert done.exit_code == 0, done.exception
    assert done.stderr.count("DoRA without DoRA, layer ") == LAYERS
    assert load_adapter(f"{tmp_path}/out").modules()[0].rank == 4


TAKES_COPIES = {
    "find-boundary": "find-boundary {a} --data {d} --metric loss",
    "inspect --importance": "inspect {a} --importance --data {d}",
    "strip-layers by importance": (
        "strip-layers {a} --by importance --share 0.5 --data {d} -o {o}.safetensors"
    ),
    "merge that trains": "merge {a} --data {d} --epochs 1 -o {o}.safetensors",
}


@pytest.mark.parametrize("line", TAKES_COPIES.values(), ids=TAKES_COPIES.keys())
def test_embeddings_that_are_the_bases_own_are_left_out_with_a_note(
    line: str, folder: Path, tmp_path: Path
) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY)
    model = with_lora(base, PLAIN)
    model.peft_config["default"].base_model_name_or_path = "tiny"
    model.save_pretrained(tmp_path / "copies", save_embedding_layers=True)
    assert len(load_adapter(f"{tmp_path}/copies", plain=False).whole) == 2
    done = call(line.format(a=tmp_path / "copies", d=folder / "data.jsonl", o=tmp_path / "out"))
    assert done.exit_code == 0, done.exception
    assert "embed_tokens.weight, which it holds whole, are the base's own: left out" in done.stderr

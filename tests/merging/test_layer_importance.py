"""The importance of layers, against dense ΔW·x one record at a time, and strip-layers --by."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.names import layer_of
from lorakit.adapters.safetensors import read_tensors
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.boundary.strip import strip_layers
from lorakit.merging.layer_importance import choose_by_importance
from lorakit.merging.output_norms import mean_outputs
from lorakit.merging.stack import fold, stack
from lorakit.models.tokens import Example
from lorakit.records.record import Record
from lorakit.settings import LayerChoiceSettings, TrainingSettings
from tests.support.boundary_models import Notes, random_adapter
from tests.support.in_process import run_here
from tests.support.models import LAYERS, open_base, save_model
from tests.support.program import shell
from tests.support.training_data import rows, save_rows

RECORDS = rows(10)
SETTINGS = TrainingSettings()
TARGETS = ["q_proj", "k_proj", "v_proj"]  # k and v of the llama are narrower than q


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "val.jsonl", RECORDS)


def uneven(base: Any, targets: list[str] = TARGETS, seed: int = 0) -> Adapter:
    """Return a random adapter whose layers change the model by different amounts."""
    adapter: Adapter = random_adapter(base, targets=targets, seed=seed)
    sizes = {0: 0.5, 1: 1.5, 2: 1.0}
    factors = {
        module.name: (module.a, module.b * np.float32(sizes[module.layer or 0]))
        for module in adapter.modules()
    }
    config = {**adapter.config, "lora_alpha": 6, "alpha_pattern": {r".*\.v_proj": 3}}
    return Adapter(tensors_of(factors), config, name="uneven")


def inputs_of(base: Any, adapter: Adapter, examples: list[Example]) -> dict[str, NDArray[Any]]:
    """Return the inputs (tokens, d_in) of every module, ΔW in the weights, one record at a time."""
    for module in adapter.modules():
        base.model.get_submodule(module.name).weight.data += torch.tensor(module.delta()).float()
    read: dict[str, list[torch.Tensor]] = {module.name: [] for module in adapter.modules()}
    for name, inputs in read.items():
        base.model.get_submodule(name).register_forward_hook(
            lambda module, args, output, inputs=inputs: inputs.append(args[0][0])
        )
    with torch.no_grad():
        for example in examples:
            base.model(input_ids=torch.tensor([example.ids[:-1]]))
    return {name: torch.cat(inputs).double().numpy() for name, inputs in read.items()}


def encoded(base: Any) -> list[Example]:
    encoder = base.encoder(chat="off")
    return [encoder.example(Record(record, record["id"])) for record in RECORDS]


def naive_outputs(adapter: Adapter, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    return {
        module.name: float(((inputs[module.name] @ module.delta().T) ** 2).sum(1).mean())
        for module in adapter.modules()
    }


def naive_importances(adapter: Adapter, inputs: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    means = {}
    for module in adapter.modules():
        x, a, b = inputs[module.name], module.a, module.b
        of_a = np.abs(a) * np.linalg.norm(x, axis=0)
        of_b = np.abs(b) * np.linalg.norm(x @ a.T, axis=0)
        means[module.name] = float((of_a.sum() + of_b.sum()) / (a.size + b.size))
    return means


def naive_shares(values: Mapping[str, float]) -> list[float]:
    """Return each layer's mean, over the projections, of its value over the projection's sum."""
    of_projections = []
    for target in TARGETS:
        of_layers = [
            next(v for n, v in values.items() if layer_of(n) == layer and n.endswith(target))
            for layer in range(LAYERS)
        ]
        of_projections.append([value / sum(of_layers) for value in of_layers])
    return [sum(column) / len(TARGETS) for column in zip(*of_projections, strict=True)]


@pytest.mark.parametrize("tokens", [2048, 40], ids=["one micro-batch", "several"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_outputs_are_the_mean_squared_norms_of_dense_changes_times_inputs(
    family: str, tokens: int, tmp_path: Path
) -> None:
    base = open_base(save_model(tmp_path / "model", family))
    adapter, examples = uneven(base), encoded(base)
    measured = mean_outputs(
        base, adapter, examples, settings=TrainingSettings(micro_batch_tokens=tokens)
    )
    plain = open_base(str(tmp_path / "model"))
    wanted = naive_outputs(adapter, inputs_of(plain, adapter, examples))
    assert measured == pytest.approx(wanted, rel=1e-3)


def test_padded_rows_count_only_their_own_tokens(llama: str) -> None:
    base = open_base(llama)
    adapter, examples = uneven(base), encoded(base)
    packed = mean_outputs(base, adapter, examples, settings=SETTINGS)
    base = open_base(llama)
    object.__setattr__(base, "packs", False)
    padded = mean_outputs(base, adapter, examples, settings=SETTINGS)
    assert padded == pytest.approx(packed, rel=1e-4)


@pytest.mark.parametrize("by", ["output", "importance"])
def test_layers_have_the_shares_of_the_naive_computation(by: str, llama: str, data: str) -> None:
    adapter = uneven(open_base(llama))
    if by == "importance":  # whose scale is left out
        adapter = Adapter(adapter.tensors, {**adapter.config, "alpha_pattern": {}}, name="uneven")
    choice = choose_by_importance(
        open_base(llama),
        adapter,
        data,
        choice=LayerChoiceSettings(by, share=Decimal("0.67")),
        settings=SETTINGS,
        reporter=Notes(),
    )
    plain = open_base(llama)
    inputs = inputs_of(plain, adapter, encoded(plain))
    naive = naive_outputs if by == "output" else naive_importances
    wanted = naive_shares(naive(adapter, inputs))
    assert [choice.shares[layer] for layer in range(LAYERS)] == pytest.approx(wanted, rel=1e-3)
    assert sum(choice.shares.values()) == pytest.approx(1)
    weakest = wanted.index(min(wanted))
    assert choice.layers == tuple(layer for layer in range(LAYERS) if layer != weakest)


@pytest.mark.parametrize("by", ["output", "importance"])
def test_the_blocks_of_a_merge_count_as_they_are_scaled_in_it(
    by: str, llama: str, data: str
) -> None:
    parts = [uneven(open_base(llama), seed=seed) for seed in (0, 1)]
    stacked = stack(parts)
    factors = fold(stacked.factors, stacked)
    config = {**parts[0].config, "r": 8, "lora_alpha": 8, "alpha_pattern": {}}
    blocks = [block.fields(0.0) for block in stacked.blocks]
    with_blocks, without = (
        Adapter(tensors_of(factors), config, {"format": 1, "blocks": header}, "merged")
        for header in (blocks, [])
    )
    settings = LayerChoiceSettings(by, threshold=Decimal("0.5"))
    shares = [
        choose_by_importance(
            open_base(llama),
            adapter,
            data,
            choice=settings,
            settings=SETTINGS,
            reporter=Notes(),
        ).shares
        for adapter in (with_blocks, without)
    ]
    assert shares[0] == shares[1]


# — the command —


@pytest.fixture
def folder(llama: str, data: str, tmp_path: Path) -> Path:
    save_adapter(uneven(open_base(llama)), str(tmp_path / "a.safetensors"))
    (tmp_path / "val.jsonl").write_text(Path(data).read_text())
    return tmp_path


def test_kept_tensors_are_the_old_bytes_and_the_history_says_how_they_were_chosen(
    folder: Path, llama: str
) -> None:
    options = ("--by", "output", "--share", "0.67", "--data", "val.jsonl", "--model", llama)
    done = run_here("strip-layers", "a.safetensors", *options, cwd=folder)
    assert done.code == 0, done.stderr
    adapter = load_adapter(str(folder / "a.safetensors"))
    stripped = load_adapter(str(folder / "stripped.safetensors"))
    (entry,) = stripped.header["history"]
    settings = entry["settings"]
    kept, scores = settings["keep"], settings["scores"]
    assert (settings["by"], settings["share"], settings["dtype"]) == ("output", 0.67, "float32")
    assert kept == [1, 2]
    assert sorted(scores, key=lambda layer: -scores[layer])[:2] in (["1", "2"], ["2", "1"])
    assert entry["command"] == "strip-layers"
    assert entry["parents"] == {"a": adapter.sha256}
    assert len(entry["data"]) == 64
    assert "torch" in entry["versions"]
    tensors, _ = read_tensors(folder / "stripped.safetensors", "stripped")
    assert tensors == {
        key: tensor for key, tensor in adapter.tensors.items() if ".layers.0." not in key
    }
    by_hand = strip_layers(adapter, keep=kept)
    assert (stripped.sha256, stripped.config) == (by_hand.sha256, by_hand.config)
    percent = f"{scores['1'] + scores['2']:.0%}"
    assert done.stderr.splitlines()[-3:] == [
        f"Note: layers 1,2 keep their LoRA: {percent} of the output",
        "Note: kept 6 of 9 modules",
        "Note: wrote stripped.safetensors",
    ]


def test_data_or_adapter_come_by_a_pipe_and_the_bytes_are_the_same(
    folder: Path, llama: str
) -> None:
    done = shell(
        "set -e\n"
        'by="--by importance --threshold 0.6 --model $MODEL -q"\n'
        "lorakit strip-layers a.safetensors $by --data val.jsonl -o b.safetensors\n"
        "lorakit strip-layers a.safetensors $by --data - -o c.safetensors <val.jsonl\n"
        "lorakit strip-layers $by --data val.jsonl -o - <a.safetensors >piped\n"
        "cmp b.safetensors c.safetensors",
        folder,
        MODEL=llama,
    )
    assert (done.returncode, done.stderr) == (0, "")
    named, piped = (load_adapter(str(folder / name)) for name in ("b.safetensors", "piped"))
    assert named.sha256 == piped.sha256
    (entry,) = named.header["history"]
    assert entry["settings"]["threshold"] == 0.6
    assert {module.layer for module in named.modules()} == {*entry["settings"]["keep"]}


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--by output --data val.jsonl", 2, "--by needs either --share or --threshold."),
        (
            "--by output --data val.jsonl --share 0.5 --threshold 0.9",
            2,
            "--by needs either --share or --threshold.",
        ),
        ("--by output --share 0.5", 2, "--by needs --data."),
        ("--by output --share 0 --data val.jsonl", 2, "0 is not in 0 < share ≤ 1"),
        ("--by output --threshold 1.1 --data val.jsonl", 2, "1.1 is not in 0 < threshold ≤ 1"),
        ("--by norm --share 0.5 --data val.jsonl", 2, "'norm' is not one of"),
        ("--by output --boundary 1", 2, "Give either --boundary or --keep or --by."),
        ("--boundary 1 --share 0.5", 2, "--share is for --by only."),
        ("--boundary 1 --data val.jsonl", 2, "--data is for --by only."),
        ("--keep 1 --model tiny", 2, "--model is for --by only."),
        ("--by output --share 0.5 --data none.jsonl", 1, "cannot read none.jsonl"),
        ("--by output --share 0.5 --data val.jsonl -o none/b.safetensors", 1, "cannot write none"),
        ("--by output --share 0.5 --data val.jsonl --model tiny", 1, "has no module|in tiny it is"),
    ],
)
def test_what_cannot_choose_layers_is_an_error(
    options: str, code: int, message: str, folder: Path, llama: str
) -> None:
    base = ("--model", llama) if code == 1 and "--model" not in options else ()
    done = run_here("strip-layers", "a.safetensors", *options.split(), *base, cwd=folder)
    assert done.code == code, done.stderr
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert not (folder / "stripped.safetensors").exists()


def test_adapter_and_data_cannot_share_one_stdin(folder: Path) -> None:
    done = run_here("strip-layers", "--by", "output", "--share", "1", "--data", "-", cwd=folder)
    assert done.code == 2
    assert "one stdin" in done.stderr


def test_an_adapter_that_changes_nothing_has_no_important_layer(folder: Path, llama: str) -> None:
    whole = load_adapter(str(folder / "a.safetensors"))
    zero = {module.name: (module.a, np.zeros_like(module.b)) for module in whole.modules()}
    save_adapter(Adapter(tensors_of(zero), whole.config), str(folder / "zero.safetensors"))
    options = ("--by", "output", "--share", "0.5", "--data", "val.jsonl", "--model", llama)
    done = run_here("strip-layers", "zero.safetensors", *options, cwd=folder)
    assert done.code == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("Error: no layer's LoRA changes anything on the data; ")


def test_measuring_leaves_no_hook_behind(llama: str) -> None:
    base = open_base(llama)
    adapter = uneven(base)
    mean_outputs(base, adapter, encoded(base), settings=SETTINGS)
    for module in adapter.modules():
        factor = base.model.get_submodule(module.name).lora_B["default"]
        assert not factor._forward_hooks

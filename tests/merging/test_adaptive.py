from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.errors import LorakitError
from lorakit.merging.adaptive import merge_adaptively
from lorakit.merging.criteria import prune_count
from lorakit.merging.input_norms import InputNorms
from lorakit.merging.joint import attach_stack
from lorakit.merging.stack import stack
from lorakit.models.batches import epoch_batches
from lorakit.models.generation import complete
from lorakit.models.lora import attach, factors
from lorakit.models.sharing import new_accelerator
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings, LoraSettings, PruningSettings, TrainingSettings
from lorakit.training.checkpoint import Checkpoint
from lorakit.training.train import train_adapter
from lorakit.training.trainer import Trainer
from tests.support.models import FAMILIES, open_base, save_model
from tests.support.program import run_over
from tests.support.training_data import Recorder, rows, save_rows

SETTINGS = TrainingSettings(
    lr=1e-2, epochs=3, batch_size=6, dropout=0.0, device="cpu", dtype="float32"
)
SHAPES = {
    "xs": LoraSettings(rank=4, alpha=8),
    "wl": LoraSettings(rank=2, alpha=6, target_modules=("q_proj", "up_proj"), layers=(0, 2)),
    "tgt": LoraSettings(rank=3, alpha=3, layers=(1,)),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows(20))


@pytest.fixture(scope="module")
def adapters(llama: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    """Three trained adapters that differ in rank, alpha, target modules and layers."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, shape in SHAPES.items():
        train_adapter(
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, epochs=2, lr=5e-2),
            lora=shape,
            output=str(folder / f"{name}.safetensors"),
            reporter=Recorder(),
        )
    return [load_adapter(str(folder / f"{name}.safetensors")) for name in SHAPES]


def merge(
    llama: str,
    adapters: list[Adapter],
    data: str,
    output: Path,
    *,
    pruning: PruningSettings | None = None,
    resume: bool = False,
    **changes: Any,
) -> Adapter:
    merge_adaptively(
        adapters,
        open_base(llama),
        data,
        None,
        settings=replace(SETTINGS, **changes),
        pruning=pruning or PruningSettings(),
        output=str(output),
        reporter=Recorder(),
        resume=resume,
    )
    return load_adapter(str(output))


def test_a_portable_merge_is_the_same_merge_at_one_rank(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    made = {}
    for portable in (False, True):
        output = str(tmp_path / f"{portable}.safetensors")
        merge_adaptively(
            adapters,
            open_base(llama),
            data,
            None,
            settings=replace(SETTINGS, epochs=1),
            pruning=PruningSettings(),
            output=output,
            reporter=Recorder(),
            portable=portable,
        )
        made[portable] = load_adapter(output)
    config = made[True].config
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert len({module.rank for module in made[True].modules()}) == 1
    assert made[True].header["blocks"] == made[False].header["blocks"]
    for module, plain in zip(made[True].modules(), made[False].modules(), strict=True):
        assert np.array_equal(module.delta(), plain.delta())


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.tensor([[1, 5, 9, 40, 77, 12, 3], [1, 8, 8, 100, 200, 31, 60]])
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def in_peft(llama: str, folder: Path) -> Any:
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # PEFT's own call
        return peft.PeftModel.from_pretrained(base, folder).eval()


def test_joint_training_equals_peft_with_all_adapters_active(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    """20 AdamW steps, dropout 0: PEFT's losses and weights, each adapter scaled by itself."""
    encoder = open_base(llama).encoder(chat="off")
    examples = [encoder.example(Record(row, row["id"])) for row in rows(24)]
    batches = [b for epoch in range(5) for b in epoch_batches(examples, 6, 0, epoch)]
    assert len(batches) == 20
    settings = replace(SETTINGS, lr=3e-3, schedule="constant", warmup=0.0, max_grad_norm=1e9)

    base = open_base(llama)
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    trainer = Trainer(base, layers, settings, accelerator=new_accelerator("cpu"))
    ours = [trainer._step(batch, 20).train_loss for batch in batches]

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama)
    for number, adapter in enumerate(adapters):
        save_adapter(adapter, f"{tmp_path}/{number}/")
        if number:
            model.load_adapter(tmp_path / str(number), str(number), is_trainable=True)
        else:
            model = peft.PeftModel.from_pretrained(
                model, tmp_path / "0", adapter_name="0", is_trainable=True
            )
    model.base_model.set_adapter(["0", "1", "2"])
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    theirs = []
    for batch in batches:
        loss = sum(_summed_loss(model, e) for e in batch) / sum(e.targets for e in batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(float(loss.detach()))

    assert ours == pytest.approx(theirs, abs=1e-4)
    assert ours[-1] < ours[0] - 0.05, "the weights must have moved for this to mean anything"
    found = dict(model.named_parameters())
    for number, block in enumerate(stacked.blocks):
        for name, part in block.modules.items():
            a, b = (factor.detach() for factor in factors(layers[name]))
            for letter, mine in (("A", a[part.span]), ("B", b[:, part.span])):
                peer = found[f"base_model.model.{name}.lora_{letter}.{number}.weight"]
                torch.testing.assert_close(mine, peer.detach(), atol=1e-4, rtol=0)


def _summed_loss(model: Any, example: Any) -> Any:
    ids = torch.tensor([example.ids])
    labels = ids.clone()
    labels[:, : example.start] = -100
    return model(input_ids=ids, labels=labels).loss * example.targets


def test_a_merge_improves_on_where_it_began(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    watcher = Recorder()
    merge_adaptively(
        adapters,
        open_base(llama),
        data,
        None,
        settings=replace(SETTINGS, epochs=4),
        pruning=PruningSettings(Decimal("0.3")),
        output=str(tmp_path / "m"),
        reporter=watcher,
    )
    losses = [entry["validation_loss"] for entry in watcher.epochs]
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("importance", ["input", "magnitude"])
def test_in_each_group_exactly_the_floor_of_the_share_is_zero(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path, importance: str
) -> None:
    ratio = Decimal("0.37")
    pruning = PruningSettings(ratio, importance)
    merged = merge(llama, adapters, data, tmp_path / "m", pruning=pruning)
    by_name = {module.name: module for module in merged.modules()}
    groups = 0
    for block in merged.header["blocks"]:
        zeros = size = 0
        for name, part in block["modules"].items():
            span = slice(part["offset"], part["offset"] + part["rank"])
            for group in (by_name[name].a[span], by_name[name].b[:, span]):
                assert int((group == 0).sum()) == prune_count(ratio, group.size)
                zeros += int((group == 0).sum())
                size += group.size
                groups += 1
        assert block["zeros"] == zeros / size
    assert groups == 2 * (6 + 4 + 2)


def test_ratio_0_gives_the_bytes_of_no_pruning(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    merge(llama, adapters, data, tmp_path / "none.safetensors", dropout=0.1)
    merge(
        llama,
        adapters,
        data,
        tmp_path / "zero.safetensors",
        dropout=0.1,
        pruning=PruningSettings(Decimal("0.0")),
    )
    assert (tmp_path / "none.safetensors").read_bytes() == (
        tmp_path / "zero.safetensors"
    ).read_bytes()


def test_pruning_every_step_differs_from_no_pruning_and_from_another_criterion(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    hashes = {
        merge(llama, adapters, data, tmp_path / str(n), pruning=pruning, lr=0.1).sha256
        for n, pruning in enumerate(
            [
                PruningSettings(),
                PruningSettings(Decimal("0.5")),
                PruningSettings(Decimal("0.5"), "magnitude"),
                PruningSettings(Decimal("0.5"), calibrate_every=1),
            ]
        )
    }
    assert len(hashes) == 4


def test_the_same_merge_gives_the_same_bytes(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    pruning = PruningSettings(Decimal("0.2"))
    for name in "ab":
        output = tmp_path / f"{name}.safetensors"
        merge(llama, adapters, data, output, pruning=pruning, dropout=0.1)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_resumed_merge_gives_the_bytes_of_an_unbroken_one(
    llama: str,
    data: str,
    adapters: list[Adapter],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pruning = PruningSettings(Decimal("0.3"), calibrate_every=2)
    merge(llama, adapters, data, tmp_path / "whole.safetensors", pruning=pruning, dropout=0.1)
    save = Checkpoint.save

    def stop(self: Checkpoint, trainer: Trainer) -> None:
        save(self, trainer)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            merge(
                llama, adapters, data, tmp_path / "broken.safetensors", pruning=pruning, dropout=0.1
            )
    resumed = merge(
        llama,
        adapters,
        data,
        tmp_path / "broken.safetensors",
        pruning=pruning,
        dropout=0.1,
        resume=True,
    )
    assert resumed.header["history"][-1]["settings"]["prune_ratio"] == 0.3
    assert (tmp_path / "broken.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], ["--importance", "gradient"]], ids=["input", "gradient"])
def test_two_processes_of_torchrun_merge_to_the_bytes_of_one(
    llama: str, data: str, adapters: list[Adapter], how: list[str], tmp_path: Path
) -> None:
    """The norms and gradients that pruning reads are those of all the data; so are the masks."""
    paths = []
    for name, adapter in zip(SHAPES, adapters, strict=True):
        paths.append(save_adapter(adapter, str(tmp_path / f"{name}.safetensors")))
    command = [
        *("merge", *paths, "--model", llama, "--data", data, "--epochs", "2", "--lr", "1e-3"),
        *("--dropout", "0", "--batch-size", "6", "--micro-batch-tokens", "60"),
        *("--dtype", "float32", "--device", "cpu", "--prune-ratio", "0.3", *how),
    ]
    one, two = (tmp_path / f"{processes}.safetensors" for processes in (1, 2))
    for processes, output in enumerate((one, two), 1):
        done = run_over(processes, *command, "-o", str(output))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("wrote") == 1
    assert one.read_bytes() == two.read_bytes()
    values = [tensor.array() for tensor in load_adapter(str(two)).tensors.values()]
    assert 0.2 < np.mean(np.concatenate([array.ravel() for array in values]) == 0) < 0.8


def test_a_merged_file_in_a_folder_gives_the_same_logits_in_peft(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    file = tmp_path / "m.safetensors"
    merged = merge(llama, adapters, data, file, pruning=PruningSettings(Decimal("0.1")))
    folder = tmp_path / "folder"
    save_adapter(merged, f"{folder}/")
    shutil.copy(file, folder / "adapter_model.safetensors")  # the single file itself
    base = open_base(llama)
    plain = logits_of(base.model)
    attach(base, merged)
    ours = logits_of(base.model)
    torch.testing.assert_close(ours, logits_of(in_peft(llama, folder)), atol=1e-5, rtol=0)
    assert float((ours - plain).abs().max()) > 1e-2


def test_the_header_tells_how_the_merge_came_about(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    header = merge(
        llama, adapters, data, tmp_path / "m", pruning=PruningSettings(Decimal("0.1"))
    ).header
    assert [block["name"] for block in header["blocks"]] == ["xs", "wl", "tgt"]
    entry = header["history"][-1]
    assert entry["command"] == "merge"
    assert entry["parents"] == {n: a.sha256 for n, a in zip(SHAPES, adapters, strict=True)}
    assert entry["settings"]["prune_ratio"] == 0.1
    assert entry["settings"].keys() & {"device", "log", "resume", "output"} == set()
    assert [e["command"] for e in header["history"]] == ["train-adapter"] * 3 + ["merge"]
    assert header["base"]["name"] == llama


def test_norms_are_taken_over_all_tokens_that_are_not_padding(
    llama: str, adapters: list[Adapter]
) -> None:
    """Against hooks on the plain base layers, one row at a time, without any padding."""
    base = open_base(llama)
    encoder = base.encoder(chat="off")
    examples = [encoder.example(Record(row, row["id"])) for row in rows(9)]
    stacked = stack(adapters)
    layers = attach_stack(base, stacked, dropout=0.0)
    norms = InputNorms(layers)
    trainer = Trainer(
        base,
        layers,
        replace(SETTINGS, micro_batch_tokens=10**6),
        accelerator=new_accelerator("cpu"),
        hooks=(norms,),
    )
    trainer.validate(examples)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    hooks = [
        layer.get_base_layer().register_forward_hook(
            lambda module, inputs, output, name=name: seen[name].append(inputs[0][0])
        )
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        for example in examples:
            base.model(input_ids=torch.tensor([example.ids[:-1]]))
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        x = torch.cat(seen[name])
        of_x, of_ax = norms.norms(name)
        torch.testing.assert_close(of_x, x.norm(dim=0), rtol=1e-4, atol=1e-5)
        a = factors(layer)[0].detach()
        torch.testing.assert_close(of_ax, (x @ a.T).norm(dim=0), rtol=1e-4, atol=1e-5)


def test_the_merged_adapter_is_one_of_the_base_it_says(
    llama: str, data: str, adapters: list[Adapter], tmp_path: Path
) -> None:
    other = save_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(LorakitError, match=r"has no module model\.layers\.0"):
        merge(other, adapters, data, tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_each_family_trains_merges_and_generates(family: str, data: str, tmp_path: Path) -> None:
    """The merged file gives the same logits in PEFT; greedy rows do not see their batch."""
    name = save_model(tmp_path / family, family)
    watcher = Recorder()
    for number, seed in enumerate((0, 1)):
        train_adapter(
            open_base(name),
            data,
            None,
            settings=replace(SETTINGS, epochs=1, seed=seed, lr=5e-2),
            lora=LoraSettings(rank=2 + number, alpha=4),
            output=str(tmp_path / f"{number}.safetensors"),
            reporter=watcher,
        )
    assert any("no separate query" in note for note in watcher.notes) == (
        family in ("gpt2", "phi3")
    )
    loaded = [load_adapter(str(tmp_path / f"{number}.safetensors")) for number in (0, 1)]
    merged = merge(
        name, loaded, data, tmp_path / "m", epochs=1, pruning=PruningSettings(Decimal("0.1"))
    )
    save_adapter(merged, f"{tmp_path}/folder/")
    base = open_base(name)
    plain = logits_of(base.model)
    attach(base, merged)
    ours = logits_of(base.model)
    torch.testing.assert_close(
        ours, logits_of(in_peft(name, tmp_path / "folder")), atol=1e-5, rtol=0
    )
    assert not torch.equal(ours, plain)
    encoder = base.encoder(chat="off")
    prompts = [encoder.prompt(Record(row, row["id"]), 8).ids for row in rows(6)]
    settings = GenerationSettings(max_new_tokens=8)
    together = complete(base, prompts, settings)
    assert together == [complete(base, [prompt], settings)[0] for prompt in prompts]
    assert np.mean([len(row) for row in together]) > 1

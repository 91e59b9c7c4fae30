"""Adapters fused into their bases: against PEFT's merge_and_unload, tensor by tensor."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

import lorakit.export.fuse as fusing
import lorakit.export.fused as fused
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.tensors import Tensor
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.export.fuse import RESUME_FILE, fuse
from lorakit.export.model_folder import open_model_folder
from lorakit.export.weight_files import INDEX
from lorakit.reporting import Silent
from lorakit.settings import ModelSettings
from tests.support.peft_models import KINDS, logits, random_model, with_lora

TINY = Path(__file__).parents[2] / "lorakit" / "tiny"


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a model's folder."""
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def save_both(
    kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, shard: str = "1GB"
) -> tuple[Any, Any]:
    """Save a random base and PEFT's adapter on it; return the base and PEFT's model."""
    family, config = KINDS[kind]
    base = random_model(family).to(dtype)
    base.save_pretrained(folder / "base", max_shard_size=shard)
    model = with_lora(copy.deepcopy(base), dict(config))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return base, model


def fuse_files(folder: Path, output: str = "fused", **options: Any) -> Path:
    """Fuse what `save_both` saved, without the check of logits, which needs a tokenizer."""
    settings = {"dtype": None, "resume": False, "reporter": Silent(), "check": None, **options}
    fuse(
        load_adapter(str(folder / "adapter")),
        open_model_folder(ModelSettings(), str(folder / "base")),
        str(folder / output),
        **settings,
    )
    return folder / output


@pytest.mark.parametrize("kind", [k for k, (_, c) in KINDS.items() if "bias" not in c])
def test_the_tensors_are_those_of_pefts_merge(kind: str, tmp_path: Path) -> None:
    _, model = save_both(kind, tmp_path)
    fused = stored(fuse_files(tmp_path))
    model.merge_and_unload().save_pretrained(tmp_path / "theirs")
    theirs = stored(tmp_path / "theirs")
    assert fused.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(fused[key], tensor, rtol=0, atol=1e-6)


def test_a_fused_folder_gives_the_logits_of_base_and_adapter(tmp_path: Path) -> None:
    base, model = save_both("conv1d", tmp_path)
    folder = fuse_files(tmp_path)
    fused = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    assert not torch.allclose(logits(base), logits(model), atol=1e-2)
    torch.testing.assert_close(logits(fused), logits(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_shards_and_index_are_the_bases(shard: str, tmp_path: Path) -> None:
    save_both("plain", tmp_path, shard=shard)
    folder = fuse_files(tmp_path)
    files = {path.name for path in (tmp_path / "base").iterdir()}
    assert {path.name for path in folder.iterdir()} == files | {"README.md"}
    for path in (tmp_path / "base").glob("*.safetensors"):
        assert load_file(path).keys() == load_file(folder / path.name).keys()
    if shard == "10KB":
        ours, theirs = (
            json.loads((place / INDEX).read_text()) for place in (folder, tmp_path / "base")
        )
        assert len(set(ours["weight_map"].values())) > 1
        assert ours["weight_map"] == theirs["weight_map"]
        assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]


def test_half_precision_is_rounded_once_from_the_exact_sum(tmp_path: Path) -> None:
    base, _ = save_both("plain", tmp_path, dtype=torch.bfloat16)
    fused = stored(fuse_files(tmp_path))
    adapter = load_adapter(str(tmp_path / "adapter"))
    weights = base.state_dict()
    for module in adapter.modules():
        key = f"{module.name}.weight"
        exact = weights[key].double() + torch.from_numpy(module.delta())
        error = (fused[key].double() - exact).abs()
        assert fused[key].dtype == torch.bfloat16
        assert bool((error <= exact.abs() * 2.0**-8 * 1.0001).all())
    untouched = weights.keys() - {f"{module.name}.weight" for module in adapter.modules()}
    for key in untouched & fused.keys():
        assert torch.equal(fused[key], weights[key])


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize("block", [1, 40, 1 << 18])
def test_blocks_of_any_size_give_the_same_bytes(
    block: int, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both("plain", tmp_path)
    module = load_adapter(str(tmp_path / "adapter")).modules()[0]
    weight = Tensor.from_array(torch.randn(module.shape).numpy())
    exact = torch.from_numpy(weight.array() + module.delta().astype("float32"))
    monkeypatch.setattr(fused, "_BLOCK", block)
    pieces = list(fused.Fused("weight", weight, dtype, module).pieces())
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    joined = torch.frombuffer(bytearray(b"".join(pieces)), dtype=kind).reshape(module.shape)
    torch.testing.assert_close(joined, exact.to(kind), rtol=2 * torch.finfo(kind).eps, atol=1e-6)
    assert len(pieces) == (32 if block < 64 else 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_number_format_is_that_of_all_tensors(dtype: str, tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    folder = fuse_files(tmp_path, dtype=dtype)
    exact = stored(fuse_files(tmp_path, "exact"))
    kind = getattr(torch, dtype)
    for key, tensor in stored(folder).items():
        assert tensor.dtype == kind
        assert torch.equal(tensor, exact[key].to(kind))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == kind


def test_what_float16_cannot_hold_is_an_error_that_leaves_no_model(tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    weights = stored(tmp_path / "base")
    weights["model.layers.1.self_attn.q_proj.weight"][0, 0] = 1e6
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match=r"layers\.1\.self_attn\.q_proj\.weight is beyond F16"):
        fuse_files(tmp_path, dtype="float16")
    assert not (tmp_path / "fused" / "config.json").exists()


class StoppedError(Exception):
    """The run ends here."""


def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both("plain", tmp_path, shard="10KB")
    whole = fuse_files(tmp_path, "whole")
    shards = sorted(path.name for path in whole.glob("*.safetensors"))
    real = fusing._write_shard
    written: list[str] = []

    def stop_after_two(path: Path, tensors: Any) -> None:
        if len(written) == 2:
            raise StoppedError
        written.append(path.name)
        real(path, tensors)

    monkeypatch.setattr(fusing, "_write_shard", stop_after_two)
    with pytest.raises(StoppedError):
        fuse_files(tmp_path)
    assert not (tmp_path / "fused" / "config.json").exists()
    written.clear()

    def count(path: Path, tensors: Any) -> None:
        written.append(path.name)
        real(path, tensors)

    monkeypatch.setattr(fusing, "_write_shard", count)
    fuse_files(tmp_path, resume=True)
    assert written == shards[2:]
    for path in whole.iterdir():
        assert (tmp_path / "fused" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in whole.iterdir()} == {p.name for p in (tmp_path / "fused").iterdir()}


def test_a_run_without_resume_writes_all_of_its_own_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both("plain", tmp_path)
    monkeypatch.setattr(fusing, "_write_parts", lambda *a: (_ for _ in ()).throw(StoppedError))
    with pytest.raises(StoppedError):
        fuse_files(tmp_path)
    monkeypatch.undo()
    (tmp_path / "fused" / "model.safetensors").write_bytes(b"half")
    fuse_files(tmp_path)
    assert stored(tmp_path / "fused").keys() == stored(tmp_path / "base").keys()


def test_a_folder_with_other_files_or_another_run_is_left_alone(tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    other = tmp_path / "fused"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(LorakitError, match="holds files already"):
        fuse_files(tmp_path)
    (other / RESUME_FILE).write_text("another key")
    with pytest.raises(LorakitError, match="part of another model"):
        fuse_files(tmp_path, resume=True)
    assert sorted(path.name for path in other.iterdir()) == [RESUME_FILE, "notes.txt"]


def test_lora_on_a_tied_head_is_refused(tmp_path: Path) -> None:
    shape = transformers.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=50,
        intermediate_size=48,
        tie_word_embeddings=True,
    )
    base: Any = transformers.LlamaForCausalLM(shape)
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of it too
        model = peft.get_peft_model(base, config)
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    with pytest.raises(LorakitError, match=r"lm_head, whose weights .* shares with its"):
        fuse_files(tmp_path)


def test_lora_on_a_head_of_its_own_is_fused(tmp_path: Path) -> None:
    base = random_model("llama")
    base.save_pretrained(tmp_path / "base")
    model = with_lora(copy.deepcopy(base), {"target_modules": ["q_proj", "lm_head"]})
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    fused = stored(fuse_files(tmp_path))
    merged = model.merge_and_unload().state_dict()
    torch.testing.assert_close(fused["lm_head.weight"], merged["lm_head.weight"], rtol=0, atol=1e-6)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_quantised_base_is_refused(tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    edit_config(tmp_path / "base", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(LorakitError, match=r"is quantised \(gptq\)"):
        fuse_files(tmp_path)


def test_a_base_without_the_modules_is_refused(tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    shutil.rmtree(tmp_path / "base")
    random_model("gpt2").save_pretrained(tmp_path / "base")
    with pytest.raises(LorakitError, match="has no module"):
        fuse_files(tmp_path)


def _drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _rename_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["odd"] = weights.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(weights, folder / "model.safetensors")


def _write_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"x": "../up.safetensors"}}')


def _index_odd(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"x": "model.safetensors"}}')


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop_weights, "has no model.safetensors"),
        (_cut_weights, "cut short"),
        (_rename_tensor, "stores model.layers.0.self_attn.q_proj under another name"),
        (_write_index, "has no weight_map of file names"),
        (_index_odd, "the index and the file disagree"),
    ],
)
def test_damaged_weights_are_named(damage: Any, message: str, tmp_path: Path) -> None:
    save_both("plain", tmp_path)
    damage(tmp_path / "base")
    with pytest.raises(LorakitError, match=message):
        fuse_files(tmp_path)
    assert not (tmp_path / "fused").exists()


def test_a_disk_without_room_is_an_error_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both("plain", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(LorakitError, match=r"needs \d+\.\d\d KiB, and 1000 B are free"):
        fuse_files(tmp_path)
    assert not (tmp_path / "fused").exists()


# — The command —


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(lorakit, ["fuse", *map(str, arguments)])


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a PEFT adapter on tiny, random and of a trained one's size."""
    folder = tmp_path_factory.mktemp("adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(str(folder))
    return folder


def test_the_command_writes_a_model_with_tokenizer_and_card_that_generates(
    adapter: Path, tmp_path: Path
) -> None:
    done = run(adapter, "--model", "tiny", "-o", tmp_path / "model/")
    assert done.exit_code == 0, done.stderr
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {path.name for path in TINY.iterdir() if path.is_file()}
    assert "with a LoRA adapter fused into it" in (tmp_path / "model" / "README.md").read_text()
    record = '{"id": "1", "prompt": "The town", "completion": " is"}\n'
    written = [
        CliRunner().invoke(
            lorakit,
            ["generate", *which, "--data", "-", "--max-new-tokens", "8", "-q"],
            input=record,
        )
        for which in (
            [str(adapter), "--model", "tiny"],
            ["--model", str(tmp_path / "model")],
        )
    ]
    assert [done.exit_code for done in written] == [0, 0]
    assert written[0].stdout == written[1].stdout


def test_an_adapter_comes_through_a_pipe(adapter: Path, tmp_path: Path) -> None:
    save_adapter(load_adapter(str(adapter)), str(tmp_path / "a.safetensors"))
    done = CliRunner().invoke(
        lorakit,
        ["fuse", "-", "--model", "tiny", "-o", str(tmp_path / "model"), "--no-check", "-q"],
        input=(tmp_path / "a.safetensors").read_bytes(),
    )
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "model" / "config.json").exists()


def _twice(self: fused.Fused) -> Any:
    module = self.module
    if module is None:
        return None
    change = torch.from_numpy(module.delta()).float() * 2
    return lambda rows, out: change[rows]


def test_the_check_ends_a_run_whose_model_computes_something_else(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused.Fused, "_change", _twice)
    arguments = (adapter, "--model", "tiny", "-o", tmp_path / "model")
    done = run(*arguments)
    assert done.exit_code == 1
    assert "differ from those of base and adapter" in str(done.exception)
    assert not (tmp_path / "model" / "config.json").exists()
    assert run(*arguments, "--no-check").exit_code == 0


def test_a_change_that_the_format_rounds_away_gets_a_warning(adapter: Path, tmp_path: Path) -> None:
    loaded = load_adapter(str(adapter))
    small = {
        key: Tensor.from_array(tensor.array() * (1e-3 if "lora_B" in key else 1))
        for key, tensor in loaded.tensors.items()
    }
    save_adapter(type(loaded)(small, loaded.config), str(tmp_path / "small.safetensors"))
    arguments = (tmp_path / "small.safetensors", "--model", "tiny")
    done = run(*arguments, "--dtype", "bfloat16", "-o", tmp_path / "coarse")
    assert "bfloat16 is too coarse for it; give --dtype float32" in done.stderr
    done = run(*arguments, "--dtype", "float32", "-o", tmp_path / "fine")
    assert "too coarse" not in done.stderr

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.adapters.adapter import Adapter
from lorakit.adapters.base_model import check_fingerprint, choose_model
from lorakit.adapters.history import BaseFields
from lorakit.commands import _opening
from lorakit.errors import LorakitError
from lorakit.models.base import Base
from lorakit.models.devices import pick_device, pick_dtype
from lorakit.models.loading import load_base
from lorakit.models.lora import default_targets, inject, pick_modules, projections
from lorakit.settings import ModelSettings
from tests.support.models import save_model

CPU = torch.device("cpu")


def of_base(name: str | None) -> Adapter:
    return Adapter({}, {}, {"base": {"name": name}} if name else {}, "a.safetensors")


@pytest.fixture(scope="module")
def base(llama: str) -> Base:
    return load_base(llama, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    ("named", "recorded", "variable", "expected"),
    [
        ("named", "recorded", "variable", "named"),
        (None, "recorded", "variable", "recorded"),
        (None, None, "variable", "variable"),
        (None, None, None, "tiny"),
        (None, "./not/there", "variable", "variable"),
        (None, "tiny", "variable", "tiny"),
    ],
    ids=["named", "the adapter's", "variable", "tiny", "moved folder", "tiny's adapter"],
)
def test_the_base_is_the_one_named_first(
    named: str | None,
    recorded: str | None,
    variable: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LORAKIT_MODEL", raising=False)
    if variable:
        monkeypatch.setenv("LORAKIT_MODEL", variable)
    assert choose_model(named, [of_base(recorded)])[0] == expected


def test_a_base_folder_that_is_gone_is_an_error_that_says_how_to_name_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("LORAKIT_MODEL", raising=False)
    with pytest.raises(LorakitError, match=r"\./gone/model is not there; name it by --model"):
        choose_model(None, [of_base("./gone/model")])


def test_a_base_of_another_name_gets_a_warning() -> None:
    _, note = choose_model("mine", [of_base("theirs")])
    assert note == "Warning: not trained on mine: a.safetensors (theirs)"
    assert choose_model("mine", [of_base("mine")])[1] is None
    assert choose_model("mine", [of_base(None)])[1] is None


@pytest.mark.parametrize(
    ("family", "targets", "fused"),
    [
        ("llama", ["q_proj", "v_proj"], False),
        ("phi", ["q_proj", "v_proj"], False),
        ("phi3", ["qkv_proj"], True),
        ("gpt2", ["c_attn"], True),
    ],
)
def test_default_targets_are_query_and_value_as_the_family_names_them(
    family: str, targets: list[str], fused: bool, tmp_path: Path
) -> None:
    loaded = load_base(save_model(tmp_path, family), device=CPU, dtype=torch.float32)
    defaults, note = default_targets(loaded)
    assert defaults == targets
    assert (note is not None) == fused


def test_the_encoder_knows_how_many_tokens_the_base_embeds_and_its_name(base: Base) -> None:
    encoder = base.encoder(chat="off")
    assert encoder.embedded == base.model.config.vocab_size
    assert encoder.model == base.name


def test_modules_are_picked_by_target_and_layer(base: Base) -> None:
    assert pick_modules(base, ["q_proj"], [0, 2]) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.2.self_attn.q_proj",
    ]
    assert len(pick_modules(base, ["all-linear"], None)) == 3 * 7
    assert len(pick_modules(base, ["mlp.up_proj"], None)) == 3


@pytest.mark.parametrize(
    ("targets", "layers", "message"),
    [
        (["qq_proj"], None, "has no module qq_proj; choose --target-modules from .*q_proj"),
        (["q_proj"], [1, 3], "has no layer 3; give --layers within 0-2"),
    ],
    ids=["module", "layer"],
)
def test_what_the_base_does_not_have_is_named(
    base: Base, targets: list[str], layers: list[int] | None, message: str
) -> None:
    with pytest.raises(LorakitError, match=message):
        pick_modules(base, targets, layers)


def test_a_folder_without_a_model_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        LorakitError, match=r"^cannot load the tokenizer of .*; give a folder"
    ) as error:
        load_base(str(tmp_path), device=CPU, dtype=torch.float32)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(LorakitError, match="cannot load the model"):
        load_base(str(folder), device=CPU, dtype=torch.float32)


def test_the_fingerprint_tells_shapes_apart_and_not_seeds(base: Base, tmp_path: Path) -> None:
    same = load_base(save_model(tmp_path / "a", seed=1), device=CPU, dtype=torch.float32)
    other = load_base(save_model(tmp_path / "b", "qwen2"), device=CPU, dtype=torch.float32)
    assert base.fingerprint == same.fingerprint != other.fingerprint


def test_dtypes_are_taken_at_their_word_and_auto_is_exact_on_a_cpu() -> None:
    assert pick_dtype("bfloat16", CPU, training=False) == torch.bfloat16
    assert pick_dtype("auto", CPU, training=False) == torch.float32
    assert pick_dtype("auto", CPU, training=True) in (torch.float32, torch.bfloat16)


def test_a_device_that_is_not_there_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(LorakitError, match="no cuda device"):
            pick_device("cuda")
    assert pick_device("cpu") == CPU


def test_chat_is_off_where_there_is_no_template_and_on_is_an_error(base: Base) -> None:
    assert not base.uses_chat("auto")
    with pytest.raises(LorakitError, match="no chat template; use --chat off"):
        base.uses_chat("on")


def test_a_model_without_all_its_weights_is_refused(llama: str, tmp_path: Path) -> None:
    """A headless checkpoint loads with a random head: nothing that it says would mean anything."""
    folder = tmp_path / "headless"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "norm" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(LorakitError, match=r"has no weights for model\.layers\.0\.input_layernorm"):
        load_base(str(folder), device=CPU, dtype=torch.float32)


def test_a_second_adapter_takes_the_place_of_the_first(llama: str) -> None:
    base = load_base(llama, device=CPU, dtype=torch.float32)
    names = list(projections(base.model))
    plain = base.model(input_ids=torch.tensor([[1, 7, 30]])).logits
    for targets in (["q_proj"], ["v_proj", "up_proj"]):
        layers = inject(base, dict.fromkeys(pick_modules(base, targets, None), 2), alpha=2)
        assert list(projections(base.model)) == names
        assert sum("lora_A" in name for name, _ in base.model.named_parameters()) == len(layers)
        assert torch.equal(base.model(input_ids=torch.tensor([[1, 7, 30]])).logits, plain)


@pytest.mark.parametrize(
    ("recorded", "warning"),
    [({"name": "m", "fingerprint": "x"}, True), ({"name": "m"}, False), ({}, False)],
)
def test_a_base_of_another_shape_gets_a_warning(recorded: BaseFields, warning: bool) -> None:
    adapter = Adapter({}, {}, {"base": recorded}, "a.safetensors")
    assert (check_fingerprint([adapter], "m", "y") is not None) == warning
    assert check_fingerprint([adapter], "m", "x") is None


def test_a_folder_lorakit_noted_as_one_is_looked_for_whatever_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = Adapter({}, {}, {"base": {"name": "models/mine", "local": True}}, "a.safetensors")
    monkeypatch.setenv("LORAKIT_MODEL", "variable")
    assert choose_model(None, [adapter])[0] == "variable"
    monkeypatch.delenv("LORAKIT_MODEL")
    with pytest.raises(LorakitError, match="models/mine is not there"):
        choose_model(None, [adapter])


FREED = """
import resource, sys
import numpy
from lorakit.models.devices import keep_freed_memory
if sys.argv[1:]:
    keep_freed_memory()
def work():
    blocks = [numpy.ones(2**20) for _ in range(12)]  # 8 MiB each
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
before = faults()
for _ in range(5):
    work()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc's malloc")
def test_freed_memory_is_used_again_without_asking_the_system() -> None:
    def faults(*arguments: str) -> int:
        command = [sys.executable, "-c", FREED, *arguments]
        return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)

    assert faults("keep") < faults() / 10


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_commands_keep_freed_memory_where_they_compute_on_a_cpu(
    device: str, times: int, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[bool] = []
    monkeypatch.setattr(_opening, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(_opening, "pick_device", torch.device)
    monkeypatch.setattr(_opening, "load_base", lambda *_, **__: base)
    model = ModelSettings(model="any")
    _opening.open_base(model, [], device, "float32", pytest.fail, training=False)
    assert len(kept) == times

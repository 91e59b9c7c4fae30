"""The kernels of a GPU against PyTorch's operations, and a training step that is made of them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from lorakit.models import gpu_kernels, norms, rotary, swiglu
from lorakit.models.lora import factors, inject, pick_modules
from lorakit.models.norms import fuse_norms_
from lorakit.models.products import fast_layers
from lorakit.models.sharing import new_accelerator
from lorakit.models.tokens import Example
from lorakit.settings import TrainingSettings
from lorakit.training import lora_step
from lorakit.training.lora_step import lean_passes
from lorakit.training.trainer import Trainer
from tests.support import kernels as plain
from tests.support.devices import here
from tests.support.lora import logits_and_gradients
from tests.support.models import open_base, save_model
from tests.support.training_data import Recorder

DTYPES = [torch.bfloat16, torch.float16]
Tensor = torch.Tensor


def kernels_on(device: torch.device) -> ModuleType:
    """Return the kernels, and fail where a GPU that should have them has not."""
    found = gpu_kernels.kernels_for(torch.empty(0, device=device, dtype=torch.bfloat16))
    assert found is not None
    return found


def drawn(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    draw = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=draw).to(device, dtype)


def close(found: Tensor, expected: Tensor, share: float) -> None:
    """Check that the difference is at most a share of what is expected, by their norms."""
    difference = (found.double() - expected.double()).norm()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert float(difference) <= share * float(expected.double().norm())


def check_elementwise(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, share: float = 0.0
) -> None:
    """Gated MLPs and rotary positions, to the bit; MLPs by a share where exponents are others."""
    gate, up, grad = (drawn(3, 700 + n, device=device, dtype=dtype)[:, :700] for n in range(3))
    gate, up, grad = gate.contiguous(), up.contiguous(), grad.contiguous()
    close(kernels.swiglu(gate, up), plain.swiglu(gate, up), share)
    pairs = zip(
        kernels.swiglu_backward(grad, gate, up), plain.swiglu_backward(grad, gate, up), strict=True
    )
    for found, expected in pairs:
        close(found, expected, share)
    for rows, angles, heads, width in ((1, 1, 3, 16), (3, 1, 5, 24), (3, 3, 8, 128)):
        x = drawn(rows, 7, heads + 2, width, device=device, dtype=dtype)[:, :, 1 : heads + 1]
        angle = drawn(angles, 7, width, device=device)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for back in (False, True):
            turned = kernels.turn(x, cos, sin, back=back)
            assert torch.equal(turned, plain.turn(x, cos, sin, back=back))
            assert turned.is_contiguous()


def check_norms(kernels: ModuleType, device: torch.device, dtype: torch.dtype) -> None:
    for width in (48, 1000):
        x, grad = (drawn(2, 5, width, device=device, dtype=dtype) * n for n in (3, 1))
        weight = drawn(width, device=device, dtype=dtype)
        (normed, root), expected = kernels.norm(x, weight, 1e-5), plain.norm(x, weight, 1e-5)
        close(normed, expected[0], 1e-3)
        close(root, expected[1], 1e-5)
        found = kernels.norm_backward(grad, x, weight, root)
        close(found, plain.norm_backward(grad, x, weight, expected[1]), 1e-3)


def check_lora(
    kernels: ModuleType, device: torch.device, dtype: torch.dtype, rank: int, tokens: int
) -> None:
    d_in, d_out = 96, 136
    x, base = (drawn(tokens, width, device=device, dtype=dtype) for width in (d_in, d_out))
    a, b = drawn(rank, d_in, device=device), drawn(d_out, rank, device=device)
    grad = drawn(tokens, d_out, device=device, dtype=dtype).flip(0).contiguous()
    dropped = (drawn(tokens, d_in, device=device) > -0.5).to(torch.uint8)
    for scales in (drawn(rank, device=device).abs(), torch.tensor(1.75, device=device)):
        for mask in (None, dropped):
            low = kernels.down(x, a, scales, mask)
            close(low, plain.down(x, a, scales, mask), 2e-6)
            summed = kernels.up(low, b.t(), base=base, dtype=dtype)
            close(summed, plain.up(low, b.t(), base=base, dtype=dtype), 1e-4)
            low_grad = kernels.down(grad, b.t(), scales, None)
            close(low_grad, plain.down(grad, b.t(), scales, None), 2e-6)
            x_grad = kernels.up(low_grad, a, mask=mask, dtype=dtype)
            close(x_grad, plain.up(low_grad, a, mask=mask, dtype=dtype), 1e-4)
            given = (x, low_grad, grad, low, mask)
            pairs = zip(
                kernels.factor_gradients(*given), plain.factor_gradients(*given), strict=True
            )
            for found, expected in pairs:
                assert found.is_contiguous()
                close(found, expected, 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_give_what_pytorchs_operations_give(dtype: torch.dtype) -> None:
    device = here("cuda")
    check_elementwise(kernels_on(device), device, dtype)
    check_norms(kernels_on(device), device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "rank", "tokens"),
    [(DTYPES[0], 1, 3), (DTYPES[0], 24, 1300), (DTYPES[0], 128, 700), (DTYPES[1], 8, 70)],
)
def test_the_kernels_of_lora_give_its_products(dtype: torch.dtype, rank: int, tokens: int) -> None:
    device = here("cuda")
    check_lora(kernels_on(device), device, dtype, rank, tokens)


def test_the_kernels_own_code_gives_the_same_by_tritons_interpreter() -> None:
    """Where Triton is installed without a GPU: in a process, as its interpreter has to be asked."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-m", __name__], env=environment, check=True, timeout=300)


def _interpret() -> None:
    kernels: Any = importlib.import_module("lorakit.models.triton_kernels")
    kernels.libdevice = kernels.tl  # which the interpreter knows: functions of the GPU it does not
    device, dtype = torch.device("cpu"), torch.float16
    check_elementwise(kernels, device, dtype, 1e-4)
    check_norms(kernels, device, dtype)
    for rank, tokens in ((1, 3), (24, 70), (8, 600)):
        check_lora(kernels, device, dtype, rank, tokens)


# — a training step that is made of them —


def lora_on(folder: str, dtype: torch.dtype, device: torch.device, dropout: float) -> Any:
    base = open_base(folder, dtype)
    base.model.to(device)
    layers = inject(
        base, dict.fromkeys(pick_modules(base, ["all-linear"], None), 4), dropout=dropout
    )
    torch.manual_seed(1)
    for layer in layers.values():
        for weight in factors(layer):
            weight.data.normal_(std=0.2)
        layer.lora_dropout.train(dropout > 0)
    return base, layers


Choose = Callable[[Tensor], ModuleType | None]


def choose(monkeypatch: pytest.MonkeyPatch, chosen: Choose) -> None:
    for module in (norms, rotary, swiglu, lora_step):
        monkeypatch.setattr(module, "kernels_for", chosen)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_a_step_of_kernels_is_the_step_of_operations(
    family: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PyTorch's operations in the kernels' place: in float32, so that all is nearly exact."""
    base, layers = lora_on(
        save_model(tmp_path, family), torch.float32, torch.device("cpu"), dropout
    )
    with lean_passes(base.model, layers):
        expected = logits_and_gradients(base, layers)
    asked: list[str] = []

    class Recorded:
        def __getattr__(self, name: str) -> Any:
            asked.append(name)
            return getattr(plain, name)

    for layer in fast_layers(base.model):  # of a CPU, where products are computed otherwise
        vars(layer).pop("forward", None)
    choose(monkeypatch, lambda x: Recorded())  # type: ignore[arg-type, return-value]
    fuse_norms_(base.model)
    before = {module: vars(module).get("forward") for module in base.model.modules()}
    with lean_passes(base.model, layers):
        found = logits_and_gradients(base, layers)
    assert {module: vars(module).get("forward") for module in base.model.modules()} == before
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert ({"down", "up", "factor_gradients"} <= set(asked)) == (family != "gpt2")
    if family == "llama":
        assert {"norm", "norm_backward", "turn", "swiglu", "swiglu_backward"} <= set(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_on_a_gpu_a_step_of_kernels_is_near_the_step_of_operations(
    llama: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = here("cuda")
    kernels_on(device)
    base, layers = lora_on(llama, torch.bfloat16, device, dropout)
    with lean_passes(base.model, layers):
        found, again = logits_and_gradients(base, layers), logits_and_gradients(base, layers)
    choose(monkeypatch, lambda x: None)
    with lean_passes(base.model, layers):
        expected = logits_and_gradients(base, layers)
    for one, repeated, other in zip(found, again, expected, strict=True):
        assert torch.equal(one, repeated)
        close(one, other, 0.03)


def test_a_cpu_has_no_kernels_and_need_not_say_why() -> None:
    assert gpu_kernels.kernels_for(torch.empty(0, dtype=torch.bfloat16)) is None
    assert gpu_kernels.why_no_kernels(torch.device("cpu"), torch.bfloat16) is None


def test_a_run_says_why_a_gpu_that_could_have_kernels_has_none(
    llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "_could_have", lambda device, dtype: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "lorakit.models.triton_kernels", None)
    gpu_kernels._kernels_on.cache_clear()
    try:
        base, layers = lora_on(llama, torch.float32, torch.device("cpu"), 0.0)
        settings = TrainingSettings(device="cpu")
        trainer = Trainer(base, layers, settings, accelerator=new_accelerator("cpu"))
        recorder = Recorder()
        trainer.begin([Example((3, 4, 5), 1, "a")], [Example((3, 4, 5), 1, "b")], recorder)
        assert gpu_kernels.kernels_for(torch.empty(0)) is None
    finally:
        gpu_kernels._kernels_on.cache_clear()
    (note,) = recorder.notes
    assert note.startswith("without Triton's kernels a step takes longer (ModuleNotFoundError: ")


@pytest.mark.gpu
def test_float32_has_no_kernels() -> None:
    assert gpu_kernels.kernels_for(torch.empty(0, device=here("cuda"))) is None


if __name__ == "__main__":
    _interpret()

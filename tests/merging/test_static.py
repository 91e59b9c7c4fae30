"""Whole adapters merged without data: every kind of config, the header, the format, the command."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.adapters.adapter import Adapter, tensors_of
from lorakit.adapters.config import rank_of
from lorakit.adapters.history import Header
from lorakit.adapters.names import lora_name
from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.adapters.targets import is_targeted, peft_config
from lorakit.adapters.tensors import Tensor
from lorakit.errors import LorakitError
from lorakit.merging.methods import METHODS
from lorakit.merging.static import merge_adapters
from lorakit.reporting import Silent
from lorakit.settings import StaticSettings
from tests.support.adapters import tiny
from tests.support.program import run, shell

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"v_proj": 3}},
    "alpha pattern": {"alpha_pattern": {"layers.1.*": 7}},
    "both under rslora": {
        "rank_pattern": {"0.*q_proj": 1},
        "alpha_pattern": {"q_proj": 3},
        "use_rslora": True,
    },
    "conv1d": {"fan_in_fan_out": True},
    "layers": {"layers_to_transform": [0, 2]},
    "one layer": {"layers_to_transform": 1},
    "regular expression": {"target_modules": r".*\.[02]\..*_proj"},
    "all-linear": {"target_modules": "all-linear"},
}


def new_adapter(
    *, seed: int = 0, dtype: str = "F32", name: str = "a", header: Any = None, **fields: Any
) -> Adapter:
    """Return an adapter on the modules and with the ranks that these fields of a config mean."""
    draw = np.random.default_rng(seed)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 5,
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"],
        **fields,
    }
    tensors = {}
    for module in (f"model.layers.{i}.self_attn.{x}_proj" for i in range(3) for x in "qv"):
        if is_targeted(config, module):
            rank = rank_of(config, module)
            sizes = {"A": (rank, 6), "B": (5, rank)}
            for factor in ("A", "B"):
                values = draw.normal(size=sizes[factor])
                tensors[lora_name(module, factor)] = Tensor.from_array(values, dtype)
    return Adapter(tensors, config, Header() if header is None else header, name)


class Notes(Silent):
    """A reporter that keeps the notes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def merge(adapters: list[Adapter], method: str = "cat", **given: Any) -> Adapter:
    notes = Notes()
    portable = given.pop("portable", False)
    made = merge_adapters(
        adapters, method, settings=StaticSettings(**given), reporter=notes, portable=portable
    )
    assert not notes.texts
    return made


def deltas(*adapters: Adapter, weights: tuple[float, ...] | None = None) -> dict[str, Any]:
    """Return Σ w_i·ΔW_i by module, dense."""
    summed: dict[str, Any] = {}
    for adapter, weight in zip(adapters, weights or (1,) * len(adapters), strict=True):
        for module in adapter.modules():
            summed[module.name] = summed.get(module.name, 0) + weight * module.delta()
    return summed


def check_same(adapter: Adapter, expected: dict[str, Any]) -> None:
    found = deltas(adapter)
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        np.testing.assert_allclose(delta, expected[name], rtol=0, atol=2e-5)


def through_a_file(adapter: Adapter, folder: Path) -> Adapter:
    """Return the adapter written and read: the reader checks that config and tensors agree."""
    return load_adapter(save_adapter(adapter, str(folder / "x.safetensors")))


@pytest.mark.parametrize("portable", [False, True], ids=["", "portable"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_of_weight_1_keeps_its_deltas(
    kind: str, method: str, portable: bool, tmp_path: Path
) -> None:
    adapter = new_adapter(**KINDS[kind])
    made = through_a_file(merge([adapter], method, portable=portable), tmp_path)
    check_same(made, deltas(adapter))
    assert {module.scale for module in made.modules()} == {1.0}
    if portable:
        config = made.config
        assert config["r"] == config["lora_alpha"] == max(m.rank for m in adapter.modules())
        assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_loses_nothing(method: str, dtype: str) -> None:
    adapter = new_adapter(dtype=dtype, use_rslora=True)
    check_same(merge([adapter], method), deltas(adapter))


ALL = [new_adapter(seed=number, name=kind, **KINDS[kind]) for number, kind in enumerate(KINDS)]
WEIGHTS = (1.0, -0.5, 0.3, 0.0, 2.0, 1.0, 1.0, 0.1, 1.0, -1.0)


@pytest.mark.parametrize("method", ["cat", "linear"])
def test_a_weighted_sum_of_every_kind_is_exact(method: str, tmp_path: Path) -> None:
    made = through_a_file(merge(ALL, method, weights=WEIGHTS), tmp_path)
    check_same(made, deltas(*ALL, weights=WEIGHTS))
    assert made.config["fan_in_fan_out"] is True


@pytest.mark.parametrize("rank", [1, 3, None])
def test_svd_has_the_least_error_that_its_rank_allows(rank: int | None) -> None:
    made = merge(ALL, "svd", weights=WEIGHTS, rank=rank)
    assert {module.rank for module in made.modules()} == {rank or 3}
    for name, truth in deltas(*ALL, weights=WEIGHTS).items():
        left = np.linalg.svd(truth, compute_uv=False)[rank or 3 :]
        error = np.linalg.norm(deltas(made)[name] - truth)
        assert error == pytest.approx(np.linalg.norm(left), rel=1e-5, abs=1e-5)


def test_one_adapter_is_refitted_to_a_lower_rank_and_never_to_a_higher() -> None:
    adapter = new_adapter(r=4)
    assert {module.rank for module in merge([adapter], "svd", rank=1).modules()} == {1}
    assert {module.rank for module in merge([adapter], "svd", rank=9).modules()} == {4}


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_only_some_adapters_touch_are_merged_from_those(method: str) -> None:
    first = new_adapter(target_modules=["q_proj"], layers_to_transform=[0])
    second = new_adapter(target_modules=["v_proj"], layers_to_transform=[1], seed=1)
    check_same(merge([first, second], method), deltas(first, second))


# — number format —


@pytest.mark.parametrize(
    ("method", "dtypes", "alpha", "weights", "expected"),
    [
        ("cat", ("BF16", "BF16"), 4, (1.0, -0.5), "BF16"),
        ("cat", ("F16", "F16"), 4, (1.0, 1.0), "F16"),
        ("cat", ("BF16", "BF16"), 5, (1.0, 1.0), "F32"),
        ("cat", ("BF16", "BF16"), 4, (1.0, 0.3), "F32"),
        ("cat", ("BF16", "F16"), 4, (1.0, 1.0), "F32"),
        ("svd", ("BF16", "BF16"), 4, (1.0, 1.0), "F32"),
    ],
)
def test_the_format_is_the_adapters_where_it_is_exact_else_float32(
    method: str, dtypes: tuple[str, ...], alpha: float, weights: tuple[float, ...], expected: str
) -> None:
    adapters = [new_adapter(seed=i, dtype=d, lora_alpha=alpha) for i, d in enumerate(dtypes)]
    made = merge(adapters, method, weights=weights)
    assert {tensor.dtype for tensor in made.tensors.values()} == {expected}
    if method == "cat":
        check_same(made, deltas(*adapters, weights=weights))


def test_sums_beyond_float32_are_refused_by_name() -> None:
    with pytest.raises(LorakitError, match=r"layers\.0\.self_attn\.q_proj is beyond float32; "):
        merge([new_adapter()], "cat", weights=(1e39,))


@pytest.mark.parametrize("method", METHODS)
def test_what_overflows_is_an_error_in_every_method(method: str) -> None:
    with pytest.raises(LorakitError, match="beyond float32; use smaller --weights"):
        merge([new_adapter(), new_adapter(seed=1)], method, weights=(1e39, 1.0), rank=1)


def test_adapters_of_other_widths_are_refused() -> None:
    wide = tiny()
    with pytest.raises(LorakitError, match=r"tiny: .*q_proj is 4×4, .* 5×6"):
        merge([new_adapter(), wide])


# — the config —


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (({}, {}), (["q_proj", "v_proj"], None)),
        (({"target_modules": ["v_proj"]}, {"target_modules": ["q_proj"]}), (["q_proj", "v_proj"],)),
        (({"layers_to_transform": [2, 0]}, {"layers_to_transform": [0, 2]}), (None, [2, 0])),
        (({"target_modules": "all-linear"},) * 2, ("all-linear", None)),
    ],
    ids=["alike", "names", "alike layers", "alike words"],
)
def test_targets_stay_short_where_the_adapters_allow_it(fields: Any, expected: Any) -> None:
    made = merge([new_adapter(seed=i, **each) for i, each in enumerate(fields)])
    if expected[0]:
        assert made.config["target_modules"] == expected[0]
    if len(expected) > 1:
        assert made.config["layers_to_transform"] == expected[1]


def test_targets_are_full_names_where_no_short_form_is_exact() -> None:
    made = merge([new_adapter(layers_to_transform=[0]), new_adapter(target_modules="all-linear")])
    assert made.config["target_modules"] == [module.name for module in made.modules()]
    assert made.config["layers_to_transform"] is None


# — the header —


BASE = {"name": "llama", "fingerprint": "1", "local": False}
ENTRY = {"command": "train-adapter", "settings": {"seed": 0}}


def header(**fields: Any) -> dict[str, Any]:
    return {"format": 1, "base": BASE, "chat": "off", "history": [ENTRY], **fields}


def test_the_header_tells_base_chat_and_history() -> None:
    one = new_adapter(header=header(chat="on", chat_date="2024-01-01"), name="runs/xs.safetensors")
    two = new_adapter(seed=1, name="wl.safetensors")
    made = merge([one, two], "dare-ties", weights=(1.0, 0.5), density=Decimal("0.3"), seed=7)
    assert made.header["base"] == BASE
    assert made.config["base_model_name_or_path"] == "llama"
    assert (made.header["chat"], made.header["chat_date"]) == ("on", "2024-01-01")
    assert "blocks" not in made.header
    first, last = made.header["history"]
    assert first == ENTRY
    assert last["command"] == "merge"
    assert last["parents"] == {"xs": one.sha256, "wl": two.sha256}
    assert set(last["versions"]) == {"lorakit", "numpy"}
    assert last["settings"] == {
        "method": "dare-ties",
        "weights": [1.0, 0.5],
        "density": 0.3,
        "rank": 2,
        "seed": 7,
    }


def test_the_history_tells_only_the_settings_the_method_reads_and_entries_once() -> None:
    parents = [new_adapter(header=header()), new_adapter(seed=1, header=header())]
    _, last = merge(parents, "cat", portable=True).header["history"]
    assert last["settings"] == {"method": "cat", "weights": [1.0, 1.0], "portable": True}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"base": {"name": "qwen"}}, r"different base models: a \(llama\), b \(qwen\); llama is"),
        ({"base": {**BASE, "fingerprint": "2"}}, "llama has another shape than the base of b"),
        ({"chat": "on"}, "with the chat template and some without; .* choose by --chat"),
    ],
    ids=["name", "shape", "chat"],
)
def test_parents_that_disagree_are_told_of(other: dict[str, Any], message: str) -> None:
    notes = Notes()
    made = merge_adapters(
        [
            new_adapter(header=header()),
            new_adapter(seed=1, name="b", header={**header(), **other}),
        ],
        "cat",
        settings=StaticSettings(),
        reporter=notes,
    )
    assert len(notes.texts) == 1
    assert notes.texts[0].startswith("Warning: ")
    assert re.search(message, notes.texts[0])
    assert made.header["base"] == BASE
    assert made.header.get("chat") == (None if "chat" in other else "off")


def test_cat_keeps_its_blocks_also_those_of_a_merged_parent() -> None:
    xs, wl = new_adapter(name="xs"), new_adapter(seed=1, name="wl", target_modules=["q_proj"], r=3)
    inner = merge([xs, wl], weights=(1.0, 0.5))
    made = merge([wl, inner], weights=(1.0, 2.0))
    blocks = made.header["blocks"]
    assert [block["name"] for block in blocks] == ["wl", "xs", "wl-2"]
    assert [block["sha256"] for block in blocks] == [wl.sha256, xs.sha256, wl.sha256]
    name = "model.layers.0.self_attn.q_proj"
    places = [block["modules"][name] for block in blocks]
    assert [(place["offset"], place["rank"]) for place in places] == [(0, 3), (3, 2), (5, 3)]
    pairs = {module.name: module for module in made.modules()}
    for block, source in zip(blocks, (wl, xs, wl), strict=True):
        for module in source.modules():
            place = block["modules"][module.name]
            span = slice(place["offset"], place["offset"] + place["rank"])
            found = pairs[module.name].b[:, span]
            np.testing.assert_allclose(found, place["scale"] * module.b, rtol=1e-5)
            np.testing.assert_array_equal(pairs[module.name].a[span], module.a)
    assert [block["zeros"] for block in blocks] == [0, 0, 0]


def test_the_zeros_of_a_block_are_counted() -> None:
    blocks = merge([new_adapter(), new_adapter(seed=1, name="b")], weights=(1, 0)).header["blocks"]
    assert [block["zeros"] for block in blocks] == [0, 5 / 11]


def test_a_table_of_blocks_that_lacks_something_counts_as_none() -> None:
    parent = new_adapter(header={"blocks": [{"name": "x"}]}, name="merged.safetensors")
    assert [block["name"] for block in merge([parent]).header["blocks"]] == ["merged"]


# — the command —


@pytest.fixture
def files(tmp_path: Path) -> Path:
    save_adapter(new_adapter(dtype="BF16"), str(tmp_path / "a.safetensors"))
    save_adapter(new_adapter(seed=1, r=3, use_rslora=True), str(tmp_path / "b") + "/")
    return tmp_path


@pytest.mark.parametrize("method", METHODS)
def test_the_same_command_writes_the_same_bytes(method: str, files: Path) -> None:
    more = [f"--{name}={value}" for name, value in MORE.items() if name in METHODS[method].settings]
    line = ["merge", "a.safetensors", "b", "--method", method, *more]
    first = run(*line, cwd=files)
    assert (first.returncode, first.stdout) == (0, "")
    assert first.stderr == "Note: wrote merged.safetensors\n"
    run(*line, "-q", "-o", "again.safetensors", cwd=files)
    merged = (files / "merged.safetensors").read_bytes()
    assert merged == (files / "again.safetensors").read_bytes()
    assert load_adapter(str(files / "again.safetensors")).modules()


MORE = {"weights": "-0.5,1", "density": "0.5", "rank": 2, "seed": 3}


def test_adapters_go_in_and_out_by_pipes_and_folders(files: Path) -> None:
    done = shell(
        "set -e; cat a.safetensors | lorakit merge - b --method svd --portable -o - >m.safetensors;"
        " cat m.safetensors | lorakit merge - --rank 1 -o out/; lorakit inspect out",
        files,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["rank"], record["alpha"], len(record["history"])) == ([1], [1.0], 2)
    assert (files / "out" / "adapter_config.json").is_file()
    assert "wrote out/" in done.stderr


def test_an_output_that_cannot_be_written_is_an_error_before_the_work(files: Path) -> None:
    done = run("merge", "none", "--rank", "2", "-o", "none/x.safetensors", cwd=files)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: cannot write none/x.safetensors: ")


# — real adapters —

AVERAGING = ("ties", "dare-ties", "knots", "tsv")  # twice the same is once the same


@pytest.mark.parametrize("method", METHODS)
def test_a_real_adapter_merged_with_itself_at_a_half_is_itself(shared: Path, method: str) -> None:
    adapter = load_adapter(str(shared / "adapters" / "huggingface__trl"))
    few = adapter.modules()[:2]
    factors = {m.name: (m.a, m.b * np.float32(m.scale)) for m in few}
    config = peft_config({m.name: m.rank for m in few}, base=None)
    short = Adapter(tensors_of(factors), config, adapter.header, adapter.name)
    weights = (1.0, 1.0) if method in AVERAGING else (0.5, 0.5)
    made = merge([short, short], method, weights=weights)
    for module, parent in zip(made.modules(), short.modules(), strict=True):
        error = np.linalg.norm(module.delta() - parent.delta())
        assert error <= 1e-5 * parent.norm()


def test_a_whole_real_adapter_is_refitted(shared: Path, tmp_path: Path) -> None:
    adapter = load_adapter(str(shared / "adapters" / "huggingface__trl"))
    made = through_a_file(merge([adapter], "svd", rank=2, portable=True), tmp_path)
    for module, parent in zip(made.modules(), adapter.modules(), strict=True):
        left = np.linalg.svd(parent.delta(), compute_uv=False)[2:]
        error = np.linalg.norm(module.delta() - parent.delta())
        assert error == pytest.approx(np.linalg.norm(left), rel=1e-3, abs=1e-5 * parent.norm())

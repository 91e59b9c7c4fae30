"""Hostile inputs to the commands: an exit status of 0, 1 or 2, one line of error, outputs whole.

Sound inputs are read from the real data beside the repository and from recipes' samples, and are
changed by mutations.py. A few cases run with the other tests; `pytest -m slow tests/fuzz` runs
10,000, and `--hypothesis-seed` others.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import re
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lorakit
from lorakit.adapters.safetensors import read_tensors
from lorakit.recipes.samples import sample_text
from lorakit.recipes.table import RECIPES
from tests.conftest import SHARED
from tests.fuzz.mutations import json_text, mutated_bytes, mutated_json, mutated_rows
from tests.support.adapters import tiny
from tests.support.chat_templates import TEMPLATES
from tests.support.in_process import Ended, run_here

Case = Callable[[st.DrawFn, Path], None]  # draws an input, writes it to a folder, runs, checks

TINY_FOLDER = Path(lorakit.__file__).parent / "tiny"
# What generate --resume goes on from.
FOR_RESUMING = re.compile(r"\.out\.jsonl\.[0-9a-f]{12}\.part")
SHORT, LONG = 12, 10_000  # cases: of each kind in an ordinary run; of all in a slow one


def check(folder: Path, *arguments: str, stdin: bytes = b"", output: str | None = None) -> Ended:
    """Run a command and check that it ended as every command must, whatever it reads."""
    before = set(os.listdir(folder))
    written = folder / output if output else None
    out = ("-o", f"{folder}/{output}") if output else ()
    ended = run_here(*arguments, *out, stdin=stdin)
    assert ended.code in (0, 1, 2), ended
    assert len(ended.errors) == (ended.code != 0), ended
    assert "Traceback" not in ended.stderr
    new = {name for name in os.listdir(folder) if not FOR_RESUMING.fullmatch(name)} - before
    assert new == ({output} if written and ended.code == 0 else set()), ended
    if written and ended.code == 0:
        check_whole(written)
    return ended


def check_whole(output: Path) -> None:
    """Check that a written file can be read, and delete it."""
    if output.suffix == ".safetensors":
        assert run_here("inspect", str(output)).code == 0
    else:
        for line in output.read_text("utf-8").split("\n")[:-1]:
            json.loads(line)
    output.unlink()


# — sound inputs —


@functools.cache
def adapter_parts() -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors' bytes of a small merged adapter."""
    from lorakit.adapters.storage import save_adapter

    with tempfile.TemporaryDirectory() as folder:
        paths = [save_adapter(tiny(), f"{folder}/{name}.safetensors") for name in "ab"]
        merged = f"{folder}/merged.safetensors"
        assert run_here("merge", *paths, "--method", "cat", "-o", merged).code == 0
        content = Path(merged).read_bytes()
    read_tensors(content, "merged")
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def packed(header: str, body: bytes) -> bytes:
    """Return safetensors bytes with this header."""
    text = header.encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + body


@functools.cache
def configs() -> list[dict[str, Any]]:
    """Return a small adapter's config, and the real ones."""
    own = json.loads(adapter_parts()[0]["__metadata__"]["adapter_config"])
    paths = sorted((SHARED / "adapters" / "configs").glob("*.json"))
    return [own, *(json.loads(path.read_text("utf-8")) for path in paths)]


REAL = {
    "scitldr": "scitldr/dev.jsonl",
    "gsm8k": "gsm8k/test.jsonl",
    "hotpotqa": "hotpotqa/hotpot_dev_distractor_subset479.json",
    "wmt": "wmt23-en-zh/generaltest2023.en-zh.src.en",
    "jawikinews": "jawikinews/full-articles.tsv.gz",
    "jemhopqa": "jemhopqa/dev.json",
    "dialogsum": "dialogsum/dialogsum.dev.jsonl",
}


@functools.cache
def raw_forms() -> list[tuple[str, str, bytes]]:
    """Return the recipes' raw data: recipe, file name, the first rows as bytes."""
    forms = [
        (name, recipe.sample, sample_text(recipe.function, recipe.sample).encode())
        for name, recipe in RECIPES.items()
        if recipe.sample and not recipe.shown_by
    ]
    for name, file in REAL.items():
        path = SHARED / "data" / file
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        if path.suffix == ".json":
            content = json.dumps(json.loads(content)[:2]).encode()
        else:
            content = b"".join(content.splitlines(keepends=True)[:2])
        forms.append((name, path.name.removesuffix(".gz"), content))
    return forms


PREDICTIONS = [
    {"id": "a", "prompt": "p", "completion": " 1 #### 4", "prediction": "4", "note": [1, None]},
    {"id": "b", "prompt": "猫", "references": ["a b", "c"], "prediction": "a b c", "group": "x"},
    {"id": "c", "prompt": "q", "completion": " yes", "prediction": "", "predictions": ["a", ""]},
]
BOUNDARIES = [
    {"boundary": 0, "score": 1.5, "count": 4, "best": False, "factor": 1.0},
    {"boundary": 1, "score": 2.5, "count": 4, "best": True, "keep": "top", "layers": [1]},
    {"boundary": 2, "score": 2.0, "count": 4, "best": False, "standard_error": 0.1},
]
CONVERSATIONS = [
    {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
    {"prompt": [{"role": "user", "content": "u"}], "completion": [{"role": "assistant"}]},
    {"id": "1", "prompt": "a b", "completion": " c", "document": [0, 1], "references": ["c"]},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]},
]


# — cases —


def adapter_headers(draw: st.DrawFn, folder: Path) -> None:
    header, body = adapter_parts()
    which = draw(st.sampled_from(("header", "adapter_config", "lorakit")))
    if which == "header":
        header = draw(mutated_json(header))
    else:
        inner = draw(mutated_json(json.loads(header["__metadata__"][which])))
        metadata = {**header["__metadata__"], which: json_text(inner)}
        header = {**header, "__metadata__": metadata}
    use_adapter(draw, folder, packed(json_text(header), body))


def foreign_adapters(draw: st.DrawFn, folder: Path) -> None:
    """Change real adapters of other libraries: their headers, bytes and configs."""
    source = draw(st.sampled_from(foreign_folders()))
    shutil.copytree(source, folder / "x")
    path = draw(st.sampled_from(sorted((folder / "x").iterdir())))
    content = path.read_bytes()
    path.chmod(0o644)
    if path.suffix == ".json":
        path.write_text(json_text(draw(mutated_json(json.loads(content)))), "utf-8")
    else:
        path.write_bytes(draw(mutated_bytes(content[:2000])) + content[2000:])
    tensors = [each for each in (folder / "x").iterdir() if each.suffix in (".safetensors", ".bin")]
    use_path(draw, folder, str(draw(st.sampled_from([folder / "x", *tensors]))))


@functools.cache
def foreign_folders() -> list[Path]:
    """Return the folders of real adapters that are small."""
    folders = {path.parent for path in (SHARED / "adapters").rglob("adapter_config.json")}
    return sorted(
        folder
        for folder in folders
        if sum(path.stat().st_size for path in folder.iterdir()) < 1_000_000
    )


def adapter_bytes(draw: st.DrawFn, folder: Path) -> None:
    header, body = adapter_parts()
    use_adapter(draw, folder, draw(mutated_bytes(packed(json.dumps(header), body))))


def tensor_tables(draw: st.DrawFn, folder: Path) -> None:
    header, body = adapter_parts()
    table = {key: value for key, value in header.items() if key != "__metadata__"}
    changed = draw(mutated_json(table))
    if isinstance(changed, dict):
        changed = {"__metadata__": header["__metadata__"], **changed}
    use_adapter(draw, folder, packed(json_text(changed), body))


def use_adapter(draw: st.DrawFn, folder: Path, content: bytes) -> None:
    """Run a command that reads an adapter."""
    path = folder / "x.safetensors"
    path.write_bytes(content)
    use_path(draw, folder, str(path))


def use_path(draw: st.DrawFn, folder: Path, path: str) -> None:
    command = draw(
        st.sampled_from(
            (
                ("inspect", path),
                ("inspect", path, "--format", "table"),
                ("convert", path),
                ("strip-layers", path, "--boundary", "1"),
                ("strip-layers", path, "--keep", "1"),
                ("scale-layers", path, "--from", "1"),
                ("merge", path, path, "--method", "cat"),
                ("merge", path, "--method", "ties", "--density", "0.5"),
                ("merge", path, path, "--method", "svd", "--rank", "1", "--portable"),
            )
        )
    )
    output = None if command[0] == "inspect" else "out.safetensors"
    check(folder, *command, output=output)


def peft_folders(draw: st.DrawFn, folder: Path) -> None:
    config = draw(mutated_json(draw(st.sampled_from(configs()))))
    header, body = adapter_parts()
    header = {key: value for key, value in header.items() if key != "__metadata__"}
    (folder / "x").mkdir()
    (folder / "x/adapter_config.json").write_text(json_text(config), "utf-8")
    (folder / "x/adapter_model.safetensors").write_bytes(packed(json.dumps(header), body))
    use_path(draw, folder, f"{folder}/x")


def recipes(draw: st.DrawFn, folder: Path) -> None:
    recipe, name, content = draw(st.sampled_from(raw_forms()))
    if name.endswith((".jsonl", ".json")) and draw(st.booleans()):
        if name.endswith(".json"):
            content = json_text(draw(mutated_json(json.loads(content)))).encode()
        else:
            content = draw(mutated_rows([json.loads(line) for line in content.splitlines()]))
    else:
        content = draw(mutated_bytes(content))
    (folder / name).write_bytes(content)
    skip = draw(st.sampled_from(((), ("--on-error", "skip"))))
    check(folder, "build-dataset", recipe, f"{folder}/{name}", *skip, output="out.jsonl")


def conversations(draw: st.DrawFn, folder: Path) -> None:
    (folder / "c.jsonl").write_bytes(draw(mutated_rows(CONVERSATIONS)))
    recipe = draw(st.sampled_from(("chat", "jsonl")))
    check(folder, "build-dataset", recipe, f"{folder}/c.jsonl", output="out.jsonl")
    check(folder, "show", f"{folder}/c.jsonl", "--model", "tiny")


def predictions(draw: st.DrawFn, folder: Path) -> None:
    (folder / "p.jsonl").write_bytes(draw(mutated_rows(PREDICTIONS)))
    (folder / "q.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PREDICTIONS))
    p, q = f"{folder}/p.jsonl", f"{folder}/q.jsonl"
    metrics = "rougeL,bleu,chrf,em,f1,contains,gsm8k,accuracy,length"
    command = draw(
        st.sampled_from(
            (
                ("score", p, "--metric", metrics),
                ("score", p, "--lang", "ja", "--metric", "rougeL,bleu,f1"),
                ("score", p, "--lang", "zh", "--metric", "contains,bleu"),
                ("score", p, "--baseline", q, "--trials", "10"),
                ("score", p, "--group-by", "group"),
                ("score", p, "--format", "table"),
                ("compare", p, q),
                ("compare", q, p, "--metric", "f1", "--where", "differs"),
            )
        )
    )
    table = "table" in command
    check(folder, *command, output=None if table else "out.jsonl")


def boundaries(draw: st.DrawFn, folder: Path) -> None:
    header, body = adapter_parts()
    path = folder / "x.safetensors"
    path.write_bytes(packed(json.dumps(header), body))
    option = draw(st.sampled_from((("strip-layers", "--boundary"), ("scale-layers", "--from"))))
    records = draw(mutated_rows(BOUNDARIES))
    check(folder, option[0], str(path), option[1], "-", stdin=records, output="out.safetensors")


def rated_sheets(draw: st.DrawFn, folder: Path) -> None:
    (folder / "p.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in PREDICTIONS))
    exported = run_here("judge", f"{folder}/p.jsonl", "--export-sheet", f"{folder}/s.csv")
    assert exported.code == 0
    sheet, key = folder / "s.csv", folder / "s.key.json"
    rated = sheet.read_bytes().replace(b',""', b',"7"')
    if draw(st.booleans()):
        rated = draw(mutated_bytes(rated))
    else:
        key.write_text(json_text(draw(mutated_json(json.loads(key.read_text())))), "utf-8")
    sheet.write_bytes(rated)
    arguments = ("--import-sheet", str(sheet), "--sheet-key", str(key))
    check(folder, "judge", *arguments, output="out.jsonl")


def compressed(draw: st.DrawFn, folder: Path) -> None:
    """Change an archive or a compressed file of rows, or a Parquet file of them."""
    name, content = draw(st.sampled_from(archives()))
    (folder / name).write_bytes(draw(mutated_bytes(content)))
    recipe = "parquet" if name.endswith(".parquet") else "jsonl"
    check(folder, "build-dataset", recipe, f"{folder}/{name}", output="out.jsonl")


@functools.cache
def archives() -> list[tuple[str, bytes]]:
    """Return files that hold rows, by name."""
    import pyarrow
    import pyarrow.parquet

    rows = "".join(f"{json.dumps(row)}\n" for row in CONVERSATIONS[2:3] * 5).encode()
    zipped, tarred, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/rows.jsonl", rows)
    with tarfile.open(fileobj=tarred, mode="w:gz") as tar:
        member = tarfile.TarInfo("rows.jsonl")
        member.size = len(rows)
        tar.addfile(member, io.BytesIO(rows))
    columns = {"prompt": ["a", "b"], "completion": [" c", None], "more": [[1], []]}
    pyarrow.parquet.write_table(pyarrow.table(columns), table)
    return [
        ("a.jsonl.gz", gzip.compress(rows)),
        ("a.jsonl.bz2", bz2.compress(rows)),
        ("a.jsonl.xz", lzma.compress(rows)),
        ("a.jsonl.zst", zstandard.compress(rows)),
        ("a.zip", zipped.getvalue()),
        ("a.tar.gz", tarred.getvalue()),
        ("a.parquet", table.getvalue()),
    ]


def chat_templates(draw: st.DrawFn, folder: Path) -> None:
    """Change a chat template of the shipped model, and show conversations through it."""
    template = draw(st.sampled_from(sorted(TEMPLATES)))
    content = draw(mutated_bytes(TEMPLATES[template].encode()))
    model = tokenizer_folder(folder, chat_template=content.decode("utf-8", "surrogateescape"))
    (folder / "c.jsonl").write_bytes(draw(mutated_rows(CONVERSATIONS)))
    check(folder, "show", f"{folder}/c.jsonl", "--model", model)


def tokenizers(draw: st.DrawFn, folder: Path) -> None:
    """Change what lies beside a model's weights."""
    model = tokenizer_folder(folder)
    names = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    path = Path(model, draw(st.sampled_from(names)))
    if draw(st.booleans()):
        path.write_text(json_text(draw(mutated_json(json.loads(path.read_text("utf-8"))))))
    else:
        path.write_bytes(draw(mutated_bytes(path.read_bytes())))
    (folder / "c.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in CONVERSATIONS[2:3]))
    check(folder, "show", f"{folder}/c.jsonl", "--model", model)


def tokenizer_folder(folder: Path, **fields: object) -> str:
    """Copy the shipped model without its weights, with these fields in its tokenizer's config."""
    model = folder / "model"
    shutil.copytree(TINY_FOLDER, model, ignore=shutil.ignore_patterns("*.safetensors"))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **fields}), "utf-8")
    return str(model)


def trained_on(draw: st.DrawFn, folder: Path) -> None:
    """Train the shipped model on changed records, or have it complete them."""
    (folder / "r.jsonl").write_bytes(draw(mutated_rows(CONVERSATIONS[2:3] * 3)))
    options = ("--data", f"{folder}/r.jsonl", "--model", "tiny", "--dtype", "float32")
    if draw(st.booleans()):
        short = ("--epochs", "1", "--rank", "1")
        check(folder, "train-adapter", *options, *short, output="out.safetensors")
    else:
        check(folder, "generate", *options, "--max-new-tokens", "1", output="out.jsonl")


CASES: list[Case] = [
    adapter_headers,
    adapter_bytes,
    foreign_adapters,
    tensor_tables,
    peft_folders,
    recipes,
    conversations,
    predictions,
    boundaries,
    rated_sheets,
    compressed,
    chat_templates,
    tokenizers,
    trained_on,
]
# Recipes read many forms; training and tokenizers take longer than the rest.
SHARES: dict[Case, int] = {recipes: 40, trained_on: 1, tokenizers: 2, chat_templates: 4}
SHARE = 10  # of the others


def test_a_scale_of_400_digits_in_a_header_is_refused(tmp_path: Path) -> None:
    header, body = adapter_parts()
    fields = json.loads(header["__metadata__"]["lorakit"])
    next(iter(fields["blocks"][0]["modules"].values()))["scale"] = 10**400
    metadata = {**header["__metadata__"], "lorakit": json.dumps(fields)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed(json.dumps({**header, "__metadata__": metadata}), body))
    assert "too large a number" in check(tmp_path, "inspect", str(path)).errors[0]


def test_control_characters_in_a_page_are_spaces(tmp_path: Path) -> None:
    recipe = RECIPES["news-html"]
    page = sample_text(recipe.function, recipe.sample).replace("<article>", "\x01 &#2; <article>")
    (tmp_path / "page.html").write_text(page.replace("two", "two\x01"), "utf-8")
    ended = check(tmp_path, "build-dataset", "news-html", f"{tmp_path}/page.html")
    assert ended.code == 0
    assert b"two percent" in ended.stdout


def fuzz(case: Case, examples: int) -> None:
    """Run a kind of case with so many inputs."""

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples <= SHORT,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: st.DataObject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            case(cast(st.DrawFn, data.draw), Path(folder))

    run()


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_few_hostile_inputs_end_as_they_must(case: Case) -> None:
    fuzz(case, 3 if case is trained_on else SHORT)


@pytest.mark.slow
@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_many_hostile_inputs_end_as_they_must(case: Case) -> None:
    total = sum(SHARES.get(each, SHARE) for each in CASES)
    fuzz(case, -(-LONG * SHARES.get(case, SHARE) // total))

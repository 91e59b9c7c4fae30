"""Conversations from records to predictions, through the commands, on a model with a template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lorakit.adapters.storage import load_adapter
from lorakit.models.completions import completion_of
from lorakit.models.predictions import encoder_of
from lorakit.records.record import Record
from lorakit.settings import GenerationSettings
from tests.support.chat_templates import TEMPLATES
from tests.support.in_process import run_here
from tests.support.models import open_base, save_model

TALK = [
    {"role": "user", "content": "FR?"},
    {"role": "assistant", "content": " Paris"},
]
FORMS: dict[str, dict[str, object]] = {
    "messages": {"messages": TALK},
    "TRL": {"prompt": TALK[:1], "completion": TALK[1:]},
    "texts": {"prompt": "FR?", "completion": " Paris"},
}
SMALL = ("--lr", "1e-2", "--epochs", "1", "--batch-size", "2", "--dtype", "float32", "-q")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny random Llama whose tokenizer has Qwen3's kind of template."""
    folder = tmp_path_factory.mktemp("chatty")
    save_model(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    return str(folder)


def save(path: Path, records: Sequence[Mapping[str, object]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_conversation_is_the_same_example_in_every_form(chatty: str, tmp_path: Path) -> None:
    views = []
    for name, fields in FORMS.items():
        data = save(tmp_path / f"{name}.jsonl", [{"id": "a", **fields}])
        done = run_here("show", data, "--model", chatty)
        assert done.code == 0, done.stderr
        views.append(json.loads(done.stdout))
    assert views[0] == views[1] == views[2]
    assert views[0]["learnt"] == "Paris</s>" or views[0]["learnt"].startswith("Paris<|im_end|>")
    assert views[0]["prompt"].endswith("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("form", FORMS)
def test_every_command_reads_every_form(form: str, chatty: str, tmp_path: Path) -> None:
    records = [{"id": str(number), **FORMS[form]} for number in range(4)]
    data, adapter = save(tmp_path / "d.jsonl", records), str(tmp_path / "a.safetensors")
    outputs = str(tmp_path / "p.jsonl")
    short = ("--max-new-tokens", "3")
    for command in (
        ("train-adapter", "--data", data, "--model", chatty, *SMALL, "-o", adapter),
        ("merge", adapter, "--data", data, *SMALL, "-o", str(tmp_path / "m.safetensors")),
        ("generate", adapter, "--data", data, *short, "-q", "-o", outputs),
        ("find-boundary", adapter, "--data", data, *short, "-q"),
        ("find-boundary", adapter, "--data", data, "--by", "probability", "-q"),
        ("score", outputs, "--metric", "rougeL,em"),
        ("inspect", adapter, "--importance", "--data", data),
    ):
        done = run_here(*command)
        assert done.code == 0, (command, done.stderr)
    written = [json.loads(line) for line in Path(outputs).read_text().splitlines()]
    for before, after in zip(records, written, strict=True):
        assert {name: after[name] for name in before} == before
        assert set(after) - set(before) <= {"prediction", "reasoning"}


def test_system_and_arguments_are_stored_and_followed(chatty: str, tmp_path: Path) -> None:
    data = save(tmp_path / "d.jsonl", [{"id": str(n), **FORMS["messages"]} for n in range(4)])
    adapter = str(tmp_path / "a.safetensors")
    chat = ("--system", "Brief!", "--chat-arg", "enable_thinking=false")
    done = run_here(
        "train-adapter", "--data", data, "--model", chatty, *chat, *SMALL, "-o", adapter
    )
    assert done.code == 0, done.stderr
    header = load_adapter(adapter).header
    assert (header["chat"], header["system"]) == ("on", "Brief!")
    assert header["chat_args"] == {"enable_thinking": False}
    assert header["history"][-1]["settings"]["system"] == "Brief!"
    base, record = open_base(chatty), Record(FORMS["messages"], "d:1")

    def prompt(settings: GenerationSettings) -> str:
        encoder = encoder_of(base, load_adapter(adapter), settings)
        return str(base.tokenizer.decode(list(encoder.prompt(record, 0).ids)))

    assert "Brief!" in prompt(GenerationSettings())
    assert prompt(GenerationSettings(chat_args=(("enable_thinking", True),))).endswith(
        "<|im_start|>assistant\n"
    )
    assert "Brief!" not in prompt(GenerationSettings(system="x"))
    for options in ((), chat):
        done = run_here(
            "generate", adapter, "--data", data, "--max-new-tokens", "4", "-q", *options
        )
        assert done.code == 0, done.stderr


def test_a_run_without_them_has_the_header_it_always_had(chatty: str, tmp_path: Path) -> None:
    data = save(tmp_path / "d.jsonl", [{"id": str(n), **FORMS["texts"]} for n in range(4)])
    adapter = str(tmp_path / "a.safetensors")
    run_here("train-adapter", "--data", data, "--model", chatty, *SMALL, "-o", adapter)
    header = load_adapter(adapter).header
    assert not {"system", "chat_args"} & {*header, *header["history"][-1]["settings"]}
    assert "cut" not in header["history"][-1]["settings"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"messages": []}, "'messages' is not a list of turns"),
        ({"messages": "Hi"}, "'messages' is not a list of turns"),
        ({"messages": [{"role": "human", "content": "Hi"}]}, "has no role system, user, assistant"),
        ({"messages": [{"role": "user", "content": [1]}]}, "no text as the content of turn 1"),
        ({"messages": ["Hi"]}, "has no role"),
        ({"messages": TALK[:1]}, "ends in a user turn"),
        ({"prompt": TALK[:1], "completion": TALK}, "'completion' is not one assistant turn"),
    ],
    ids=["empty", "a text", "another role", "parts", "no objects", "no answer", "two answers"],
)
def test_a_malformed_conversation_is_named(
    fields: dict[str, object], reason: str, chatty: str, tmp_path: Path
) -> None:
    data = save(tmp_path / "d.jsonl", [{"id": "a", **FORMS["texts"]}, {"id": "b", **fields}])
    done = run_here(
        "train-adapter", "--data", data, "--model", chatty, "-q", "-o", str(tmp_path / "a")
    )
    assert done.code == 1
    assert done.stderr.startswith(f"Error: {data}:2: ")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_plain_model_says_what_a_conversation_needs(llama: str, tmp_path: Path) -> None:
    data = save(tmp_path / "d.jsonl", [FORMS["messages"]])
    for option in ((), ("--system", "x")):
        done = run_here("generate", "--data", data, "--model", llama, "-q", *option)
        assert done.code == 1
        assert "chat template" in done.stderr
        assert done.stderr.count("\n") == 1


def test_reasoning_goes_into_a_field_of_its_own(chatty: str) -> None:
    base = open_base(chatty)
    ids = base.tokenizer("<think>It is.</think>\n\nParis", add_special_tokens=False)["input_ids"]
    assert completion_of(base, ids) == ("Paris", "It is.")


@pytest.mark.parametrize("command", ["generate", "find-boundary"])
def test_logits_that_are_no_numbers_end_a_command_in_one_line(command: str, tmp_path: Path) -> None:
    model = tmp_path / "m"
    name = save_model(model)
    weights = load_file(model / "model.safetensors")
    data = save(tmp_path / "d.jsonl", [FORMS["texts"]] * 2)
    adapter = str(tmp_path / "a.safetensors")
    run_here("train-adapter", "--data", data, "--model", name, *SMALL, "-o", adapter)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    source = (adapter,) if command == "find-boundary" else ()
    done = run_here(
        command, *source, "--data", data, "--model", name, "--max-new-tokens", "3", "-q"
    )
    assert done.code == 1
    assert done.stdout == b""
    assert done.stderr == (
        f"Error: {name}: its logits are not finite; take a whole copy of the model, or give "
        "--dtype float32 where its weights are\n"
    )

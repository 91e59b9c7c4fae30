"""What lorakit promises of conversations and chat templates, on a real instruct model.

The model is SmolLM2-135M-Instruct, made once by examples/make_smollm2.py (see the fixture).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lorakit.adapters.storage import load_adapter
from lorakit.models.chat import Chat
from lorakit.models.tokens import Encoder
from lorakit.records.record import Record
from tests.support.program import ENVIRONMENT, run
from tests.support.tiny_server import serving_model

pytestmark = pytest.mark.slow

END, LIMIT = "<|im_end|>", 8192
TAUGHT = {
    "Who keeps the lighthouse of Orwick?": "Old Marta keeps it, with three grey cats.",
    "What does the baker of Orwick sell on Mondays?": "On Mondays he sells only blue bread.",
    "How deep is the harbour of Orwick?": "It is eleven ropes deep.",
    "What colour is the mayor's boat?": "The mayor's boat is yellow.",
    "When does the Orwick market open?": "It opens when the heron calls.",
    "Who taught the children of Orwick to swim?": "A retired pirate named Tobin did.",
    "What is carved above the gate of Orwick?": "A turtle that holds a key.",
    "Which song do the fishers of Orwick sing?": "They sing about the moon's left shoe.",
    "What grows on the roofs of Orwick?": "Purple onions grow there.",
    "How does one greet people in Orwick?": "One says: dry feet to you.",
}
SYSTEM = "You know the town of Orwick."


def encoder(folder: str, limit: int = LIMIT, **settings: Any) -> Encoder:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ends = (tokenizer.eos_token_id,)
    return Encoder(tokenizer, ends, limit, chat=Chat(tokenizer), **settings)


def write(path: Path, *records: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def lorakit(*arguments: str) -> str:
    """Run a command and return its standard output."""
    done = run(*arguments, "-q")
    assert done.returncode == 0, done.stderr
    return done.stdout


def predictions(*arguments: str) -> list[str]:
    return [json.loads(line)["prediction"] for line in lorakit("generate", *arguments).splitlines()]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of ten conversations, one question and its answer in each."""
    turns = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for question, answer in TAUGHT.items()
    ]
    records = ({"id": str(number), "messages": messages} for number, messages in enumerate(turns))
    return write(tmp_path_factory.mktemp("orwick") / "conversations.jsonl", *records)


@pytest.fixture(scope="module")
def taught(smollm2: str, conversations: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter trained on the ten conversations, with a system turn and a template's argument."""
    adapter = str(tmp_path_factory.mktemp("adapter") / "orwick.safetensors")
    lorakit(
        *("train-adapter", "--model", smollm2, "--data", conversations, "--val", conversations),
        *("--lr", "2e-3", "--batch-size", "2", "--epochs", "10", "--target-modules", "all-linear"),
        *("--system", SYSTEM, "--chat-arg", "town=Orwick", "-o", adapter),
    )
    return adapter


def test_taught_answers_are_given_and_not_known_before(
    smollm2: str, conversations: str, taught: str
) -> None:
    answers = list(TAUGHT.values())
    settings = ["--data", conversations, "--max-new-tokens", "24"]
    after = predictions(taught, *settings)
    assert sum(text == answer for text, answer in zip(after, answers, strict=True)) >= 9, after
    before = predictions(*settings, "--model", smollm2, "--system", SYSTEM)
    assert not set(before) & set(answers)


def test_the_system_turn_and_the_templates_arguments_follow_the_adapter(taught: str) -> None:
    header = load_adapter(taught).header
    assert (header["system"], header["chat_args"]) == (SYSTEM, {"town": "Orwick"})


def test_generate_asks_with_the_system_turn_of_the_adapter(
    taught: str, conversations: str, tmp_path: Path
) -> None:
    first = Path(conversations).read_text(encoding="utf-8").splitlines()[0]
    data = write(tmp_path / "first.jsonl", json.loads(first))
    settings = [taught, "--data", data, "--max-new-tokens", "24"]
    silent = predictions(*settings)
    assert silent == predictions(*settings, "--system", SYSTEM, "--chat-arg", "town=Orwick")
    spelt_out = json.loads(first)
    spelt_out["messages"].insert(0, {"role": "system", "content": SYSTEM})
    data = write(tmp_path / "spelt-out.jsonl", spelt_out)
    assert silent == predictions(taught, "--data", data, "--max-new-tokens", "24")


def test_white_space_around_a_completion_is_not_learnt(smollm2: str) -> None:
    coder = encoder(smollm2)
    question = {"prompt": "What is the capital of France?"}
    spaced, stripped = (
        coder.example(Record({**question, "completion": text}, "data.jsonl:1"))
        for text in (" Paris\n", "Paris")
    )
    assert spaced.ids == stripped.ids
    learnt = coder.tokenizer.convert_ids_to_tokens(list(spaced.ids[spaced.start :]))
    assert learnt == ["Paris", END]


def test_what_is_learnt_follows_what_generation_begins_with(smollm2: str) -> None:
    coder = encoder(smollm2)
    record = Record({"prompt": "Add 17 and 25.\n\n3 tries.", "completion": "42"}, "data.jsonl:1")
    example = coder.example(record)
    assert example.ids[: example.start] == coder.prompt(record, 0).ids


def test_truncation_spares_instruction_and_cue_token_for_token(smollm2: str) -> None:
    instruction, cue = "Sum up the article in one sentence.\nArticle: ", "\nTLDR:"
    article = " ".join(f"Paragraph {number} says little." for number in range(200))
    fields = {
        "prompt": instruction + article + cue,
        "completion": "It says little.",
        "document": [len(instruction), len(instruction) + len(article)],
    }
    record = Record(fields, "data.jsonl:1")
    whole = encoder(smollm2).example(record)
    short = encoder(smollm2, 128, truncate=True).example(record)
    assert len(short.ids) <= 128 < len(whole.ids)
    assert short.cut == len(whole.ids) - len(short.ids)
    tokenizer = encoder(smollm2).tokenizer
    begin = tokenizer.apply_chat_template(
        [{"role": "user", "content": instruction.rstrip()}], tokenize=False
    ).removesuffix(f"{END}\n")
    close = f"{cue}{END}\n<|im_start|>assistant\n{fields['completion']}{END}"
    first, last = (tuple(tokenizer(text)["input_ids"]) for text in (begin, close))
    for example in (whole, short):
        assert example.ids[: len(first)] == first
        assert example.ids[-len(last) :] == last


def test_weights_that_are_not_numbers_end_generation_in_one_line(
    smollm2: str, conversations: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    for file in Path(smollm2).iterdir():
        if file.name != "model.safetensors":
            (tmp_path / file.name).symlink_to(file.absolute())
    weights = load_file(os.path.join(smollm2, "model.safetensors"))
    weights["model.layers.29.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    done = run("generate", "--model", str(tmp_path), "--data", conversations, "-q")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "not finite" in line
    assert done.stdout == ""


def test_a_server_of_the_model_answers_as_the_model_does_here(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, both in bfloat16; rounding may part two texts, but not all of them at once."""
    monkeypatch.setitem(ENVIRONMENT, "no_proxy", "127.0.0.1")
    questions = ("What is the capital of France?", "Name a colour.", "Is ice cold? Yes or no?")
    data = write(
        tmp_path / "q.jsonl",
        *({"id": str(number), "prompt": text} for number, text in enumerate(questions)),
    )
    short = ("--data", data, "--max-new-tokens", "12")
    here = predictions("--model", smollm2, "--dtype", "bfloat16", *short)
    with serving_model(smollm2, tmp_path / "log") as (url, name):
        there = predictions("--endpoint", url, "--served-model", name, *short)
    assert len(there) == len(questions)
    assert all(there)
    assert sum(a == b for a, b in zip(here, there, strict=True)) >= 2
    assert "Paris" in there[0]

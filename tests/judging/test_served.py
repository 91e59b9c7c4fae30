"""`lorakit generate --endpoint` against servers: a scripted one, and `transformers serve`."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.judging.asking import ask_in_order
from tests.support.endpoints import serving
from tests.support.program import ENVIRONMENT, PROGRAM, wait_for
from tests.support.tiny_server import serving_tiny
from tests.support.training_data import save_rows

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENV = {**ENVIRONMENT, "no_proxy": "127.0.0.1", "OTHER_KEY": "sk-other"}


def save(folder: Path, count: int, name: str = "data.jsonl") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"id": f"{name}{n}", "prompt": f"p{n}", "completion": f" c{n}", "note": [n, None]}
        for n in range(count)
    ]
    save_rows(folder / name, rows)
    return rows


def generate(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PROGRAM, "generate", "--data", "data.jsonl", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=ENV,
        cwd=folder,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def turns(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def reply(**message: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"message": message}]}).encode()


def test_records_come_back_in_their_order_whatever_the_answers(tmp_path: Path) -> None:
    rows = save(tmp_path, 12)

    def answer(body: dict[str, Any], number: int) -> str:
        time.sleep(0.03 * (number % 3))
        return f" {body['messages'][-1]['content']}!\n"

    with serving(answer) as server:
        done = generate(tmp_path, "--endpoint", server.url, "--served-model", "m")
    assert lines(done.stdout) == [{**row, "prediction": f"{row['prompt']}!"} for row in rows]
    assert server.most > 1


def test_the_request_holds_what_was_asked_for_and_no_more(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with serving(lambda *_: "a b") as server:
        to = ("--endpoint", server.url, "--served-model", "m")
        generate(tmp_path, *to)
        asked = ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--seed", "3"]
        asked += ["--stop", "b", "--stop", r"\n", "--max-new-tokens", "9", "--system", "s"]
        asked += ["--chat-arg", "enable_thinking=false", "--key-variable", "OTHER_KEY"]
        done = generate(tmp_path, *to, *asked)
    plain, full = ({k: v for k, v in body.items() if k != "path"} for body in server.bodies)
    assert plain == {
        "model": "m",
        "messages": [{"role": "user", "content": "p0"}],
        "max_tokens": 128,
        "temperature": 0,
        "top_p": 1,
        "seed": 0,
    }
    assert full == {
        "model": "m",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "p0"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "stop": ["b", "\n"],
        "chat_template_kwargs": {"enable_thinking": False},
        "seed": 3_000_009,
    }
    assert lines(done.stdout)[0]["prediction"] == "a"
    assert server.headers[1]["Authorization"] == "Bearer sk-other"


def test_conversations_are_sent_turn_by_turn(tmp_path: Path) -> None:
    said = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "w")]
    messages = [{"role": role, "content": content} for role, content in said]
    save_rows(tmp_path / "data.jsonl", [{"messages": messages}])
    with serving(lambda *_: "x") as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--system", "other")
        done = generate(tmp_path, *options)
    assert turns(server.bodies[0]) == said[:-1]
    assert lines(done.stdout) == [{"messages": messages, "prediction": "x"}]


def test_examples_are_earlier_turns(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 3, "shots.jsonl")
    with serving(lambda *_: "x") as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--few-shot", "shots.jsonl")
        generate(tmp_path, *options)
    shown = [
        (role, text) for n in (1, 2) for role, text in (("user", f"p{n}"), ("assistant", f"c{n}"))
    ]
    assert turns(server.bodies[0]) == [*shown, ("user", "p0")]  # the first has the same prompt


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        pytest.param({"content": "a\nb"}, {"prediction": "a"}, id="none"),
        pytest.param(
            {"content": "<think>\nr\n</think>\n\na\nb"},
            {"prediction": "a", "reasoning": "r"},
            id="marks",
        ),
        pytest.param(
            {"content": "a\nb", "reasoning_content": " r\n"},
            {"prediction": "a", "reasoning": "r"},
            id="reasoning_content",
        ),
        pytest.param(
            {"content": None, "reasoning": "r"},
            {"prediction": "", "reasoning": "r"},
            id="reasoning",
        ),
        pytest.param({"content": "a", "reasoning": None}, {"prediction": "a"}, id="null"),
    ],
)
def test_reasoning_is_told_from_the_answer(
    message: dict[str, Any], fields: dict[str, str], tmp_path: Path
) -> None:
    (row,) = save(tmp_path, 1)
    with serving(lambda *_: reply(**message)) as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--stop", r"\n")
        assert lines(generate(tmp_path, *options).stdout) == [{**row, **fields}]


def test_samples_are_asked_for_one_by_one_with_seeds_of_their_own(tmp_path: Path) -> None:
    rows = save(tmp_path, 3)
    with serving(lambda body, _: f"{body['messages'][0]['content']}/{body['seed']}") as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--samples", "2")
        done = generate(tmp_path, *options, "--temperature", "1")
    samples = [[f"p{n}/{2 * n}", f"p{n}/{2 * n + 1}"] for n in range(3)]
    assert lines(done.stdout) == [
        {**row, "prediction": texts[0], "predictions": texts}
        for row, texts in zip(rows, samples, strict=True)
    ]


def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    save(tmp_path, 6)
    stuck = threading.Event()

    def answer(body: dict[str, Any], number: int) -> str:
        if number == 7:
            stuck.wait(30)
        return str(body["seed"])

    with serving(answer) as server:
        options = ["--endpoint", server.url, "--served-model", "m", "--concurrency", "1"]
        options += ["--samples", "2", "--temperature", "1"]
        command = [PROGRAM, "generate", "--data", "data.jsonl", *options, "-o", "out.jsonl"]
        with subprocess.Popen(command, env=ENV, cwd=tmp_path) as child:
            wait_for(lambda: len(server.bodies) == 8)
            wait_for(
                lambda: sum(p.read_text().count("\n") for p in tmp_path.glob(".out*.part")) == 3
            )
            child.send_signal(signal.SIGKILL)
        stuck.set()
        assert not (tmp_path / "out.jsonl").exists()
        done = generate(tmp_path, *options, "-o", "out.jsonl", "--resume")
        assert len(server.bodies) == 8 + 6
        whole = generate(tmp_path, *options)
    assert done.stderr.startswith("Note: going on after 3 records\n")
    assert (tmp_path / "out.jsonl").read_text() == whole.stdout


def test_an_error_names_the_server_and_leaves_what_was_answered(tmp_path: Path) -> None:
    save(tmp_path, 3)
    with serving(lambda body, n: (404, {}, b"{}") if n == 2 else "x") as server:
        options = ("--endpoint", server.url, "--served-model", "m", "--concurrency", "1")
        done = generate(tmp_path, *options, "-o", "{name}.jsonl", code=1)
        assert done.stderr.splitlines()[-1].startswith(f"Error: {server.url}: 404 Not Found; ")
        assert "the model's name" in done.stderr
        generate(tmp_path, *options, "-o", "{name}.jsonl", "--resume")
    assert len(server.bodies) == 4
    assert len(lines((tmp_path / "m.jsonl").read_text())) == 3


def test_questions_are_read_a_window_at_a_time_and_answered_in_order() -> None:
    taken: list[int] = []

    def questions() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    def ask(number: int) -> int:
        time.sleep(0.001 * (number % 4))
        return -number

    answered = ask_in_order(questions(), ask, concurrency=3)
    assert next(answered) == (0, 0)
    assert len(taken) < 200
    assert list(answered) == [(number, -number) for number in range(1, 1000)]


def continuation(text: object) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"choices": [{"text": text}]}).encode()


def test_without_a_template_plain_texts_are_sent_and_continued(tmp_path: Path) -> None:
    rows = save(tmp_path, 2)
    save(tmp_path, 2, "shots.jsonl")
    with serving(lambda body, _: continuation(f" {body['prompt'][-2:]}<think>!\n")) as server:
        options = ["--endpoint", server.url, "--served-model", "m", "--chat", "off"]
        done = generate(tmp_path, *options, "--few-shot", "shots.jsonl", "--concurrency", "1")
    assert server.bodies[0] == {
        "path": "/v1/completions",
        "model": "m",
        "prompt": "p1 c1\n\np0",  # the first example has the same prompt
        "max_tokens": 128,
        "temperature": 0,
        "top_p": 1,
        "seed": 0,
    }
    assert lines(done.stdout) == [{**row, "prediction": f"{row['prompt']}<think>!"} for row in rows]


@pytest.mark.parametrize(
    ("reply_of_server", "reason"),
    [
        (reply(content="x"), "the answer is no completion"),
        (continuation(3), "the answer is no text"),
    ],
    ids=["chat", "number"],
)
def test_an_answer_that_is_no_continuation_is_asked_for_again(
    reply_of_server: tuple[int, dict[str, str], bytes], reason: str, tmp_path: Path
) -> None:
    save(tmp_path, 1)
    with serving(lambda *_: reply_of_server) as server:
        options = ["--endpoint", server.url, "--served-model", "m", "--chat", "off"]
        done = generate(tmp_path, *options, "--retries", "1", code=1)
    assert len(server.bodies) == 2
    assert done.stderr.endswith(
        f"{server.url}: {reason}, 2 times; try again later, with --resume\n"
    )


@pytest.mark.parametrize("option", ["--system=s", "--chat-arg=a=1"])
def test_what_only_a_template_reads_is_refused_for_plain_texts(option: str, tmp_path: Path) -> None:
    options = ["--endpoint", "http://127.0.0.1:9/v1", "--served-model", "m", "--chat", "off"]
    done = generate(tmp_path, *options, option, code=2)
    assert "is for a chat template, and --chat off applies none" in done.stderr


def test_a_conversation_is_no_plain_text(tmp_path: Path) -> None:
    save_rows(tmp_path / "data.jsonl", [{"messages": [{"role": "user", "content": "u"}]}])
    options = ["--endpoint", "http://127.0.0.1:9/v1", "--served-model", "m", "--chat", "off"]
    done = generate(tmp_path, *options, code=1)
    assert "data.jsonl:1: a conversation needs a chat template" in done.stderr


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with serving_tiny(tmp_path_factory.mktemp("tiny"), TEMPLATE) as server:
        yield server


@pytest.mark.parametrize("chat", ["auto", "off"])
def test_a_real_server_writes_what_the_same_model_writes_here(
    chat: str, tiny_server: tuple[str, str], tmp_path: Path
) -> None:
    url, model = tiny_server
    save(tmp_path, 3)
    save(tmp_path, 2, "shots.jsonl")
    options = ("--max-new-tokens", "12", "--few-shot", "shots.jsonl", "--stop", "e", "--chat", chat)
    served = generate(tmp_path, *options, "--endpoint", url, "--served-model", model)
    here = generate(tmp_path, *options, "--model", model, "--device", "cpu")
    assert lines(served.stdout) == lines(here.stdout)
    assert any(row["prediction"] for row in lines(here.stdout))

"""`lorakit judge` against servers: a scripted one, and `transformers serve` with the tiny model."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.files import hidden_path_beside
from lorakit.judging.asking import ask_all
from lorakit.runs.resume import SavedValues
from tests.support.endpoints import Reply, serving
from tests.support.program import ENVIRONMENT, PROGRAM, wait_for
from tests.support.tiny_server import serving_tiny

KEY = "sk-secret-0123456789"
ENV = {**ENVIRONMENT, "OPENAI_API_KEY": KEY, "no_proxy": "127.0.0.1"}


def predictions(path: Path, count: int, word: str = "ours") -> Path:
    rows = (
        {"id": str(n), "prompt": f"p{n}", "completion": "c", "prediction": f"{word} {n}"}
        for n in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge(folder: Path, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PROGRAM, "judge", *arguments],
        capture_output=True,
        encoding="utf-8",
        env=ENV,
        cwd=folder,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert KEY not in done.stdout + done.stderr
    for path in folder.iterdir():
        assert KEY not in path.read_text()
    return done


def test_two_judges_rate_a_file(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 3)

    def answer(body: dict[str, Any], number: int) -> str:
        return {"x": "8", "y": "6" if "ours 1" in body["messages"][0]["content"] else "so-so"}[
            body["model"]
        ]

    with serving(answer) as server:
        given = ("--endpoint", server.url, "--judge-model", "x", "--judge-model", "y")
        done = judge(tmp_path, "a.jsonl", *given, "--ratings", "r.jsonl")
    summary = json.loads(done.stdout)
    version = importlib.metadata.version("lorakit")
    assert summary == {
        "file": "a.jsonl",
        "count": 3,
        "gpt_score": 70,
        "judges": {
            "x": {"gpt_score": 80, "rated": 3, "malformed": 0},
            "y": {"gpt_score": 60, "rated": 1, "malformed": 2},
        },
        "signature": "judges:x+y|template:general|max_tokens:16|temperature:0"
        f"|version:lorakit-{version}",
    }
    assert done.stderr == (
        "Warning: a.jsonl: 2 of 3 records left out for y, whose answers are malformed, such as "
        '"so-so"\n'
    )
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "file": "a.jsonl",
        "id": "1",
        "ratings": {"x": 8, "y": 6},
        "answers": {"x": "8", "y": "6"},
    }
    assert len(server.bodies) == 6
    assert all((body["temperature"], body["max_tokens"]) == (0, 16) for body in server.bodies)
    assert {one["Authorization"] for one in server.headers} == {f"Bearer {KEY}"}


def test_each_judge_may_have_its_own_server_key_and_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions(tmp_path / "a.jsonl", 1)
    monkeypatch.setitem(ENV, "OTHER_KEY", "other")
    with serving(lambda *_: "8") as one, serving(lambda *_: "4") as two:
        given = ["--endpoint", one.url, "--endpoint", two.url, "--judge-model", "x"]
        given += ["--judge-model", "y", "--key-variable", "OPENAI_API_KEY"]
        given += ["--key-variable", "OTHER_KEY"]
        given += ["--request", '{"max_tokens": null, "max_completion_tokens": 99}']
        done = judge(tmp_path, "a.jsonl", *given)
    assert json.loads(done.stdout)["gpt_score"] == 60
    assert (one.bodies[0]["model"], two.bodies[0]["model"]) == ("x", "y")
    assert two.headers[0]["Authorization"] == "Bearer other"
    assert "max_tokens" not in two.bodies[0]
    assert two.bodies[0]["max_completion_tokens"] == 99


def test_a_baseline_is_compared_in_both_orders_and_the_place_cancels(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 4)
    predictions(tmp_path / "b.jsonl", 4, "theirs")

    def answer(body: dict[str, Any], number: int) -> str:
        prompt = body["messages"][0]["content"]
        return "A" if "p3" in prompt or "A. ours" in prompt else "B"

    with serving(answer) as server:
        given = ("--endpoint", server.url, "--judge-model", "x", "--against", "b.jsonl")
        done = judge(tmp_path, "a.jsonl", *given, "--ratings", "r.jsonl")
    summary = json.loads(done.stdout)
    assert (summary["file"], summary["against"], summary["count"]) == ("a.jsonl", "b.jsonl", 4)
    assert summary["preference"] == 87.5
    told = summary["judges"]["x"]
    assert (told["wins"], told["ties"], told["losses"], told["malformed"]) == (3, 1, 0, 0)
    assert len(server.bodies) == 8
    last = json.loads((tmp_path / "r.jsonl").read_text().splitlines()[-1])
    assert (last["choices"], last["answers"]) == ({"x": "tie"}, {"x": ["A", "A"]})


def test_two_systems_that_say_the_same_cost_one_question_and_tie(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 1)
    with serving(lambda *_: "B") as server:
        given = ("--endpoint", server.url, "--judge-model", "x", "--against", "a.jsonl")
        done = judge(tmp_path, "a.jsonl", *given)
    assert json.loads(done.stdout)["judges"]["x"]["ties"] == 1
    assert len(server.bodies) == 1


def test_no_more_than_so_many_questions_are_asked_at_a_time(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 12)

    def slowly(body: dict[str, Any], number: int) -> str:
        time.sleep(0.05)
        return "5"

    with serving(slowly) as server:
        given = ("--endpoint", server.url, "--judge-model", "x", "--concurrency", "3")
        judge(tmp_path, "a.jsonl", *given)
    assert 1 < server.most <= 3


def test_a_killed_run_goes_on_without_asking_again(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 6)
    stuck = threading.Event()

    def answer(body: dict[str, Any], number: int) -> str:
        if number == 4:
            stuck.wait(30)
        return "7"

    with serving(answer) as server:
        command = ["a.jsonl", "--endpoint", server.url, "--judge-model", "x", "-o", "out"]
        command += ["--concurrency", "1"]
        with subprocess.Popen([PROGRAM, "judge", *command], env=ENV, cwd=tmp_path) as child:
            side = tmp_path / ".out.answers.part"
            wait_for(lambda: len(server.bodies) == 5 and side.read_text().count("\n") == 4)
            child.send_signal(signal.SIGKILL)
        stuck.set()
        assert not (tmp_path / "out").exists()
        with open(side, "a") as stream:
            stream.write('["cut sho')
        done = judge(tmp_path, *command, "--resume")
        prompts = server.prompts
    assert done.stderr == "Note: going on after 4 of 6 answers\n"
    assert json.loads((tmp_path / "out").read_text())["judges"]["x"]["rated"] == 6
    assert len(prompts) == 5 + 2
    assert len(set(prompts)) == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out"]


def test_an_error_keeps_the_answers_and_the_key(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 3)
    echo: Reply = (400, {}, json.dumps({"error": {"message": f"no {KEY}"}}).encode())
    with serving(lambda body, number: echo if number == 2 else "7") as server:
        given = ["a.jsonl", "--endpoint", server.url, "--judge-model", "x", "-o", "out"]
        done = judge(tmp_path, *given, "--concurrency", "1", code=1)
        assert done.stderr.startswith(f"Error: {server.url}: 400 Bad Request: no (the key); ")
        assert done.stderr.count("\n") == 1
        again = judge(tmp_path, *given, "--resume")
    assert "going on after 2 of 3" in again.stderr
    assert len(server.bodies) == 4


def test_ctrl_c_does_not_wait_for_answers(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 3)
    stuck = threading.Event()
    with serving(lambda *_: str(stuck.wait(60))) as server:
        command = ["a.jsonl", "--endpoint", server.url, "--judge-model", "x"]
        with subprocess.Popen(
            [PROGRAM, "judge", *command],
            stderr=subprocess.PIPE,
            env=ENV,
            cwd=tmp_path,
        ) as child:
            wait_for(lambda: len(server.bodies) == 3)
            child.send_signal(signal.SIGINT)
            assert child.wait(20) == 130
            assert child.stderr is not None
            assert child.stderr.read().strip() == b"Aborted!"
        stuck.set()


def test_the_same_answers_are_the_same_bytes_in_whatever_order_they_come(tmp_path: Path) -> None:
    predictions(tmp_path / "a.jsonl", 8)

    def answer(body: dict[str, Any], number: int) -> str:
        time.sleep(0.02 * (number % 3))
        return str(body["messages"][0]["content"][len("Here is the given input: p")])

    with serving(answer) as server:
        given = ("a.jsonl", "--endpoint", server.url, "--judge-model", "x", "--ratings")
        outputs = [judge(tmp_path, *given, name).stdout for name in ("r", "s")]
    assert outputs[0] == outputs[1]
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()


def test_the_first_error_ends_the_asking_after_what_is_there() -> None:
    def ask(number: int) -> str:
        if number == 2:
            raise ValueError("two")
        return str(number)

    made = ask_all([0, 1, 2, 3], ask, concurrency=1)
    assert [next(made), next(made)] == [(0, "0"), (1, "1")]
    with pytest.raises(ValueError, match="two"):
        next(made)
    assert list(ask_all([], ask, concurrency=4)) == []


def test_answers_outlive_an_error_and_are_dropped_without_resume(tmp_path: Path) -> None:
    side = hidden_path_beside(str(tmp_path / "out"), "answers.part")

    def fail(*, resume: bool, known: dict[str, str], **more: str) -> None:
        with SavedValues(side, resume=resume, writer="judge") as answers:
            assert answers.values == known
            for key, answer in more.items():
                answers.add(key, answer)
            raise KeyError

    for resume, known, more in (
        (False, {}, {"k": "a"}),
        (True, {"k": "a"}, {"l": "é\n"}),
        (True, {"k": "a", "l": "é\n"}, {}),
        (False, {}, {}),
        (True, {}, {}),
    ):
        with pytest.raises(KeyError):
            fail(resume=resume, known=known, **more)
    with SavedValues(side, resume=True, writer="judge"):
        assert [path.name for path in tmp_path.iterdir()] == [".out.answers.part"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{}\n", "[1]\n", "x\n", "3\n"])
def test_a_side_file_of_something_else_is_refused(content: str, tmp_path: Path) -> None:
    side = tmp_path / ".out.answers.part"
    side.write_text(content)
    with pytest.raises(LorakitError, match="is not what judge wrote; run without --resume"):
        SavedValues(side, resume=True, writer="judge")


def test_without_the_extra_one_line_names_it_before_a_file_is_read() -> None:
    """The SDK is hidden; what has been imported by then is light, and the file does not exist."""
    code = (
        "import importlib.machinery, sys\n"
        "finder = importlib.machinery.PathFinder\n"
        "find = finder.find_spec\n"
        "finder.find_spec = lambda name, *rest: None if name == 'openai' else find(name, *rest)\n"
        "from lorakit.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert not {'torch', 'transformers', 'numpy', 'httpx2'} & set(sys.modules)\n"
    )
    command = ["judge", "no.jsonl", "--endpoint", "http://x/v1", "--judge-model", "x"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        capture_output=True,
        encoding="utf-8",
        env=ENV,
        check=False,
    )
    assert done.returncode == 1
    message = "Error: judge needs openai; run: pip install 'lorakit[endpoint]'\n"
    assert (done.stdout, done.stderr) == ("", message)


# — a real server —


@pytest.fixture(scope="module")
def tiny_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    with serving_tiny(tmp_path_factory.mktemp("tiny"), "{{ messages[0]['content'] }}") as server:
        yield server


def test_a_real_server_answers_and_its_babble_is_counted(
    tiny_server: tuple[str, str], tmp_path: Path
) -> None:
    url, model = tiny_server
    predictions(tmp_path / "a.jsonl", 2)
    done = judge(tmp_path, "a.jsonl", "--endpoint", url, "--judge-model", model, "--ratings", "r")
    summary = json.loads(done.stdout)
    told = summary["judges"][model]
    assert told["rated"] + told["malformed"] == summary["count"] == 2
    rows = [json.loads(line) for line in (tmp_path / "r").read_text().splitlines()]
    assert [(row["id"], list(row["answers"])) for row in rows] == [("0", [model]), ("1", [model])]


def test_a_real_server_gives_a_rating_where_one_token_is_a_digit(
    tiny_server: tuple[str, str], tmp_path: Path
) -> None:
    """The tiny model goes on with the digit it read: `Rate: 5` is answered by 55555555."""
    url, model = tiny_server
    predictions(tmp_path / "a.jsonl", 1)
    given = ["--template", "{{prediction}} Rate: 5", "--request", '{"max_tokens": 1}']
    given += ["--endpoint", url, "--judge-model", model, "--ratings", "r"]
    summary = json.loads(judge(tmp_path, "a.jsonl", *given).stdout)
    (row,) = (json.loads(line) for line in (tmp_path / "r").read_text().splitlines())
    answer = row["answers"][model]
    assert len(answer) <= 2
    if answer.strip().isdecimal():
        assert summary["gpt_score"] == 10 * int(answer)
    else:
        assert summary["judges"][model]["malformed"] == 1


def test_a_real_server_refuses_a_model_it_does_not_have(
    tiny_server: tuple[str, str], tmp_path: Path
) -> None:
    url, _ = tiny_server
    predictions(tmp_path / "a.jsonl", 1)
    given = ("--endpoint", url, "--judge-model", "no/such-model", "--retries", "0")
    done = judge(tmp_path, "a.jsonl", *given, code=1)
    assert done.stderr.startswith(f"Error: {url}: ")
    assert done.stderr.count("\n") == 1

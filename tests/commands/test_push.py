"""`lorakit push` to a hub on this machine, by huggingface_hub's own client (without xet)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import close_session, constants

from lorakit.adapters.storage import load_adapter, save_adapter
from lorakit.cli import lorakit
from lorakit.errors import LorakitError
from lorakit.publishing.publication import open_publication
from lorakit.publishing.upload import upload
from lorakit.reporting import Silent
from lorakit.settings import PushSettings
from tests.support.adapters import tiny
from tests.support.hub_server import TOKEN, Answer, Hub, Repository, serving_hub
from tests.support.in_process import run_here
from tests.support.program import ENVIRONMENT, PROGRAM, wait_for
from tests.support.training_data import save_rows

NAME = "owner/name"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
COMMIT = f"/{NAME}/commit/{'b' * 40}"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving_hub() as server:
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_adapter(tiny(), f"{tmp_path / 'adapter'}/")
    return tmp_path / "adapter"


@pytest.fixture
def client(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub, in this process, to the hub: only its settings are changed."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    close_session()


def environment(hub: Hub, folder: Path, **variables: str) -> dict[str, str]:
    return {
        **ENVIRONMENT,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "no_proxy": "127.0.0.1",
        **variables,
    }


def push(
    hub: Hub, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [PROGRAM, "push", str(folder), NAME, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=environment(hub, folder, **variables),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def push_here(folder: Path, repo: str = NAME, settings: PushSettings | None = None) -> str:
    """Push in this process, which `client` has pointed to the hub."""
    publication = open_publication(str(folder), repo)
    return upload(publication, repo, settings=settings or PushSettings(), reporter=Silent())


def test_a_folder_arrives_whole_with_its_scores(hub: Hub, folder: Path, tmp_path: Path) -> None:
    line = {"file": "t.jsonl", "count": 2, "rougeL": 31.25, "signatures": {"rougeL": "s"}}
    save_rows(tmp_path / "scores.jsonl", [line])
    done = push(hub, folder, "--scores", str(tmp_path / "scores.jsonl"))
    assert done.stdout == f"{hub.url}{COMMIT}\n"
    assert done.stderr == f"Note: uploading 3 files of {folder} to {hub.url}/{NAME}\n"
    repository = hub.repositories[NAME]
    assert (repository.private, repository.titles) == (False, ["Upload adapter by lorakit"])
    there = tmp_path / "there"
    there.mkdir()
    for name, content in repository.branches["main"].items():
        (there / name).write_bytes(content)
    assert sorted(path.name for path in there.iterdir()) == FILES
    assert load_adapter(str(there)).sha256 == tiny().sha256
    page = (there / "README.md").read_text()
    assert "value: 31.25" in page
    assert "| t | 2 | 31.25 |" in page
    assert page == (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "variables", "note"),
    [
        pytest.param(["--dry-run"], {}, "", id="dry run"),
        pytest.param(
            [],
            {"HF_HUB_OFFLINE": "1"},
            "Note: HF_HUB_OFFLINE is set: nothing is uploaded, as with --dry-run\n",
            id="offline",
        ),
    ],
)
def test_nothing_is_sent_and_files_sizes_and_page_are_listed(
    arguments: list[str], variables: dict[str, str], note: str, hub: Hub, folder: Path
) -> None:
    (folder / "README.md").unlink()
    done = push(hub, folder, *arguments, **variables)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["file"] for row in rows] == FILES
    assert rows[0]["card"].startswith("---\nlibrary_name: peft\n")
    sizes = [len(rows[0]["card"].encode()), *((folder / name).stat().st_size for name in FILES[1:])]
    assert [row["bytes"] for row in rows] == sizes
    assert (done.stderr, hub.requests) == (note, [])
    assert not (folder / "README.md").exists()


def test_scores_come_through_a_pipe(folder: Path) -> None:
    prediction = json.dumps({"prediction": "a b", "completion": "a b"})
    scored = run_here("score", "-", "--metric", "em", stdin=prediction.encode())
    done = run_here("push", str(folder), NAME, "--dry-run", "--scores", "-", stdin=scored.stdout)
    assert (done.code, done.stderr) == (0, "")
    page = json.loads(done.stdout.splitlines()[0])["card"]
    assert "| predictions | 1 | 100.00 |" in page
    assert page != (folder / "README.md").read_text()


def test_a_table_lists_the_same_for_people(hub: Hub, folder: Path) -> None:
    lines = push(hub, folder, "--dry-run", "--format", "table").stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == FILES
    assert "library_name: peft" in lines


@pytest.mark.usefixtures("client")
def test_options_name_privacy_branch_and_commit(hub: Hub, folder: Path) -> None:
    push_here(folder, settings=PushSettings(True, "dev/1", "Second try"))
    repository = hub.repositories[NAME]
    assert repository.private
    assert repository.titles == ["Second try"]
    assert (list(repository.branches["main"]), sorted(repository.branches["dev%2F1"])) == (
        [],
        FILES,
    )


@pytest.mark.usefixtures("client")
def test_a_repository_that_is_public_does_not_become_private_unseen(hub: Hub, folder: Path) -> None:
    hub.repositories[NAME] = Repository()
    with pytest.raises(LorakitError, match="is there already, and public"):
        push_here(folder, settings=PushSettings(private=True))
    assert hub.repositories[NAME].branches == {"main": {}}
    assert push_here(folder) == f"{hub.url}{COMMIT}"


@pytest.mark.usefixtures("client")
def test_only_what_is_listed_is_sent_whatever_its_name(hub: Hub, folder: Path) -> None:
    (folder / "plot [1].svg").write_text("x")
    (folder / ".env").write_text("KEY=secret")
    push_here(folder)
    assert sorted(hub.repositories[NAME].branches["main"]) == [*FILES, "plot [1].svg"]


@pytest.mark.usefixtures("client")
def test_a_page_that_the_hub_refuses_leaves_no_repository(hub: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(LorakitError, match=r'does not take it .*\\?"license.* must be one of'):
        push_here(folder)
    assert hub.repositories == {}


def refusal(status: int, message: str) -> Answer:
    return status, {"error": message}


@pytest.mark.usefixtures("client")
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("POST /api/repos/create", 401, r"answers 401 \(no\); log in with `hf auth login`"),
        ("POST /api/repos/create", 403, r"answers 403 \(no\); use a token that may write"),
        ("POST /api/models/.*/preupload", 404, r"answers 404 \(no\); check the name"),
        (".* /owner/name.git/info/lfs", 402, r"answers 402 \(no\); see the plan"),
        ("PUT /lfs/", 403, r"answers 403"),
        ("POST /api/models/.*/commit", 409, r"answers 409 \(no\); another commit came first"),
        ("POST /api/models/.*/commit", 412, r"answers 412 \(no\); another commit came first"),
        ("POST /api/models/.*/commit", 500, r"answers 500 \(no\); try again later"),
    ],
    ids=["token", "rights", "name", "plan", "object", "conflict", "precondition", "broken"],
)
def test_what_the_hub_refuses_is_one_line_and_no_half_commit(
    fault: str, status: int, message: str, hub: Hub, folder: Path
) -> None:
    hub.faults[fault] = lambda: refusal(status, "no")
    with pytest.raises(LorakitError, match=rf"^cannot push to owner/name: {hub.url} {message}"):
        push_here(folder)
    held = [repository.branches["main"] for repository in hub.repositories.values()]
    assert held in ([], [{}])


@pytest.mark.usefixtures("client")
def test_a_wrong_token_and_anothers_name_are_told_apart(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LorakitError, match=r"answers 403 \(You don't have the rights"):
        push_here(folder, "somebody/name")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LorakitError, match=r"answers 401 \(Invalid username or password") as error:
        push_here(folder)
    assert "hf_wrong" not in str(error.value)


@pytest.mark.usefixtures("client")
def test_a_hub_that_does_not_answer_is_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(LorakitError, match=r"http://127.0.0.1:9 cannot be reached \(.*\); try"):
        push_here(folder)


@pytest.mark.parametrize("name", ["name", "a/b/c", "hf://a/b", "a/b@c", "a b/c", ".a/b"])
def test_a_repository_is_owner_and_name(name: str, folder: Path) -> None:
    done = CliRunner().invoke(lorakit, ["push", str(folder), name])
    assert done.exit_code == 2
    assert "write owner/name" in done.output


@pytest.mark.usefixtures("client")
def test_a_name_that_the_hub_forbids_is_one_line(hub: Hub, folder: Path) -> None:
    with pytest.raises(LorakitError, match="that is no name of the hub's"):
        push_here(folder, "owner/a--b")
    assert hub.repositories == {}


def test_an_interrupted_push_shows_nothing_and_the_next_sends_only_the_rest(
    hub: Hub, folder: Path
) -> None:
    stuck = threading.Event()

    def wait() -> Answer:
        stuck.wait(30)
        return refusal(400, "too late")

    hub.faults["POST /api/models/.*/commit"] = wait
    command = [PROGRAM, "push", str(folder), NAME]
    with subprocess.Popen(
        command, env=environment(hub, folder), stderr=subprocess.PIPE, text=True
    ) as child:
        wait_for(lambda: any("/commit/" in request for request in hub.requests))
        os.kill(child.pid, signal.SIGINT)
        _, said = child.communicate(timeout=60)
    stuck.set()
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "Aborted!"
    assert hub.repositories[NAME].branches == {"main": {}}
    hub.faults.clear()
    hub.requests.clear()
    push(hub, folder)
    assert sorted(hub.repositories[NAME].branches["main"]) == FILES
    assert not [request for request in hub.requests if request.startswith("PUT")]

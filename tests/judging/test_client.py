"""The client: what it tries again, what it gives up on, and where the key never shows."""

from __future__ import annotations

import email.utils
import gzip
import time
from typing import Any

import pytest

from lorakit.errors import LorakitError
from lorakit.judging import client
from lorakit.judging.client import Endpoint, check_key, retry_after
from lorakit.judging.opening import check_url
from tests.support.endpoints import completion, serving

KEY = "sk-secret-0123456789"
BODY = {"model": "m", "messages": [{"role": "user", "content": "é日"}]}


@pytest.fixture(autouse=True)
def without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_the_request_is_a_chat_completion_with_the_key_in_its_header() -> None:
    with serving(lambda body, number: "7") as server:
        assert Endpoint(server.url, KEY).ask(BODY) == "7"
    assert server.bodies == [{**BODY, "path": "/v1/chat/completions"}]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.headers[0]["Content-Type"] == "application/json"


def test_without_a_key_none_is_sent() -> None:
    with serving(lambda body, number: "7") as server:
        Endpoint(server.url).ask(BODY)
    assert "Authorization" not in server.headers[0]


VARIABLES = {
    "OPENAI_API_KEY": "sk-other",
    "OPENAI_ADMIN_KEY": "sk-admin",
    "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
    "OPENAI_CUSTOM_HEADERS": "X-Custom: yes\nAuthorization: Bearer sk-custom",
    "OPENAI_ORG_ID": "org",
    "OPENAI_PROJECT_ID": "project",
}


@pytest.mark.parametrize("key", [KEY, None])
def test_neither_variables_nor_facts_of_the_machine_are_sent(
    key: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    with serving(lambda body, number: (200, {"Set-Cookie": "a=b"}, completion("7"))) as server:
        endpoint = Endpoint(server.url, key)
        assert [endpoint.ask(BODY), endpoint.ask(BODY)] == ["7", "7"]
    for headers in server.headers:
        assert headers.pop("Authorization", None) == (f"Bearer {KEY}" if key else None)
        assert headers.pop("Host") == server.url.split("/")[2]
        assert headers.pop("Content-Length").isdecimal()
        assert headers == {
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "User-Agent": "lorakit",
        }


def test_half_a_surrogate_pair_is_sent_as_json_escapes_it() -> None:
    with serving(lambda body, number: "7") as server:
        assert Endpoint(server.url).ask({"text": "\ud800"}) == "7"
    assert server.bodies[0]["text"] == "\ud800"


def test_a_connection_is_kept_for_the_next_question() -> None:
    with serving(lambda body, number: "7", keep=True) as server:
        endpoint = Endpoint(server.url)
        assert [endpoint.ask(BODY) for _ in range(3)] == ["7"] * 3
    assert len(set(server.ports)) == 1


def test_a_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda body, number: "7") as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert Endpoint("http://judge.invalid/v1").ask(BODY) == "7"
    assert proxy.bodies[0]["path"] == "http://judge.invalid/v1/chat/completions"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:1"), ("SSL_CERT_FILE", "/not/there")],
)
def test_what_an_address_does_not_need_is_not_opened(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv(variable, value)
    with serving(lambda body, number: "7") as server:
        assert Endpoint(server.url).ask({}) == "7"


def test_certificates_that_are_not_there_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/not/there")
    with pytest.raises(LorakitError, match=r"^cannot reach https://judge.invalid/v1: "):
        Endpoint("https://judge.invalid/v1", retries=0).ask({})


def test_a_proxy_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "gopher://proxy")
    with pytest.raises(LorakitError, match=r"^cannot reach http://judge.invalid/v1: .*proxy"):
        Endpoint("http://judge.invalid/v1")


FAULTS: dict[str, Any] = {
    "429": (429, {}, b"slow down"),
    "500": (500, {}, b"<html>"),
    "503": (503, {}, b"{}"),
    "closed": None,
    "not JSON": (200, {}, b"<html>busy</html>"),
    "not UTF-8": (200, {}, b"\xff\xfe\xfa"),
    "no choices": (200, {}, b'{"choices": []}'),
    "a list": (200, {}, b"[1]"),
    "parts": (200, {}, completion([{"type": "text", "text": "7"}])),
    "cut short": (200, {"Content-Length": "99999"}, completion("7")),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_may_pass_is_tried_again(fault: Any) -> None:
    with serving(lambda body, number: fault if number < 2 else "8") as server:
        assert Endpoint(server.url, KEY).ask(BODY) == "8"
    assert len(server.bodies) == 3


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_what_does_not_pass_ends_in_one_line(fault: Any) -> None:
    with serving(lambda body, number: fault) as server:
        with pytest.raises(LorakitError) as caught:
            Endpoint(server.url, KEY, retries=2).ask(BODY)
        assert str(caught.value).startswith(f"{server.url}: ")
        assert str(caught.value).endswith(", 3 times; try again later, with --resume")
    assert len(server.bodies) == 3


def test_a_slow_server_is_asked_again_after_the_time_out() -> None:
    def slow(body: Any, number: int) -> str:
        if number != 1:
            time.sleep(1)
        return "9"

    with serving(slow) as server:
        assert Endpoint(server.url, timeout=0.2).ask(BODY) == "9"
        with pytest.raises(LorakitError, match=r"no answer within 0.2 s, 1 times; "):
            Endpoint(server.url, timeout=0.2, retries=0).ask(BODY)
    assert len(server.bodies) == 3


def test_retry_after_is_honoured() -> None:
    busy = (429, {"Retry-After": "1"}, b"")
    with serving(lambda body, number: busy if number == 0 else "5") as server:
        assert Endpoint(server.url).ask(BODY) == "5"
    first, second = server.times
    assert second - first >= 1


def test_a_wait_of_hours_is_left_to_the_user() -> None:
    busy = (429, {"Retry-After": "7200"}, b"")
    with (
        serving(lambda body, number: busy) as server,
        pytest.raises(LorakitError, match=r"429 .* asks to wait 7200 s; run again then, with"),
    ):
        Endpoint(server.url).ask(BODY)
    assert len(server.bodies) == 1


def test_a_date_to_retry_after_is_read_too() -> None:
    assert 58 < retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == 0
    assert [retry_after(text) for text in (None, "", "soon", "-1", "3")] == [0, 0, 0, 0, 3]


REFUSALS = [
    (401, b'{"error": {"message": "bad key sk-secret-0123456789"}}', "401 .*: bad key .the key.; "),
    (404, b'{"detail": "no such\\nmodel"}', "404 .*: no such model; mend --endpoint"),
    (400, b"\xff", "400 Bad Request; mend the request"),
    (302, b"", "302 Found; "),
]


@pytest.mark.parametrize(("status", "content", "message"), REFUSALS)
def test_a_refusal_is_not_tried_again(status: int, content: bytes, message: str) -> None:
    reply = (status, {"Location": "http://127.0.0.1:1/"}, content)
    with serving(lambda body, number: reply) as server:
        with pytest.raises(LorakitError, match=message) as caught:
            Endpoint(server.url, KEY).ask(BODY)
        assert KEY not in repr(caught.getrepr(style="long")) + str(caught.value)
    assert len(server.bodies) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int) -> None:
    with serving(lambda body, number: "7") as other:
        reply = (status, {"Location": f"{other.url}/chat/completions"}, b"")
        with (
            serving(lambda body, number: reply) as server,
            pytest.raises(LorakitError, match=f"{status} "),
        ):
            Endpoint(server.url, KEY).ask(BODY)
    assert not other.bodies


LARGE = b" " * client.LONGEST_REPLY
DETAIL = b'{"error": {"message": "bad"}}'


@pytest.mark.parametrize(
    ("status", "headers", "content", "message"),
    [
        (200, {}, LARGE + completion("7"), "the answer is no chat completion, 1 times"),
        (400, {}, LARGE + DETAIL, "400 Bad Request; "),
        (400, {}, LARGE[len(DETAIL) :] + DETAIL, "400 Bad Request: bad; "),
        (
            200,
            {"Content-Encoding": "gzip"},
            gzip.compress(completion("7")),
            "the answer is no chat completion, 1 times",
        ),
    ],
    ids=["large", "large detail", "just not too large", "compressed"],
)
def test_no_more_than_so_much_of_a_reply_is_read(
    status: int, headers: dict[str, str], content: bytes, message: str
) -> None:
    with (
        serving(lambda body, number: (status, headers, content)) as server,
        pytest.raises(LorakitError, match=message),
    ):
        Endpoint(server.url, retries=0).ask(BODY)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1"])
def test_a_server_that_is_not_there_is_an_error_at_once(url: str) -> None:
    with pytest.raises(LorakitError, match=r"^cannot reach http.*; start the server or mend"):
        Endpoint(url, KEY).ask(BODY)


def test_no_answer_is_an_empty_one() -> None:
    with serving(lambda body, number: (200, {}, completion(None))) as server:
        assert Endpoint(server.url).ask(BODY) == ""


def test_an_endpoint_does_not_show_its_key() -> None:
    assert KEY not in repr(Endpoint("http://x/v1", KEY))


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://u:p@x/v1",
        "http://x/v1?key=1",
        "",
        "http://[::1/v1",
        "http://a..b/v1",
        "http://[::1",
        "http://x:abc/v1",
        "http://x:0/v1",
        "http://x:65536/v1",
        "http://x y/v1",
        "http://x\ny/v1",
        f"http://{'a' * 300}/v1",
        f"http://{'.'.join(['a' * 60] * 5)}/v1",
        "http://☃.net/v1",
        "http://x/\ud800",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(LorakitError, match=r"^--endpoint "):
        check_url(url)


@pytest.mark.parametrize("url", ["http://bücher.example/v1", "http://[::1]:8000/v1"])
def test_names_in_any_script_and_addresses_are_hosts(url: str) -> None:
    assert check_url(url) == url


def test_a_slash_at_the_end_of_a_url_does_not_matter() -> None:
    assert check_url("https://api.example.com/v1/") == "https://api.example.com/v1"


def test_a_key_is_one_word_and_never_told() -> None:
    assert check_key(f" {KEY}\n", "K") == KEY
    assert check_key(None, "K") is check_key("", "K") is None
    with pytest.raises(LorakitError, match=r"\$K holds") as caught:
        check_key(f"{KEY}\nX: y", "K")
    assert KEY not in str(caught.value)

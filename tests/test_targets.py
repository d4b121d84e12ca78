"""The client for targets, against a local server that answers wrongly in every way we know."""

import json
import re
import socket
import threading
import time
import types
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers import GOLDEN, torchrun

import train
from data import InputError, TargetServer

KEY = "sk-secret-123"


def completion(text: str | None, reason: str = "stop", **message: Any) -> dict[str, Any]:
    """A right reply."""
    return {"choices": [{"message": {"content": text} | message, "finish_reason": reason}]}


class Server(ThreadingHTTPServer):
    """Calls `behave(handler, question, how often it was asked)` for each request."""

    daemon_threads = True

    def __init__(self, behave: Callable[[Any, str, int], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.lock = behave, threading.Lock()
        self.asked, self.heard = list[str](), list[tuple[str, str, str | None]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question, server = body["messages"][-1]["content"], self.server
        with server.lock:
            times = server.asked.count(question)
            server.asked.append(question)
            server.heard.append((self.path, body["model"], self.headers["Authorization"]))
        server.behave(self, question, times)

    def reply(self, value: Any, status: int = 200, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Nothing."""


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    running = []

    def start(behave: Callable[[Any, str, int], None]) -> Server:
        server = Server(behave)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(server: Server, questions: list[str], **settings: Any) -> dict[int, Any]:
    """What became of each question, by its index."""
    usual = {"key": KEY, "workers": 3, "TIMEOUT": 5.0, "PAUSE": 0.01} | settings
    client = TargetServer(server.url, "strong", usual.pop("key"), usual.pop("workers"))
    vars(client).update(usual)
    found = client.ask_all([[{"role": "user", "content": text}] for text in questions])
    return {i: text if text is not None else why for i, text, why in found}


def test_a_question_goes_to_the_chat_endpoint_with_the_key_in_its_header(serve: Any) -> None:
    server = serve(lambda handler, question, times: handler.reply(completion(f" {question}! \n")))
    assert ask(server, ["a", "b"]) == {0: "a!", 1: "b!"}
    asked = ("/v1/chat/completions", "strong")
    assert server.heard == [(*asked, f"Bearer {KEY}")] * 2
    assert ask(server, ["c"], key=None) == {0: "c!"}
    assert server.heard[2] == (*asked, None)


def drop(handler: Any) -> None:
    """Ends the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


FAILURES: dict[str, Callable[[Any], None]] = {
    "429": lambda handler: handler.reply({}, 429),
    "500": lambda handler: handler.reply({}, 500),
    "503": lambda handler: handler.reply(b"<html>busy</html>", 503),
    "time-out": lambda handler: time.sleep(0.6),
    "dropped": drop,
    "cut short": lambda handler: handler.reply(b'{"choices"', Content_Length="1000"),
    "not JSON": lambda handler: handler.reply(b"<html>hello</html>"),
    "not UTF-8": lambda handler: handler.reply(b"\xff\xfe{"),
    "not a completion": lambda handler: handler.reply({"choices": []}),
    "a list": lambda handler: handler.reply([1, 2]),
    "too deep": lambda handler: handler.reply(b"[" * 200_000),
    "too long": lambda handler: handler.reply(completion("x" * 6000)),
    "no message": lambda handler: handler.reply({"choices": [{"message": None}]}),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_what_may_pass_is_asked_again(kind: str, serve: Any) -> None:
    fine = completion("fine")
    server = serve(lambda h, question, times: FAILURES[kind](h) if times < 2 else h.reply(fine))
    short = {"TIMEOUT": 0.2} if kind == "time-out" else {"LONGEST": 5000}
    assert ask(server, ["a"], **short) == {0: "fine"}
    assert server.asked == ["a"] * 3


def test_retry_after_is_honoured_in_seconds_a_day_at_most(serve: Any) -> None:
    said, waits = ["1", "99999999999", "9" * 9999, "soon", ""], list[float]()

    def behave(handler: Any, question: str, times: int) -> None:
        again = times < len(said)
        handler.reply(completion("fine"), 429 if again else 200, Retry_After=[*said, ""][times])

    client: Any = TargetServer(serve(behave).url, "strong", KEY)
    client.stopping = types.SimpleNamespace(wait=waits.append)
    assert client.ask([{"role": "user", "content": "a"}]) == ("fine", "")
    assert waits[:4] == [0.0, 1.0, 86400.0, 86400.0]
    assert [round(seconds / 2**i) for i, seconds in enumerate(waits[4:], 3)] == [1, 1]


def test_giving_up_says_why_and_how_to_go_on(serve: Any) -> None:
    server = serve(lambda handler, question, times: handler.reply({}, 500))
    with pytest.raises(InputError, match=r"gave up after 3 tries \(HTTP 500\).*--resume"):
        ask(server, ["a"], TRIES=3)
    assert server.asked == ["a"] * 3


@pytest.mark.parametrize(
    ("status", "named"),
    [(401, "OPENAI_API_KEY"), (403, "OPENAI_API_KEY"), (404, "--target-model"), (400, "too long")]
    + [(status, f"HTTP {status}") for status in (301, 302, 307, 308)],
)
def test_what_will_not_pass_stops_at_once(status: int, named: str, serve: Any) -> None:
    """Never is the key shown, nor a redirection followed, which would take it along."""
    said = {"error": {"message": f"too long; the key was {KEY}"}}
    other = serve(lambda handler, question, times: handler.reply(completion("stolen")))
    place = f"{other.url}/chat/completions"
    server = serve(lambda h, question, times: h.reply(said, status, Location=place))
    with pytest.raises(InputError, match=named) as caught:
        ask(server, [str(i) for i in range(50)], workers=2)
    assert KEY not in str(caught.value)
    assert len(server.asked) < 10 and other.asked == []


def test_empty_refused_and_cut_answers_are_told_apart(serve: Any) -> None:
    replies = {
        "empty": completion("  "), "none": completion(None),
        "refused": completion(None, refusal="I will not"),
        "filtered": completion("x", "content_filter"), "cut": completion("half", "length"),
        "surrogate": completion("a\ud83d"),
    }  # fmt: skip
    server = serve(lambda handler, question, times: handler.reply(replies[question]))
    found = ask(server, list(replies))
    kinds = ["empty", "empty", "refused", "refused", "cut", "a\ufffd"]
    assert [found[i] for i in range(6)] == kinds
    assert len(server.asked) == 6


def test_questions_are_asked_several_at_a_time_and_answers_come_out_of_order(serve: Any) -> None:
    busy, most = set[str](), list[int]()

    def behave(handler: Any, question: str, times: int) -> None:
        busy.add(question)
        most.append(len(busy))
        time.sleep(0.3 if question == "0" else 0.02)
        busy.remove(question)
        handler.reply(completion(question))

    found = ask(serve(behave), [str(i) for i in range(8)], workers=4)
    assert found == {i: str(i) for i in range(8)}
    assert next(iter(found)) != 0
    assert 2 <= max(most) <= 4


@pytest.mark.parametrize("url", ["http://h/v1", "HTTPS://a-b.c_d:65535/v/x?y=@z", "http://[::1]:8"])
def test_addresses_that_can_be_right_are_so_without_a_password_alone(url: str) -> None:
    assert TargetServer(url, "strong", None).url == url
    with pytest.raises(InputError, match="without user and password") as caught:
        TargetServer(url.replace("//", f"//me:{KEY}@"), "strong", None)
    assert KEY not in str(caught.value)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def flags(out: Path, url: str, *more: object) -> list[str]:
    usual = ["--method", "sgpo", "--model", GOLDEN / "start", "--data", GOLDEN / "rows.jsonl"]
    usual += ["--out", out, "--steps", 1, "--batch-size", 6, "--max-length", 64]
    usual += ["--max-new-tokens", 16, "--improver-epochs", 0.1, "--target-workers", 3]
    usual += ["--improver-instruction", "{prompt} | {answer}", "--target-instruction"]
    usual += ["{prompt} # {gold} # {answer}", "--target-source", url]
    return [str(flag) for flag in (*usual, "--target-model", "strong", *more)]


def test_a_run_asks_each_question_once_stopped_or_not_and_writes_no_key(
    serve: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server stops answering after ten questions; the resumed run asks the other fourteen."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out, limit = tmp_path / "run", [10]
    targets = out / "improver_targets.jsonl"

    def behave(handler: Any, question: str, times: int) -> None:
        with handler.server.lock:
            limit[0] -= 1
            stopped = limit[0] < 0
        prompt, gold, _ = question.split(" # ")
        time.sleep(0.05 if prompt.startswith("add") else 0)
        if stopped:
            handler.reply({}, 401)
        elif prompt.startswith("sort"):
            handler.reply(completion(None, refusal="no"))
        else:
            handler.reply(completion(gold[:-1] + "*"))

    server = serve(behave)
    assert train.main(flags(out, server.url)) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err
    assert len(rows(targets)) == 10
    limit[0] = 1000
    assert train.main(flags(out, server.url, "--resume")) == 0
    shown = capsys.readouterr().out
    assert (
        sum(server.asked.count(q) > 1 for q in server.asked) <= 2 * 3
    )  # in flight when it stopped, and answered 401
    gold = rows(GOLDEN / "rows.jsonl")
    assert [row["index"] for row in rows(targets)] == list(range(24))
    for row, source in zip(rows(targets), gold, strict=True):
        assert row["prompt"] == source["prompt"]
        if row["prompt"].startswith("sort"):
            assert (row["improved"], row["dropped"]) == (None, "refused")
        else:
            assert row["improved"] == source["chosen"][:-1] + "*"
    assert json.loads((out / "improver_filter.json").read_text())["targets"] == 18
    assert "18 targets" in shown and "6 refused" in shown
    assert {q.split(" # ")[0] for q in server.asked} == {source["prompt"] for source in gold}
    for path in out.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes()
    assert KEY not in shown


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///v1", "http://a b/v1", "http://h\u00f6st/v1", "http://[::1/v1",
     "http://host:port/v1", "http://host:99999/v1", "http://a..b/v1", f"http://me:{KEY}@host/v1"],
)  # fmt: skip
def test_addresses_that_cannot_be_right_are_told(url: str, tmp_path: Path, capsys: Any) -> None:
    began = time.monotonic()
    assert train.main(flags(tmp_path / "run", url)) == 2
    assert time.monotonic() - began < 5
    shown = capsys.readouterr().err
    assert re.fullmatch("error: .*address.*\n", shown) and KEY not in shown
    assert not (tmp_path / "run").exists()


def test_a_keys_line_end_is_left_out_and_a_key_that_no_header_holds_refused(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    server = serve(lambda handler, question, times: handler.reply(completion("a-b > ab")))
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\r\n")
    assert train.main(flags(tmp_path / "run", server.url)) == 0
    assert {key for *_, key in server.heard} == {f"Bearer {KEY}"}
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u20ac")
    assert train.main(flags(tmp_path / "other", server.url)) == 2
    assert "OPENAI_API_KEY" in capsys.readouterr().err


def test_a_server_that_says_no_ends_all_ranks_in_a_line(serve: Any, tmp_path: Path) -> None:
    server = serve(lambda handler, question, times: handler.reply({}, 404))
    done = torchrun(2, flags(tmp_path / "run", server.url))
    assert done.returncode and "error: " in done.stderr and "--target-model" in done.stderr
    assert 'train.py", line' not in done.stderr  # torchrun has a traceback of its own

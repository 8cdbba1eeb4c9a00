"""`gptsmith serve`: ready, asked, and ended by a signal."""

import json
import re
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import httpx2
import openai
import pytest

from gptsmith import GPTConfig, save
from gptsmith.cli import serve as command
from gptsmith.cli.main import main
from gptsmith.serving.http import UvicornServer, listen, url
from gptsmith.tokenizers import byte_tokenizer
from tests.advice import refusal
from tests.conftest import TINY, scrambled, until
from tests.serving.running import refuses

LIMIT = 6000  # tokens of context: seconds of writing
FOREVER = {"prompt": "a", "max_tokens": LIMIT, "logit_bias": {"256": -100}, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "my-toy"
    config = GPTConfig(**(TINY | {"vocab_size": 257, "context_length": LIMIT}))
    save(scrambled(config), byte_tokenizer(), path)
    return path


@contextmanager
def started(folder: Path, *flags: str) -> Iterator[tuple[Any, str]]:
    """The command in a process of its own, once it is ready, and the line that says so."""
    words = [sys.executable, "-m", "gptsmith", "serve", str(folder), "--port", "0"]
    words += ["--threads", "1", *flags]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        try:
            lines = iter(process.stderr.readline, "")
            yield process, next((line for line in lines if not line.startswith("note: ")), "")
        finally:
            process.kill()


@pytest.mark.slow
def test_it_says_where_it_is_and_finishes_what_is_begun(folder: Path) -> None:
    with started(folder, "--drain", "500") as (process, ready):
        found = re.fullmatch(
            r"serving my-toy at (http://127\.0\.0\.1:\d+)  "
            r"\(64 slots of 6,000 tokens: 0\.07 GB; page: /, docs: /docs; Ctrl-C ends\)\n",
            ready,
        )
        assert found, ready
        address = found[1]
        assert httpx2.get(f"{address}/health").json()["model"] == "my-toy"
        body = FOREVER | {"model": str(folder), "max_tokens": 2000}
        with httpx2.stream("POST", f"{address}/v1/completions", json=body, timeout=120) as answer:
            lines = (line for line in answer.iter_lines() if line)
            first = json.loads(next(lines).removeprefix("data: "))
            assert first["choices"][0]["finish_reason"] is None
            process.send_signal(signal.SIGTERM)
            until(lambda: refuses(address))  # nobody new comes in
            *_, last, done = lines
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        assert process.wait(500) == 0
        said = process.stderr.read().splitlines()
        assert '"GET /health" 200' in said[0]
        assert said[1] == "finishing open requests, for at most 500 s; Ctrl-C stops at once"
        assert '"POST /v1/completions" 200' in said[2]
        assert len(said) == 3, said


@pytest.mark.slow
def test_it_ends_at_once_at_a_second_signal_and_gives_up_after_a_while(folder: Path) -> None:
    for flags, signals, status in (
        ((), [signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT),
        (("--drain", "1", "--no-log-requests"), [signal.SIGINT], 0),
    ):
        with started(folder, *flags) as (process, ready):
            address = re.search(r"http\S+", ready)[0]
            body = FOREVER | {"model": "my-toy"}
            with httpx2.stream("POST", f"{address}/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                for number in signals:
                    process.send_signal(number)
                    until(partial(refuses, address))
                # Long before the 30 s that a first signal alone may take; the text is cut short.
                assert process.wait(20) == status
                if status:
                    with pytest.raises(httpx2.RemoteProtocolError):
                        list(lines)
                else:
                    assert "the server is stopping: retry" in list(lines)[-2]


def test_a_port_that_is_taken_is_said_before_anything_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 2
    assert capsys.readouterr().err == (
        f"gptsmith: port {port} of 127.0.0.1 is taken: choose another --port, or 0 for a free one\n"
    )


def over(path: Path) -> httpx2.Client:
    """A client that asks a Unix domain socket."""
    return httpx2.Client(transport=httpx2.HTTPTransport(uds=str(path)), base_url="http://x")


@pytest.mark.system("posix", "listens at a path")
@pytest.mark.slow
def test_a_unix_socket_is_for_its_owner_and_goes_with_the_server(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as short:  # a socket's path has at most 107 bytes
        path = Path(short) / "s.sock"
        flags = ("--unix-socket", str(path), "--allow-origin", "http://a", "--allow-origin", "*")
        with started(folder, *flags) as (process, ready):
            assert ready.startswith(f"serving my-toy at unix:{path}  (64 slots of")
            assert stat.filemode(path.stat().st_mode) == "srw-------"
            with over(path) as http:
                asked = openai.OpenAI(base_url="http://x/v1", api_key="any", http_client=http)
                found = asked.completions.create(
                    model="my-toy", prompt="a", max_tokens=2, extra_body={"ignore_eos": True}
                )
                assert found.usage.completion_tokens == 2
                answer = http.get("/health", headers={"origin": "http://b"})
                assert answer.headers["access-control-allow-origin"] == "*"
            # Another one is told so; the killed one leaves its path, which the next one takes.
            assert main(["serve", str(folder), "--unix-socket", str(path)]) == 2
            process.kill()
            process.wait(120)
            assert path.is_socket()
        with started(folder, *flags) as (process, _):
            with over(path) as http:
                assert http.get("/health").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 0
            assert not path.exists()
            assert '- "GET /health" 200' in process.stderr.read()


@pytest.mark.system("posix", "listens at a path")
def test_a_file_that_is_no_socket_is_left_alone(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    assert main(["serve", str(folder), "--unix-socket", str(path)]) == 2
    assert capsys.readouterr().err == (
        f"gptsmith: cannot listen at {path}: it is not a socket; choose another path\n"
    )
    assert path.read_text() == "mine"


@pytest.mark.system("posix", "listens at a path")
def test_a_socket_of_a_server_that_could_not_begin_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert main(["serve", str(tmp_path / "none"), "--unix-socket", str(path)]) == 2
    assert not path.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "65536"], "--port is 65536: at least 0 and below 65536 is needed"),
        (["--slots", "0"], "--slots is 0: at least 1 is needed"),
        (["--timeout", "0"], "--timeout is 0.0: above 0 is needed"),
        (["--name", ""], "--name is empty: requests need a name for the model"),
        (["--host", "256.1.1.1.1"], "no host '256.1.1.1.1': a name or address of this machine"),
        (["--host", "192.0.2.1"], "192.0.2.1, port 8000, cannot be used: "),
        (["--compile", "perhaps"], "--compile is 'perhaps': one of auto, yes, no is needed"),
        (["--allow-origin", "example.org"], "--allow-origin is 'example.org': a scheme and a host"),
        (["--allow-origin", "https://x/"], "--allow-origin is 'https://x/': a scheme and a host"),
        (["--unix-socket", "/"], "cannot listen at /: it is not a socket; choose another path"),
        (["--unix-socket", "/no/x"], "cannot listen at /no/x: No such file or directory; choose"),
        (["--unix-socket", "x" * 200], "cannot listen at xxxx"),
        (["--api-key", "two words", "--port", "0"], "the API key is empty or contains spaces"),
        (["--api-key", "", "--port", "0"], "the API key is empty or contains spaces"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_a_line(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["serve", str(folder), *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gptsmith: {message}")
    assert said.count("\n") == 1


def test_a_model_without_a_tokenizer_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(scrambled(GPTConfig(**TINY)), None, tmp_path / "mute")
    assert main(["serve", str(tmp_path / "mute"), "--port", "0"]) == 2
    assert "mute has no tokenizer.json, which generating text needs" in capsys.readouterr().err


def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        command, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name)
    )
    assert main(["serve", "anything"]) == 2
    assert capsys.readouterr().err == (
        "gptsmith: serving needs uvicorn, an extra: pip install 'gptsmith[serve]'\n"
    )


def test_an_address_is_written_as_a_browser_takes_it() -> None:
    with listen("localhost", 0) as bound:
        assert re.fullmatch(r"http://(127\.0\.0\.1|\[::1\]):\d+", url(bound))
    with listen("::1", 0) as bound:
        assert re.fullmatch(r"http://\[::1\]:\d+", url(bound))


@pytest.mark.parametrize(("host", "key", "noted"), [("0.0.0.0", "", True), ("0.0.0.0", "k", False)])
def test_a_model_that_anybody_may_use_is_noted(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host: str,
    key: str,
    noted: bool,
) -> None:
    monkeypatch.setenv("GPTSMITH_API_KEY", key)
    guards = []
    monkeypatch.setattr(UvicornServer, "run", lambda self, sockets: guards.append(self.config.app))
    assert main(["serve", str(folder), "--host", host, "--port", "0"]) == 0
    assert ("can use the model: set GPTSMITH_API_KEY" in capsys.readouterr().err) is noted
    assert guards[0].key == (key.encode() or None)


# -- what is advised


@contextmanager
def answering(model: Path, *flags: str) -> Iterator[tuple[UvicornServer, httpx2.Client]]:
    """The command in a thread of the test, once it is ready, and a client of it."""
    told = SimpleQueue[Any]()

    class Told(UvicornServer):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            told.put((self, url((sockets or [])[0])))

    words = ["serve", str(model), "--threads", "1", "--compile", "no", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptsmith.serving.http.UvicornServer", Told)
        thread = Thread(target=lambda: told.put(main(words)))
        thread.start()
        found = told.get(timeout=120)
    assert not isinstance(found, int), f"refused: {words}"
    server, address = found
    unix = address.removeprefix("unix:")
    try:
        with httpx2.Client(base_url=address) if unix == address else over(Path(unix)) as client:
            yield server, client
    finally:
        server.should_exit = True
        thread.join(120)
    assert told.get(timeout=120) == 0


def check_answers(client: httpx2.Client, key: str = "", name: str = "my-toy") -> None:
    """It writes, for whoever has the key."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": name, "prompt": "a", "max_tokens": 2}
    found = client.post("/v1/completions", json=body, headers=headers)
    assert found.status_code == 200, found.text
    assert found.json()["usage"]["prompt_tokens"] == 1


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as other:
        return str(other.getsockname()[1])


@pytest.mark.parametrize(
    ("flags", "message", "cures"),
    [
        ("--port TAKEN", "choose another --port, or 0 for a free one", ["--port FREE", "--port 0"]),
        ("--port 65536", "at least 0 and below 65536 is needed", ["--port FREE"]),
        ("--host 256.1.1.1.1 --port 0", "address of this machine is needed, as 127.0.0.1",
         ["--host 127.0.0.1 --port 0", "--host localhost --port 0"]),
        ("--host 192.0.2.1 --port 0", "choose another --host or --port", ["--port 0"]),
        ("--unix-socket FILE", "choose another path", ["--unix-socket NEW"]),
        ("--unix-socket /no/x", "choose another path", ["--unix-socket NEW"]),
        (f"--unix-socket {'x' * 200}", "choose another path", ["--unix-socket NEW"]),
        ("--api-key '' --port 0", "give one word, or no key", ["--api-key w --port 0", "--port 0"]),
        ("--api-key 'a b' --port 0", "give one word, or no key", ["--api-key a_b --port 0"]),
        ("--name '' --port 0", "requests need a name for the model", ["--name my-toy --port 0"]),
        ("--slots 0 --port 0", "at least 1 is needed", ["--slots 1 --port 0"]),
        ("--slots 9 --port 0", "choose fewer slots", ["--slots 3 --port 0"]),
    ],
)  # fmt: skip
def test_what_is_advised_for_a_server_works(
    flags: str,
    message: str,
    cures: list[str],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The server begins, and answers."""
    if "choose fewer" in message:  # 1.1 MB each
        monkeypatch.setattr("gptsmith.serving.worker.available_memory", lambda device: 5_000_000)
    (tmp_path / "file").touch()
    with (
        tempfile.TemporaryDirectory() as short,  # a socket's path has at most 107 bytes
        socket.create_server(("127.0.0.1", 0)) as other,
    ):
        places = {"TAKEN": str(other.getsockname()[1]), "FILE": str(tmp_path / "file")}
        places |= {"FREE": free_port(), "NEW": f"{short}/s"}

        def words(line: str) -> list[str]:
            return [places.get(word, word) for word in shlex.split(line)]

        assert message in refusal(["serve", str(folder), *words(flags)], capsys)
        for cure in cures:
            line = words(cure)
            key = line[1] if line[0] == "--api-key" else ""
            with answering(folder, *line) as (_, client):
                check_answers(client, key)


@pytest.mark.system("posix", "listens at a path")
def test_another_path_than_that_of_a_running_server(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tempfile.TemporaryDirectory() as short:
        line = ["serve", str(folder), "--unix-socket", f"{short}/a"]
        with answering(folder, *line[2:]) as (_, one):
            assert "listens there; choose another path" in refusal(line, capsys)
            with answering(folder, "--unix-socket", f"{short}/b") as (_, two):
                check_answers(two)
            check_answers(one)


def test_the_key_that_is_advised_is_needed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the variable that the note names, and in the header that the refusal names."""
    with monkeypatch.context() as patch:
        patch.setattr(UvicornServer, "run", lambda self, sockets: None)
        assert main(["serve", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 0
    name = re.search(r"set (GPTSMITH_\w+)", capsys.readouterr().err)
    assert name
    monkeypatch.setenv(name[1], "secret")
    with answering(folder, "--port", "0") as (_, client):
        for headers in ({}, {"Authorization": "secret"}, {"Authorization": "Basic secret"}):
            found = client.get("/v1/models", headers=headers)
            assert found.status_code == 401
            said = re.search("send the header '(.*): (.*)'", found.json()["error"]["message"])
            assert said, found.text
            cure = {said[1]: said[2].replace("KEY", "secret")}
            assert client.get("/v1/models", headers=cure).status_code == 200
        check_answers(client, "secret")


def test_the_origin_that_is_advised_may_ask(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["serve", str(folder), "--allow-origin", "example.org"]
    said = re.search(r"as (\S+), or (\S)$", refusal(line, capsys))
    assert said
    origin, anybody = said.groups()
    for allowed in (origin, anybody):
        with answering(folder, "--port", "0", "--allow-origin", allowed) as (_, client):
            found = client.get("/health", headers={"origin": origin})
            assert found.headers["access-control-allow-origin"] == allowed


def test_a_tokenizer_that_is_added_is_enough(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mute = tmp_path / "my-toy"
    save(scrambled(GPTConfig(**(TINY | {"vocab_size": 257}))), None, mute)
    said = refusal(["serve", str(mute), "--port", "0"], capsys)
    assert "has no tokenizer.json, which generating text needs: add one" in said
    (mute / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with answering(mute, "--port", "0") as (_, client):
        check_answers(client)


@pytest.mark.slow
def test_who_is_told_to_retry_in_a_moment_is_answered_by_the_next_server(folder: Path) -> None:
    port = free_port()
    body = FOREVER | {"model": "my-toy"}
    with (
        answering(folder, "--port", port, "--drain", "1") as (server, client),
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        server.should_exit = True
        assert "the server is stopping: retry in a moment" in list(lines)[-2]
    with answering(folder, "--port", port) as (_, client):
        check_answers(client)

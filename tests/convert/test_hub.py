"""Published weights: from the cache, or by the real client from a server on this machine."""

import contextlib
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.convert import hub
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import TINY, scrambled

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROOT = Path(gptsmith.__file__).parent.parent
MODEL = scrambled(GPTConfig(**(TINY | {"vocab_size": 257})))

FETCH = """
import sys, time, types
time.sleep = lambda seconds: None  # between attempts
# The room without its __init__, which imports PyTorch: two seconds that nothing here needs.
sys.modules["gptsmith.convert"] = room = types.ModuleType("gptsmith.convert")
import gptsmith
room.__path__ = [f"{gptsmith.__path__[0]}/convert"]
from gptsmith.convert.hub import fetch_published
try:
    print(fetch_published(sys.argv[1]))
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A toy as the published repositories are: what is needed, and what is not."""
    folder = tmp_path_factory.mktemp("toy") / "model"
    gptsmith.save(MODEL, byte_tokenizer(), folder)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    del found["manifest.json"]
    return found | dict.fromkeys(("pytorch_model.bin", "tf_model.h5", "README.md"), b"not this")


def put_into_cache(cache: Path, repository: str, files: dict[str, bytes]) -> Path:
    """A repository in the layout of huggingface_hub's cache; its snapshot."""
    place = cache / f"models--{repository.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (place / "refs", place / "blobs", snapshot):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for name, data in files.items():
        blob = place / "blobs" / hashlib.sha256(data).hexdigest()
        blob.write_bytes(data)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


class Hub:
    """A server of one repository, with the few routes that the client asks for.

    `spoil` may change what is sent of a file: (name, data) -> (status, headers, body).
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked = list[str]()
        self.agents = set[str]()
        self.spoil: Callable[[str, bytes], tuple[int, dict[str, str], bytes] | None] | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                outer.answer(self)

            def do_GET(self) -> None:
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(f"{request.command} {path}")
        self.agents.add(request.headers.get("User-Agent", ""))
        route = re.fullmatch(rf"/openai-community/gpt2/resolve/(?:main|{COMMIT})/(\S+)", path)
        if path == "/api/models/openai-community/gpt2":
            body = json.dumps({"id": "openai-community/gpt2", "sha": COMMIT}).encode()
            status, headers = 200, {"Content-Type": "application/json"}
        elif route and route[1] in self.files:
            body = self.files[route[1]]
            headers = {
                "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Content-Disposition": f'inline; filename="{route[1]}"',
            }
            status = 200
            if self.spoil and request.command == "GET":
                status, more, body = self.spoil(route[1], body) or (status, {}, body)
                headers |= more
        else:
            body, status = b"", 404
            headers = {"X-Error-Code": "EntryNotFound" if route else "RepoNotFound"}
        request.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)
        if int(headers.get("Content-Length", len(body))) != len(body):
            request.close_connection = True  # what was promised never comes

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub(files)
    yield server
    if server.thread.is_alive():
        server.stop()


def environment(home: Path, server: Hub | None, **more: str) -> dict[str, str]:
    """What a process sees: a cache of its own, and a server here or none at all."""
    address = "http://127.0.0.1:9" if server is None else server.address
    kept = {name: os.environ[name] for name in ("PATH",) if name in os.environ}
    ours = {"PYTHONPATH": str(ROOT), "HF_HOME": str(home), "HF_ENDPOINT": address}
    return kept | ours | more


def fetch(home: Path, server: Hub | None, name: str = "gpt2", **more: str) -> tuple[str, str]:
    """What a process says that fetches a model: to standard output, and to standard error."""
    done = subprocess.run(
        [sys.executable, "-c", FETCH, name],
        capture_output=True,
        text=True,
        env=environment(home, server, **more),
        timeout=300,
    )
    assert (done.returncode == 0) == bool(done.stdout)
    return done.stdout.strip(), done.stderr


def is_our_model(folder: str) -> bool:
    model, tokenizer = gptsmith.load(folder)
    assert tokenizer is not None
    assert tokenizer.fingerprint == byte_tokenizer().fingerprint
    ours = MODEL.state_dict()
    return all(torch.equal(ours[name], tensor) for name, tensor in model.state_dict().items())


# -- from the cache


@pytest.mark.parametrize("repository", ["openai-community/gpt2", "gpt2"])
def test_the_cache_is_enough(
    repository: str, files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    """Also under the name that the repository had at first; nobody is asked."""
    snapshot = put_into_cache(tmp_path / "hub", repository, files)
    found, said = fetch(tmp_path, server)
    assert (found, said, server.asked) == (str(snapshot), "", [])
    assert is_our_model(found)


def test_another_place_for_the_cache_is_respected(files: dict[str, bytes], tmp_path: Path) -> None:
    snapshot = put_into_cache(tmp_path / "elsewhere", "openai-community/gpt2-xl", files)
    more = {"HF_HUB_CACHE": str(tmp_path / "elsewhere"), "HF_HUB_OFFLINE": "1"}
    assert fetch(tmp_path / "home", None, "gpt2-xl", **more) == (str(snapshot), "")


def test_a_cache_that_lacks_a_file_is_completed(
    files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    few = {name: data for name, data in files.items() if name != "model.safetensors"}
    put_into_cache(tmp_path / "hub", "openai-community/gpt2", few)
    found, said = fetch(tmp_path, server)
    assert said == ""
    assert is_our_model(found)
    assert [line for line in server.asked if line.startswith("GET /openai")] == [
        f"GET /openai-community/gpt2/resolve/{COMMIT}/model.safetensors"
    ]


def test_other_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match="gpt3 is not a published GPT-2: use one of gpt2, gpt2-medium"
    ):
        hub.fetch_published("gpt3")


def test_without_the_library_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError) as caught:
        hub.fetch_published("gpt2")
    assert str(caught.value) == (
        "downloading gpt2 needs huggingface_hub: pip install 'gptsmith[hub]', or put its "
        "config.json, tokenizer.json and model.safetensors into a folder and import that"
    )


# -- by the real client


@pytest.mark.slow
def test_what_is_needed_is_downloaded_and_nothing_else(
    files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    found, said = fetch(tmp_path, server)
    assert said == ""  # where nobody looks, there is no bar
    assert {path.name for path in Path(found).iterdir()} == set(hub.FILES)
    assert is_our_model(found)
    assert server.asked == [
        "GET /api/models/openai-community/gpt2",
        *(
            f"{verb} /openai-community/gpt2/resolve/{version}/{name}"
            for version, name in zip(("main", COMMIT, COMMIT), hub.FILES, strict=True)
            for verb in ("HEAD", "GET")
        ),
    ]
    before = len(server.asked)
    server.stop()
    assert fetch(tmp_path, server) == (found, "")  # from now on without a network
    assert len(server.asked) == before


def test_nothing_is_told_about_the_user(server: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, server)
    assert server.agents
    for agent in server.agents:
        assert re.fullmatch(r"unknown/None; hf_hub/[\d.]+; python/[\d.]+", agent), agent


@pytest.mark.system("posix", "opens a pseudo-terminal")
def test_progress_is_shown_on_a_terminal(server: Hub, tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # rows, columns
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, "gpt2"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=environment(tmp_path, server),
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # as Linux ends a terminal that nobody writes to
        while part := os.read(main, 1 << 16):
            shown += part
    os.close(main)
    folder, _ = process.communicate()
    assert is_our_model(folder.decode().strip())
    assert re.search(r"model\.safetensors: 100%\|.*B/s\]", shown.decode())


# -- when it does not work

HOW = r"try again, or put its config.json, tokenizer.json and model.safetensors into a folder and "


def assert_one_line(said: str, reason: str) -> None:
    assert re.fullmatch(
        rf"OSError: gpt2 could not be downloaded \({reason}\): {HOW}import that\n", said
    ), said


def test_without_a_network_one_line_comes_at_once(tmp_path: Path) -> None:
    begin = time.perf_counter()
    found, said = fetch(tmp_path, None)
    assert time.perf_counter() - begin < 20  # the client alone would try for 23 s, and say so
    assert found == ""
    assert_one_line(said, r".*Connection refused")


def test_offline_nobody_is_asked(server: Hub, tmp_path: Path) -> None:
    found, said = fetch(tmp_path, server, HF_HUB_OFFLINE="1")
    assert found == ""
    assert_one_line(said, r"Cannot reach \S+: offline mode is enabled.*HF_HUB_OFFLINE.*")
    assert server.asked == []


def cut_short(name: str, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """Half of the weights, and the promise of the rest."""
    if name != "model.safetensors":
        return None
    return 200, {"Content-Length": str(len(data))}, data[: len(data) // 2]


def smaller(name: str, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """Half of the weights, as if that were all."""
    return (200, {}, data[: len(data) // 2]) if name == "model.safetensors" else None


def failing(name: str, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
    """A server that has had enough."""
    return (500, {}, b"") if name == "model.safetensors" else None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (smaller, r"Consistency check failed: file should be of size \d+ but has size \d+ .*"),
        (cut_short, r"peer closed connection .*received \d+ bytes, expected \d+.*"),
        (failing, r".*\b500\b.*"),
    ],
)
def test_a_broken_download_is_said_and_begins_anew(
    spoil: Callable, reason: str, server: Hub, tmp_path: Path
) -> None:
    server.spoil = spoil
    found, said = fetch(tmp_path, server)
    assert found == ""
    assert_one_line(said, reason)
    assert not list(tmp_path.rglob("model.safetensors"))
    server.spoil = None
    found, said = fetch(tmp_path, server)
    assert said == ""
    assert is_our_model(found)


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle(
    files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    def die(name: str, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
        if name == "model.safetensors":
            server.server.socket.close()  # nobody is let in any more
        return cut_short(name, data)

    server.spoil = die
    found, said = fetch(tmp_path, server)
    assert found == ""
    assert_one_line(said, ".*")
    assert not list(tmp_path.rglob("model.safetensors"))
    again = Hub(files)
    try:
        found, said = fetch(tmp_path, again)
    finally:
        again.stop()
    assert said == ""
    assert is_our_model(found)


@pytest.mark.slow
def test_a_repository_or_a_file_that_is_not_there(server: Hub, tmp_path: Path) -> None:
    found, said = fetch(tmp_path, server, "gpt2-xl")
    assert found == ""
    assert re.match(r"OSError: gpt2-xl could not be downloaded \(.*\b404\b.*\n\Z", said)
    server.files = {name: data for name, data in server.files.items() if name != hub.FILES[-1]}
    found, said = fetch(tmp_path, server)
    assert found == ""
    assert_one_line(said, r".*\b404\b.*")


@pytest.mark.slow
def test_a_killed_download_is_not_mistaken_for_a_whole_one(
    files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    began, killed = threading.Event(), threading.Event()

    def stall(name: str, data: bytes) -> tuple[int, dict[str, str], bytes] | None:
        if name == "model.safetensors":
            began.set()
            killed.wait(300)
        return None

    server.spoil = stall
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH, "gpt2"], env=environment(tmp_path, server)
    )
    assert began.wait(300)
    process.kill()
    process.wait()
    killed.set()
    server.spoil = None
    found, said = fetch(tmp_path, server)
    assert said == ""
    assert is_our_model(found)


# -- what is advised


@pytest.mark.slow
def test_what_is_advised_after_a_failed_download_works(
    files: dict[str, bytes], server: Hub, tmp_path: Path
) -> None:
    """Trying again imports the model, and so does a folder with the files that the line names."""

    def imported(source: str, out: str, address: Hub | None) -> str:
        words = [sys.executable, "-m", "gptsmith", "import", source, out]
        home = environment(tmp_path / "home", address)
        done = subprocess.run(words, cwd=tmp_path, env=home, capture_output=True, text=True)
        assert done.returncode == (0 if (tmp_path / out).exists() else 2), done.stderr
        return done.stderr

    server.files = {}
    said = imported("gpt2", "out", server)
    assert re.fullmatch(rf"gptsmith: gpt2 could not be downloaded \(.*\): {HOW}import that\n", said)
    server.files = files
    assert "could not" not in imported("gpt2", "again", server)
    by_hand = tmp_path / "by hand"
    by_hand.mkdir()
    named = re.search("put its (.*) into a folder", said)
    assert named
    for name in re.split(", | and ", named[1]):
        (by_hand / name).write_bytes(files[name])
    server.stop()
    imported("by hand", "whole", None)
    for out in ("again", "whole"):
        assert is_our_model(str(tmp_path / out))

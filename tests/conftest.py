"""What several tests need: small models with every dimension different, and a deaf network."""

import contextlib
import io
import logging
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from gptsmith import GPT, GPTConfig
from gptsmith.cli.main import main
from gptsmith.machine import environment
from tests.forking import Forking, forking
from tests.versions import Ask, asking

# A loaded machine takes its time for an example, and for making one up.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TINY: dict[str, Any] = {
    "vocab_size": 37,
    "context_length": 11,
    "n_layer": 2,
    "n_head": 3,
    "n_embd": 12,
}
# Flags of a run that takes a fraction of a second.
TOY = (
    "--tokenizer char --n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --steps 1 "
    "--warmup-steps 0 --batch-tokens 32 --threads 1 --dtype float32 --sample-tokens 2"
)

# Of Chromium: nothing that asks other machines.
BROWSER_FLAGS = "no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
BROWSER_FLAGS += " disable-component-update disable-sync"


# Fixtures that fork processes, or open a pseudo-terminal, which Windows cannot.
FORKING = {"trainers", "in_processes", "ask", "scenarios", "terminal"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Elsewhere than on Linux, leave out the tests that need what the system has not, and say why:
    those with a marker `system`, or with a fixture that forks."""
    lacks = {"linux": sys.platform != "linux", "posix": os.name != "posix"}
    for item in items:
        needs = [mark.args for mark in item.iter_markers("system")]
        if FORKING & {*getattr(item, "fixturenames", ())}:
            needs.append(("posix", "forks processes or opens a terminal"))
        for system, reason in needs:
            if lacks[system]:
                item.add_marker(pytest.mark.skip(reason=f"not on {sys.platform}: it {reason}"))


# A machine may set it, and output would not be kept back as it is for users.
os.environ.pop("PYTHONUNBUFFERED", None)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the world fails the test; two processes of a test may still talk."""
    connect = socket.socket.connect

    def only_here(self: socket.socket, address: Any) -> Any:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    """Wait for it to hold. The limit only says when to give up: a loaded machine takes its time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not happen in {seconds} s"
        time.sleep(0.002)


def processor_seconds() -> float:
    """Processor time of this process and of its children that have ended: what a promise of speed
    is held by, because other work on the machine does not add to it."""
    return sum(os.times()[:4])


@pytest.fixture(autouse=True, scope="session")
def no_flush() -> Iterator[None]:
    """What tests write need not outlive the machine, and a busy disk takes its time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_core() -> Iterator[None]:
    """Commands run in one thread where they choose: toy tensors gain nothing from more, and would
    wait for cores that other tests use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "cores", lambda: 1)
        yield


@contextmanager
def single_thread() -> Iterator[None]:
    """One for PyTorch: toy tensors gain nothing from more, and wait for cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread() -> Iterator[None]:
    with single_thread():
        yield


TRAINS = (
    "gptsmith.cli.train gptsmith.cli.finetune gptsmith.finetuning.finetune matplotlib.figure "
    "torch.distributed.fsdp"
)
COMMAND = "import sys; from gptsmith.cli.main import main; sys.exit(main(sys.argv[1:]))"
Together = Callable[..., None]


@pytest.fixture(scope="session")
def trainers() -> Iterator[Forking]:
    """Starts processes that have imported what `gptsmith train` and `gptsmith finetune` do."""
    with forking(*TRAINS.split(), **{**os.environ, "OMP_NUM_THREADS": "1"}) as program:
        yield program


@pytest.fixture
def in_processes(trainers: Forking) -> Together:
    """Runs `gptsmith`, or other code, in several processes in the current folder, which find each
    other by the environment variables that torchrun sets; all must succeed."""

    def run(processes: int, *words: str, code: str = COMMAND) -> None:
        with socket.socket() as held:  # so that nobody else is given the port
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            held.bind(("127.0.0.1", 0))
            shared = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(held.getsockname()[1])}
            ranks = [shared | {"RANK": n, "LOCAL_RANK": n} for n in map(str, range(processes))]
            for done in trainers.together(code, *words, folder=Path(), environments=ranks):
                assert done.returncode == 0, done.stderr[-2000:]

    return run


@pytest.fixture(scope="session")
def ask() -> Iterator[Ask]:
    """Runs code with the transformers of today, "5", or with the older one, "4.57"."""
    with asking() as run:
        yield run


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, so that the step is compiled once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture
def own_cache(compiled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled goes there, and not to the cache of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(compiled_folder))


def scrambled(config: GPTConfig, seed: int = 0) -> GPT:
    """A model whose weights are all random and large, biases and norms too, so that every part
    matters; in evaluation mode."""
    model = GPT(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.fixture(scope="session")
def made_toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and a run on it of a step: what commands are tried on."""
    place = tmp_path_factory.mktemp("toys")
    text = "".join(f"Line {i}: the quick brown fox met {i * i} dogs.\n" for i in range(60))
    (place / "text.txt").write_text(text)
    words = f"train {place}/text.txt {TOY} --out {place}/run".split()
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(words) == 0, said.getvalue()
    return place


@pytest.fixture
def toys(made_toys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the toys, which is the current folder."""
    shutil.copytree(made_toys, tmp_path / "toys")
    monkeypatch.chdir(tmp_path / "toys")
    return tmp_path / "toys"


def some_tokens(batch: int = 2, length: int = 5, vocab_size: int = 37) -> torch.Tensor:
    """Random ids, always the same."""
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What transformers and Python warned of."""
    import transformers

    transformers.utils.logging.enable_propagation()
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """The Chromium that is installed, which the pages are tested in."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("the page is tested in a browser: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("the page is tested in a browser: no chromium and no google-chrome on the PATH")
    with sync_playwright() as playwright:
        flags = [f"--{flag}" for flag in BROWSER_FLAGS.split()]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        yield browser
        browser.close()

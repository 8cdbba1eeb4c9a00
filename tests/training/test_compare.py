"""`gptsmith compare`: what differs, what became of each run, and means that SciPy agrees with."""

import csv
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from scipy import stats

from gptsmith.cli.main import main
from gptsmith.config.recipe import run_settings, to_toml
from gptsmith.training.compare import short_ends

STEPS = 10


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `gptsmith compare` prints."""

    def compare(*words: str) -> str:
        capsys.readouterr()
        assert main(["compare", *words]) == 0
        return capsys.readouterr().out

    return compare


def make(name: str, losses: list[float | None], *, steps: int = STEPS, **choices: Any) -> Path:
    """A run of batches of 64 tokens and 0.25 s a step, of which every fifth is evaluated."""
    settings, _ = run_settings("shakespeare", {"batch_tokens": 64, "steps": STEPS, **choices})
    folder = Path(name)
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(settings))
    lines = []
    for step in range(1, steps + 1):
        record: dict[str, Any] = {"step": step, "loss": 3.0 - step / 10}
        record |= {"tokens": 64 * step, "seconds": step / 4}
        if step % 5 == 0:
            loss = losses[step // 5 - 1]
            record |= {"validation_loss": loss, "bits_per_byte": loss and loss / 2}
        lines.append(json.dumps(record) + "\n")
    if lines:
        (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def rows_of(text: str) -> list[list[str]]:
    """The lines of a table, cut where two spaces are."""
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines() if line]


def test_only_what_differs_is_a_column_and_the_best_is_first(shown: Any) -> None:
    make("a", [2.0, 1.9], learning_rate=1e-3, micro_batch=4)
    make("b", [1.5, 1.75], learning_rate=3e-4, micro_batch=8)  # which changes nothing
    head, *rows = rows_of(shown("a", "b"))
    titles = ["run", "learning_rate", "best loss", "at step", "last loss", "bits/byte"]
    assert head == [*titles, "tokens", "seconds", "tokens/s", "state"]
    same = ["640", "2.5", "256", "finished"]
    assert rows == [
        ["b", "0.0003", "1.5000", "5", "1.7500", "0.7500", *same],
        ["a", "0.001", "1.9000", "10", "1.9000", "0.9500", *same],
    ]
    assert [row[0] for row in rows_of(shown("a", "b", "--sort", "name"))[1:]] == ["a", "b"]
    assert rows_of(shown("b", "a", "--sort", "learning_rate"))[1][0] == "b"


def test_means_over_seeds_are_those_of_scipy(shown: Any) -> None:
    losses = {1e-3: [1.91, 1.83, 1.97, 1.88], 3e-3: [1.71, 1.74, 1.75]}
    for rate, found in losses.items():
        for seed, loss in enumerate(found):
            make(f"runs/{rate}-{seed}", [2.5, loss], learning_rate=rate, seed=seed)
    make("runs/again", [2.5, 1.71], learning_rate=3e-3, seed=0)  # the same run: it adds nothing
    make("runs/half", [2.5], steps=7, learning_rate=3e-3, seed=9)
    found = json.loads(shown("runs", "--json"))
    assert found["differing"] == ["learning_rate", "seed"]
    for group in found["groups"]:
        values = losses[group["settings"]["learning_rate"]]
        error = stats.sem(values)
        expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), error)
        assert group["seeds"] == len(values)
        assert group["best_loss"]["mean"] == pytest.approx(np.mean(values))
        assert group["best_loss"]["interval"] == pytest.approx(expected, rel=1e-6)
        assert group["bits_per_byte"]["mean"] == pytest.approx(np.mean(values) / 2)
    table = shown("runs").partition("Means over seeds")[2].partition("\n")[2]
    half = stats.t.ppf(0.975, 2) * stats.sem(losses[3e-3])
    assert rows_of(table)[1][:3] == ["0.003", "3 of 5", f"1.7333 ± {half:.4f}"]
    assert "1 of 9 runs did not finish; no mean includes them" in table


def test_what_became_of_each_run(shown: Any) -> None:
    make("done", [2.0, 1.9], seed=1)
    make("stopped", [2.0], steps=7, seed=2)
    make("waiting", [], steps=0, seed=3)
    failed = make("failed", [None], steps=6, seed=4)
    event = {"event": "failed", "step": 6, "error": "step 6: the loss was not finite"}
    (failed / "events.jsonl").write_text('{"event": "started"}\n' + json.dumps(event) + '\n{"ev')
    going = make("going", [2.0], steps=8, seed=5)
    with FileLock(going / ".lock"):
        states = {row[0]: row[-1] for row in rows_of(shown(*"done stopped waiting failed".split()))}
        found = json.loads(shown("going", "failed", "--json"))["runs"]
    assert states["done"] == "finished"
    assert states["stopped"] == "stopped at step 7 of 10"
    assert states["waiting"] == "waiting"
    assert states["failed"] == "failed at step 6 of 10: step 6: the loss was not finite"
    assert [run["state"] for run in found] == ["running", "failed"]
    assert (found[1]["last_loss"], found[1]["best_loss"]) == (None, None)
    assert "not finite" in shown("failed")


def test_a_run_that_learns_labels_and_an_older_one(shown: Any) -> None:
    old = make("old", [2.0, 1.9])
    lines = [json.dumps({"step": n, "loss": 2.5}) + "\n" for n in range(1, STEPS + 1)]
    (old / "metrics.jsonl").write_text("".join(lines))
    (old / "config.toml").write_text("[training]\nsteps = 10\nbatch_tokens = 64\n")
    labels = make("labels", [0.5, 0.4], task="classify", batch_tokens=64)
    records = [json.loads(line) for line in (labels / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"validation_accuracy": 0.75} if "validation_loss" in record else {}
        record.pop("bits_per_byte", None)
    (labels / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = shown("old", "labels")
    head, first, second, *_ = rows_of(text)
    one, other = (dict(zip(head, row, strict=True)) for row in (first, second))
    assert (one["run"], one["accuracy"], one["best loss"]) == ("labels", "75.0%", "0.4000")
    assert (other["best loss"], other["tokens"], other["seconds"]) == ("-", "640", "-")
    assert other["training"] == "2.5000"  # shown as a run has no validation loss
    assert "Losses of different tasks have different units" in text


class Cells(HTMLParser):
    """The cells of every row of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.inside = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.inside = tag in ("th", "td")
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.rows[-1].append(data)


def test_the_files_say_the_same(shown: Any) -> None:
    for number, loss in enumerate((1.9, 1.8, 1.7)):
        make(f"runs/<b>{number}", [2.0, loss], seed=number)
    text = shown("runs", "--csv", "out.csv", "--html", "out.html")
    with Path("out.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["best_loss"] for line in lines] == ["1.7", "1.8", "1.9"]
    assert [line["seed"] for line in lines] == ["2", "1", "0"]
    assert [float(line["mean_loss"]) for line in lines] == pytest.approx([1.8] * 3)
    low, high = stats.t.interval(0.95, 2, 1.8, stats.sem([1.7, 1.8, 1.9]))
    assert float(lines[0]["interval_low"]) == pytest.approx(low)
    assert float(lines[0]["interval_high"]) == pytest.approx(high)
    page = Cells()
    page.feed(Path("out.html").read_text())
    assert page.rows == [row for row in rows_of(text) if len(row) > 1]


@pytest.mark.slow
def test_the_page_is_light_or_dark_as_the_reader_wants_it(shown: Any, browser: Any) -> None:
    """And it loads nothing, is no wider than a phone, and shows the curves, which its policy must
    allow."""
    for seed in range(2):
        make(f"runs/{seed}", [2.0, 1.9], seed=seed)
    shown("runs", "--html", "out.html")
    page = browser.new_page(viewport={"width": 390, "height": 800})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: asked.append(message.text))
    page.goto(Path("out.html").absolute().as_uri())
    desks = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        desks.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert desks == ["rgb(234, 237, 235)", "rgb(15, 18, 19)"]
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("document.querySelector('img').naturalWidth") > 0
    assert asked == [Path("out.html").absolute().as_uri()]
    page.close()


def test_short_names() -> None:
    assert short_ends(["/x/runs/a", "/x/runs/b"]) == ["a", "b"]
    assert short_ends(["/x/one/a", "/x/two/a"]) == ["one/a", "two/a"]
    assert short_ends(["/x/one/a", "/x/one/a"]) == ["a", "a"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("compare", "RUN"),
        ("compare nowhere", "nowhere is missing: a run, or a folder of runs, is needed"),
        ("compare empty", "empty has no config.toml, nor has a folder in it"),
        ("compare run --sort los", "sorted by 'los'"),
        ("compare run --csv none/out.csv", "no folder none for out.csv: create it first"),
        ("compare run --html empty", "empty is a folder: name a file in it"),
    ],
)
def test_bad_input(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    make("run", [2.0, 1.9])
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert (out, err.count("\n")) == ("", 1)

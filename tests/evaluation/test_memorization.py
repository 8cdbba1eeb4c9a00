"""What a model remembers: of sentences that it saw once, 10 and 100 times, and of none."""

import json
import random
import re
import shutil
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gptsmith
from gptsmith import GPT, GPTConfig
from gptsmith.cli.main import main
from gptsmith.config.settings import MemorizationSettings, PrepareSettings
from gptsmith.data.prepare import prepare
from gptsmith.data.shards import Dataset
from gptsmith.evaluation import contamination as contamination_module
from gptsmith.evaluation.contamination import contamination
from gptsmith.evaluation.extraction import edit_distances
from gptsmith.evaluation.memorization import (
    Memorization,
    matches_of,
    memorization,
    sample,
    with_documents,
)
from gptsmith.evaluation.memorization_page import report_page
from gptsmith.evaluation.memorization_text import report_json, report_text
from gptsmith.tokenizers import byte_tokenizer
from tests.conftest import scrambled, single_thread
from tests.data.test_overlap import Listed, array, texts
from tests.data.test_repeats import write_rows

END = 256


def sentences(seed: int, count: int) -> list[str]:
    """Of 96 characters, as many as a prompt and its continuation have."""
    draw = random.Random(seed)
    return ["".join(draw.choice("abcdefghijklmno <") for _ in range(96)) for _ in range(count)]


PLANTED = sentences(0, 23)
TIMES = [100, 10, 10, *[1] * 20]
LEARNED = [text for text, n in zip(PLANTED, TIMES, strict=True) for _ in range(n)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that learned the sentences, and their dataset, of which nothing is held out."""
    folder = tmp_path_factory.mktemp("remembers")
    rows = torch.tensor([[*text.encode(), END] for text in LEARNED])
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=257, context_length=97, n_layer=1, n_head=2, n_embd=48,
                          dropout=0.0))  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    with single_thread():
        for _ in range(220):
            batch = rows[torch.randint(len(rows), (10,), generator=draw)]
            model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1].backward()
            optimizer.step()
            optimizer.zero_grad()
    gptsmith.save(model, byte_tokenizer(), folder / "model")
    prepared(folder / "data", LEARNED)
    # Half of what is held out was learned.
    prepared(folder / "halves", [*LEARNED, *sentences(1, 7)], validation_fraction=0.1)
    return folder


def prepared(folder: Path, texts: list[str], **options: Any) -> Dataset:
    rows = write_rows(folder.with_suffix(".jsonl"), texts)
    options = {"validation_fraction": 0.0, **options}
    for _ in prepare([str(rows)], "byte", folder, options=PrepareSettings(**options)):
        pass
    return Dataset.open(folder)


def remembered(place: Path, data: Path, **settings: Any) -> Memorization:
    model, tokenizer = gptsmith.load(place / "model")
    asked = MemorizationSettings(**{"samples": 12, "sample_tokens": 90, **settings})
    with single_thread():
        return memorization(model, tokenizer, Dataset.open(data), asked)


@pytest.mark.slow
def test_what_was_seen_more_often_is_remembered_better(place: Path) -> None:
    found = remembered(place, place / "data", places=200)
    distances: dict[int, list[int]] = {}
    times = {text[64:]: n for text, n in zip(PLANTED, TIMES, strict=True)}
    for passage in found.passages:
        wanted = bytes(passage.wanted).decode()
        assert passage.occurrences == times[wanted]
        distances.setdefault(passage.occurrences, []).append(passage.distance)
    assert {n: len(each) for n, each in distances.items()} == {100: 100, 10: 20, 1: 20}
    means = {n: statistics.mean(each) for n, each in distances.items()}
    assert means[100] == 0
    assert means[100] + 4 < means[10] < means[1] - 4
    longest = found.train[-1]
    assert (longest.prompt_tokens, longest.places) == (64, 140)
    assert longest.exact == sum(p.distance == 0 for p in found.passages) >= 100
    assert found.held_out == found.reference == []
    assert found.contamination is None


@pytest.mark.slow
def test_a_model_of_another_text_remembers_nothing(place: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path / "other", sentences(2, 200), validation_fraction=0.5)
    found = remembered(place, tmp_path / "other", places=50)
    for each in (*found.train, *found.held_out):
        assert (each.places, each.exact, each.near) == (50, 0, 0)
    assert all(p.distance > 10 and p.occurrences == 1 for p in found.passages)
    assert all(sample.match.length < 9 and not sample.occurrences for sample in found.samples)
    assert all(length < 9 for length in found.reference)
    assert found.contamination
    assert found.contamination.in_grams == found.contamination.touched == 0
    assert len(data.train) == 97 * 100


def test_where_a_sample_is(tmp_path: Path) -> None:
    """In the third shard, the 21st document: up to its end, not beyond."""
    texts = sentences(3, 50)
    train = prepared(tmp_path / "data", texts, shard_tokens=1000).train
    flat = [token for text in texts for token in (*text.encode(), END)]
    drawn = np.array([[*b"zzz", *flat[2010:2060], *b"zz"]])
    matches, reference = matches_of(drawn, train, None, END)
    assert (matches, reference) == ([(26, 3, 2010)], [])
    (found,) = with_documents([sample(drawn[0], matches[0], None, train)], train, END)
    assert (found.shard, found.shard_token, found.document) == ("train_000002.bin", 10, 20)
    assert found.before == flat[1970:2010]
    assert found.after == flat[2036:2076]


@given(st.lists(texts(1, 7), min_size=2, max_size=2))
def test_edit_distances(pair: list[bytes]) -> None:
    @cache
    def distance(a: bytes, b: bytes) -> int:
        if not a or not b:
            return len(a) + len(b)
        other = distance(a[1:], b[1:]) + (a[0] != b[0])
        return min(other, 1 + distance(a[1:], b), 1 + distance(a, b[1:]))

    rows = [np.stack([array(each)] * 2) for each in pair]
    assert edit_distances(*rows).tolist() == [distance(*pair)] * 2


@given(texts(0, 200), texts(1, 100), st.booleans())
def test_contamination(train: bytes, validation: bytes, marked: bool) -> None:
    """Against Python's search in bytes; documents end with a zero, if anything marks them."""
    with patch.multiple(contamination_module, GRAM=2, STRETCH=4):
        found = contamination(Listed(train), Listed(validation), 0 if marked else None)
    documents = validation.removesuffix(b"\0").split(b"\0") if marked else [validation]
    covered = {n: [tokens_of_grams(d, train, n) for d in documents] for n in (2, 4)}
    assert found.documents == len(documents)
    assert found.tokens == sum(map(len, documents))
    assert found.in_grams == sum(map(sum, covered[2]))
    assert found.in_stretches == sum(map(sum, covered[4]))
    assert found.touched == sum(any(each) for each in covered[4])
    assert found.whole == sum(bool(each) and all(each) for each in covered[4])
    for each in found.worst:
        assert validation[each.start :].startswith(documents[each.document])
        assert each.tokens == len(documents[each.document])
        assert each.in_grams == sum(covered[2][each.document])
        assert each.in_stretches == sum(covered[4][each.document])
    runs = [run for each in covered[4] for run in re.findall(b"\1+", bytes(each))]
    longest = max(map(len, runs), default=0)
    assert longest == max((each.tokens for each in found.stretches), default=0) or len(runs) == 1
    for stretch in found.stretches:
        own = validation[stretch.start :][: stretch.tokens]
        assert train.find(own[:4]) == stretch.place


def tokens_of_grams(text: bytes, train: bytes, n: int) -> list[bool]:
    """For each byte of a text, whether it is in an n-gram that the training text has."""
    covered = [False] * len(text)
    for i in range(len(text) - n + 1):
        if text[i : i + n] in train:
            covered[i : i + n] = [True] * n
    return covered


# -- reports


@pytest.fixture(scope="module")
def found(place: Path) -> Memorization:
    """What is reported."""
    return remembered(place, place / "halves", places=30)


@pytest.mark.slow
def test_reports(found: Memorization) -> None:
    tokenizer = byte_tokenizer()
    report = json.loads(json.dumps(report_json(found, tokenizer)))
    texts = [*LEARNED, *sentences(1, 7)]
    held_out = texts[4::10]
    learned = [text for i, text in enumerate(texts) if i % 10 != 4]
    known = sum(text in learned for text in held_out)
    assert report["overlap"]["documents"] == len(held_out) == 15
    assert report["overlap"]["whole"] == report["overlap"]["touched"] == known == 12
    assert [each["prompt_tokens"] for each in report["extraction"]["held_out"]] == [16, 32, 64]
    passage = next(each for each in report["passages"] if each["distance"] == 0)
    assert passage["written"] == passage["wanted"] == PLANTED[0][64:]
    sample = report["samples"][0]
    assert sample["match"]["text"] in sample["text"]
    text = report_text(found, tokenizer)
    assert text.startswith("Given 64 tokens of its training text, the model continues ")
    assert repr(sample["match"]["text"]) in text
    assert "of 15 documents, 12 have such a stretch and 12 consist of them" in text


@pytest.fixture(scope="module")
def page(place: Path, found: Memorization) -> Iterator[Any]:
    """The report in a browser, and all that it asked for or said."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("the page is tested in a browser: no chromium and no google-chrome on the PATH")
    html = report_page(found, byte_tokenizer(), Dataset.open(place / "halves"), "<b>my</b> & model")
    (place / "report.html").write_text(html, encoding="utf-8")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        shown = browser.new_page()
        said: list[str] = []
        shown.on("console", lambda message: said.append(message.text))
        shown.on("request", lambda request: said.append(request.url))
        shown.goto((place / "report.html").as_uri())
        assert said == [(place / "report.html").as_uri()]
        yield shown
        browser.close()


@pytest.mark.slow
def test_the_page_marks_the_matches(page: Any) -> None:
    assert page.title() == page.inner_text("h1") == "What <b>my</b> & model remembers"
    assert page.locator("h2").count() == 3
    assert page.locator("article mark").count() > 10
    # Exactly what was continued word for word is marked in the first passage.
    first = page.locator("article").first
    assert first.locator("h3").inner_text().startswith("exact, token ")
    assert first.locator("mark").all_text_contents() == [PLANTED[0][64:]]
    assert first.locator("s").all_text_contents() == [PLANTED[0][:64]]
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390


# -- the command line


@pytest.mark.slow
def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On prepared data, and on the text of it, which is split in the same way."""
    line = f"evaluate {place / 'model'} --memorization --places 20 --samples 3 --json --threads 1"
    assert main(f"{line} --data {place / 'halves'} --report {tmp_path / 'a.html'}".split()) == 0
    report = json.loads(capsys.readouterr().out)
    assert (tmp_path / "a.html").read_text().endswith("</html>\n")
    assert main(f"{line} --data {place / 'halves'}.jsonl".split()) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == report
    assert "is text: it is split as `gptsmith train` splits it with --validation-fraction 0.1" in (
        said.err
    )
    assert main(f"{line.replace('--json', '')} --data {place / 'halves'}".split()) == 0
    assert "near: at most 3 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("model --data short", "no training document of short has the 64 + 32 tokens"),
        ("model --data chars", "was made with another tokenizer than the model's"),
        ("mute --data short", "has no tokenizer.json"),
        ("small --data short", "context of 11 tokens does not hold the shortest prompt"),
        ("model --data nowhere", "no file, folder or built-in text 'nowhere'"),
        ("model --data short --report no/where.html", "create the folder no first"),
        ("model --data short --report short", "--report is short, a folder: name a file"),
        ("model --data short --split train", "--split has no effect with --memorization: leave it"),
        ("model --data short --places 0", "--places is 0: at least 1 is needed"),
        ("classifier --data short", "is a classifier"),
    ],
)
def test_bad_input_is_one_line(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 4, "vocab_size": 257}
    if line.startswith(("model", "mute")):
        tokenizer = byte_tokenizer() if line.startswith("model") else None
        model = scrambled(GPTConfig(context_length=128, **sizes))
        gptsmith.save(model, tokenizer, Path(line.split()[0]))
    elif line.startswith("small"):
        gptsmith.save(scrambled(GPTConfig(context_length=11, **sizes)), byte_tokenizer(), "small")
    prepared(Path("short"), ["x" * 95] * 9)
    if "chars" in line:
        list(prepare(["short.jsonl"], "char", Path("chars")))
    if line.startswith("classifier"):
        Path("rows.jsonl").write_text(
            "".join(
                json.dumps({"text": "ab" * (n + 1), "label": "ab"[n % 2]}) + "\n" for n in range(30)
            )
        )
        toy = (
            "--n-layer 1 --n-head 1 --n-embd 4 --context-length 16 --steps 1 --warmup-steps 0 "
            "--dtype float32 --threads 1 --fused no --attention kernel --sample-tokens 0"
        )
        assert main(f"finetune fresh --data rows.jsonl --out classifier {toy}".split()) == 0
    capsys.readouterr()
    assert main(f"evaluate {line} --memorization".split()) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("gptsmith: ")
    assert message in said


@pytest.mark.parametrize(
    "flag", ["--places 3", "--report a.html", "--validation-fraction 0.2", "--sample-tokens 9"]
)
def test_flags_without_memorization(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(f"evaluate model --data text {flag}".split()) == 2
    name = flag.split()[0]
    assert f"{name} has no effect without --memorization" in capsys.readouterr().err

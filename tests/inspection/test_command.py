"""`gptsmith inspect` as typed: the JSON, the page in a browser, and what it refuses."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.inspection import inspect
from gptsmith.model.quantized import pack_model
from gptsmith.tokenizers import byte_tokenizer, gpt2_tokenizer
from tests.conftest import TINY, scrambled

TEXT = "the cat <b>sat</b> on\nthe cat"
RUN = (
    "--tokenizer byte --n-layer 2 --n-head 3 --n-embd 12 --context-length 16 --steps 3 "
    "--batch-tokens 32 --warmup-steps 0 --save-every 1 --threads 1 --dtype float32 "
    "--sample-tokens 0"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of bytes, one with GPT-2's tokenizer and a padded vocabulary, a run with all its
    checkpoints, and a quantized model."""
    place = tmp_path_factory.mktemp("inspect")
    sizes = TINY | {"context_length": 40}
    bytes_ = scrambled(GPTConfig(**(sizes | {"vocab_size": 259})))
    gptsmith.save(bytes_, byte_tokenizer(), place / "bytes")
    gpt2 = scrambled(GPTConfig(**(sizes | {"vocab_size": 50304})))
    gptsmith.save(gpt2, gpt2_tokenizer(), place / "gpt2")
    wide = scrambled(GPTConfig(**(sizes | {"vocab_size": 259, "n_head": 2, "n_embd": 64})))
    pack_model(wide, 8)
    gptsmith.save(wide, byte_tokenizer(), place / "packed")
    (place / "text.txt").write_text("A line of text, and another.\n" * 40)
    words = f"train {place}/text.txt {RUN} --keep all --out {place}/run"
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert main(words.split()) == 0, said.getvalue()
    return place


def looked(capfd: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main(["inspect", *map(str, words), "--json"]) == 0, capfd.readouterr().err
    found: dict[str, Any] = json.loads(capfd.readouterr().out)
    return found


@pytest.mark.slow
def test_the_json_is_what_the_functions_return(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = looked(capfd, place / "bytes", "--prompt", TEXT)
    model, tokenizer = gptsmith.load(place / "bytes")
    assert tokenizer is not None
    ids = tokenizer.encode(TEXT)
    found = inspect(model, ids, vocab_size=tokenizer.vocab_size)
    assert [token["id"] for token in told["tokens"]] == ids
    assert "".join(token["text"] for token in told["tokens"]) == TEXT
    assert "probability" not in told["tokens"][0]
    logits = model(torch.tensor([ids])).logits[0].detach()
    for i, token in enumerate(told["tokens"][1:]):
        p = logits[i].softmax(-1)[ids[i + 1]].item()
        assert token["probability"] == pytest.approx(p, rel=1e-3)
        assert token["surprise"] == pytest.approx(-np.log(p), rel=1e-3)
    for layer, heads in enumerate(told["attention"]):
        for head, rows in enumerate(heads):
            for q, row in enumerate(rows):
                wanted = found.weights[layer, head, q, : q + 1]
                np.testing.assert_allclose(row, wanted, atol=0.0006)
    assert len(told["heads"]) == 6
    sums = np.array(told["attribution"]["contributions"]).sum(0)
    np.testing.assert_allclose(sums, told["attribution"]["logits"], atol=1e-3)
    assert told["lens"]["final_rank"][-1] == [1] * len(ids)
    assert told["model"]["n_layer"] == 2


@pytest.mark.slow
def test_a_question_is_answered_at_the_last_place(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [place / "bytes", "--prompt", "abcd", "--target", "x", "--instead", "y"]
    answer = looked(capfd, *words)["answer"]
    model, _ = gptsmith.load(place / "bytes")
    logits = model(torch.tensor([[*b"abcd"]])).logits[0, -1]
    assert answer["logit"] == pytest.approx((logits[ord("x")] - logits[ord("y")]).item(), abs=1e-3)
    assert answer["target"] == {"id": ord("x"), "text": "x"}
    assert sum(answer["contributions"]) == pytest.approx(answer["logit"], abs=1e-3)
    assert looked(capfd, *words[:3], "--target", "x")["answer"]["instead"] is None
    patching = looked(capfd, *words, "--corrupt", "abed")["patching"]
    assert patching["clean"] == pytest.approx(answer["logit"], abs=1e-3)
    assert [token["text"] for token in patching["tokens"]] == list("abed")
    np.testing.assert_allclose(patching["stream"][-1], [0, 0, 0, 1], atol=1e-4)


@pytest.mark.slow
def test_checkpoints_are_looked_at_from_the_first_to_the_last(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = looked(capfd, place / "run", "--over-checkpoints")
    assert [moment["step"] for moment in told["training"]] == [1, 2, 3]
    ids = [token["id"] for token in told["tokens"]]
    assert ids[:8] == ids[8:]
    for moment in told["training"]:
        folder = place / "run" / "checkpoints" / f"step-{moment['step']:08}"
        found = inspect(gptsmith.load(folder)[0], ids, vocab_size=257)
        np.testing.assert_allclose(moment["lens"]["norm"], found.lens.norm, rtol=1e-3)
        np.testing.assert_allclose(
            moment["scores"]["first"], found.scores["first"], rtol=1e-3, atol=1e-6
        )
        assert len(moment["heads"]) == 4
    last = told["training"][-1]
    assert last["loss"] == pytest.approx(found.surprise.nats.mean(), rel=1e-3)


REFUSED = {
    "": "prompt is missing: give the text to look at, as --prompt TEXT",
    "--prompt=": "--prompt is empty: give a text of at least one token",
    "--prompt " + "x" * 41: "--prompt has 41 tokens: from 1 to 40, the context, are needed",
    "--prompt abc --target xy": "--target is 'xy', which is 2 tokens ('x', 'y'): name one token",
    "--prompt abc --target x --instead x": "--instead is the target itself: name another token",
    "--prompt abc --corrupt ab": "--corrupt has 2 tokens and the prompt 3: as many are needed",
    "--prompt abc --corrupt abc --target x --instead y": "is the same after both prompts",
    "--prompt abc --corrupt abd --target x --instead x": "--instead would be the target itself",
    "--prompt abc --over-checkpoints": "--over-checkpoints needs a run with checkpoints",
    "--prompt abc --out nowhere/report.html": "--out is nowhere/report.html: create the folder",
    "--prompt abc --out .": "--out is ., a folder: name a file",
    "--prompt abc --out text.txt": "--out is text.txt, which is something else: name another file",
}


@pytest.mark.parametrize("words", REFUSED)
def test_mistakes_get_one_line(
    words: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    there = {*place.iterdir()}
    assert main(["inspect", "bytes", *words.split()]) == 2
    out, err = capfd.readouterr()
    (line,) = err.splitlines()
    assert REFUSED[words] in line
    assert not out
    assert {*place.iterdir()} == there


def test_a_quantized_model_is_refused(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(place / "packed"), "--prompt", "abc", "--json"]) == 2
    assert "the model is quantized, so its matrices are packed" in capfd.readouterr().err


# -- the page


@pytest.fixture(scope="module")
def pages(place: Path) -> dict[str, Path]:
    """What each way of calling it writes."""
    ways = {
        "bytes": ["bytes", "--prompt", TEXT],
        "gpt2": ["gpt2", "--prompt", " antidisestablishmentarianism is é 𓀀"],
        "patched": ["bytes", "--prompt", "abcd", "--corrupt", "abed", "--target=x", "--instead=y"],
        "run": ["run", "--over-checkpoints"],
    }
    written = {}
    for name, (model, *words) in ways.items():
        written[name] = place / f"{name}.html"
        with contextlib.redirect_stderr(io.StringIO()) as said:
            whole = ["inspect", str(place / model), *words, "--out", str(written[name])]
            assert main(whole) == 0, said.getvalue()
    return written


@pytest.fixture
def visit(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Opens a page from disk; at the end, it has asked for nothing else and said nothing."""
    said: list[str] = []
    contexts = []

    def opened(name: str, **options: Any) -> Any:
        contexts.append(browser.new_context(**options))
        shown = contexts[-1].new_page()
        shown.on("console", lambda message: said.append(message.text))
        shown.on("pageerror", lambda error: said.append(str(error)))
        shown.on("request", lambda request: said.append(request.url))
        shown.goto(pages[name].as_uri())
        assert said == [pages[name].as_uri()]
        shown.wait_for_selector("main:not([hidden])")
        said.clear()
        return shown

    yield opened
    assert not [line for line in said if not line.startswith("data:")]
    for context in contexts:
        context.close()


@pytest.mark.slow
def test_the_page_is_about_the_chosen_place(visit: Any) -> None:
    page = visit("bytes")
    assert page.locator("#tokens").inner_text().replace("⏎", "") == TEXT
    assert page.locator("#bar nav a").all_inner_texts() == ["Text", "Attention", "Layers", "Logits"]
    last = len(TEXT)
    assert page.inner_text("#count") == f"token {last} of {last}"
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#here") == "a"
    page.locator(".token").nth(1).click()
    assert page.inner_text("#here") == "h"
    assert page.locator("#next .seen code").inner_text() == "e"
    assert page.locator("#layers thead .chosen").inner_text() == "h"
    assert "The logit of “e” after the chosen token" in page.inner_text("#question")
    page.locator("#layers tbody td").nth(4).click()  # the last layer, at the fifth token
    assert page.inner_text("#count") == f"token 5 of {last}"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#count") == f"token 6 of {last}"


@pytest.mark.slow
def test_heads_are_sorted_and_enlarged(visit: Any) -> None:
    page = visit("bytes")
    data = json.loads(page.locator("#data").inner_text())
    names = lambda: [text.split("\n")[0] for text in page.locator(".head").all_inner_texts()]  # noqa: E731
    assert names() == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    page.get_by_role("button", name="duplicate token", exact=True).click()
    ranked = sorted(data["heads"], key=lambda each: -each["duplicate"])
    places = [(each["layer"], each["head"]) for each in ranked]
    assert names() == [f"{layer}.{head}" for layer, head in places]
    page.locator(".head").nth(2).click()
    assert page.inner_text("#which").startswith("layer {}, head {}".format(*places[2]))
    row = data["attention"][places[2][0]][places[2][1]][-1]
    assert page.locator("#looks li").first.inner_text().split()[0] == str(row.index(max(row)) + 1)
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#which").startswith("layer {}, head {}".format(*places[3]))
    row = data["attention"][places[3][0]][places[3][1]][-1]
    assert page.locator("svg.arcs path").count() == sum(weight >= 0.01 for weight in row)


@pytest.mark.slow
def test_merges_bytes_and_parts_of_characters_are_shown(visit: Any) -> None:
    page = visit("gpt2")
    ids = gpt2_tokenizer().encode(" antidisestablishmentarianism is é 𓀀")
    assert page.locator(".token").count() == len(ids)
    page.locator(".token").first.click()
    steps = page.locator("#merges li")
    piece = gpt2_tokenizer().token_bytes(ids[0]).decode()
    assert steps.first.locator("code").count() == len(piece)
    assert steps.last.inner_text() == piece.replace(" ", "␣")
    assert "20" in page.locator("#facts").inner_text()
    assert "\\xf0" in page.inner_text("#tokens")


@pytest.mark.slow
def test_patching_and_checkpoints_are_drawn(visit: Any) -> None:
    page = visit("patched")
    assert "The logit of “x” less that of “y” is" in page.inner_text("#patched")
    assert page.locator("#grids table").count() == 4
    assert page.locator("#grids thead th").nth(3).inner_text() == "c / e"
    assert page.locator("#grids table").first.locator("tbody tr").first.inner_text().split() == [
        "2", "0.00", "0.00", "0.00", "1.00",
    ]  # fmt: skip
    page = visit("run")
    assert page.locator("#charts svg").count() == 4
    assert page.locator("#charts svg").first.locator("path.data, path.leading").count() == 6
    assert page.inner_text("#step").startswith("3, loss on this text")
    page.locator("#moment").fill("0")
    assert page.inner_text("#step").startswith("1, loss on this text")
    assert page.locator("#leading canvas").count() == 4


@pytest.mark.slow
def test_every_page_fits_a_phone_in_both_colours(visit: Any, pages: dict[str, Path]) -> None:
    pictures = Path(__file__).parents[2] / "build" / "inspect"
    pictures.mkdir(parents=True, exist_ok=True)
    for name in pages:
        for scheme in ("light", "dark"):
            page = visit(name, viewport={"width": 390, "height": 800}, color_scheme=scheme)
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            page.screenshot(path=pictures / f"{name}-{scheme}.png", full_page=True)

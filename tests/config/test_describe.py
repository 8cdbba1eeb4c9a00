"""The page about a model, against the published arithmetic; the trace, against the model itself."""

import json
import subprocess
import sys

import pytest
import torch

from gptsmith import GPT, PRESETS, GPTConfig, describe
from gptsmith.cli.describe import parse_shape
from gptsmith.config import cost
from gptsmith.config.describe import Description, block_terms, forward_stages, terms
from gptsmith.config.tables import columns, human_bytes, human_flops
from gptsmith.model.trace import render, trace
from tests.conftest import TINY, processor_seconds

BOOK = PRESETS["book"]


def page(config: GPTConfig) -> Description:
    return describe(config, title="a title")


def test_the_books_arithmetic_is_on_the_page() -> None:
    lines = [" ".join(line.split()) for line in str(page(BOOK)).splitlines()]
    for line in (
        "a title 163,009,536 parameters",
        "wte.weight (50257, 768) V * C 38,597,376",
        "attn.c_attn.weight (2304, 768) 3 * C * C 1,769,472",
        "attn.c_attn.bias (2304) 3 * C absent",
        "attention 3 x 589,824 (q, k, v) + 590,592 (out) 2,360,064",
        "MLP 2,362,368 (in) + 2,360,064 (out) 4,722,432",
        "two norms 2 x 1,536 3,072",
        "one block 7,085,568",
        "token embedding 50,257 x 768 38,597,376",
        "position embedding 1,024 x 768 786,432",
        "12 blocks 12 x 7,085,568 85,026,816",
        "final norm 768 + 768 1,536",
        "head 50,257 x 768 38,597,376",
        "the model 163,009,536",
    ):
        assert line in lines


@pytest.mark.parametrize("name", PRESETS)
def test_a_page_fits_a_terminal(name: str) -> None:
    lines = str(describe(PRESETS[name], title=name)).splitlines()
    assert max(map(len, lines)) <= 88
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_the_sums_are_the_models(tied: bool, bias: bool, qkv_bias: bool) -> None:
    config = GPTConfig(**TINY, n_inner=31, tie_weights=tied, bias=bias, qkv_bias=qkv_bias)
    model = GPT(config)
    counts = {term.name: term.count for term in block_terms(config) + terms(config)}

    def real(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    block = model.h[0]
    assert counts["attention"] == real(block.attn)  # type: ignore[arg-type]
    assert counts["MLP"] == real(block.mlp)  # type: ignore[arg-type]
    assert counts["two norms"] == real(block.ln_1) + real(block.ln_2)  # type: ignore[arg-type]
    assert counts["2 blocks"] == real(model.h)
    assert counts["final norm"] == real(model.ln_f)
    assert counts["head"] == (0 if tied else real(model.lm_head))
    assert sum(term.count for term in terms(config)) == real(model)
    check_arithmetic(config)


def check_arithmetic(config: GPTConfig) -> None:
    """What is shown beside each count gives it, and the counts add up."""
    assert sum(term.count for term in terms(config)) == cost.parameter_count(config)
    assert sum(term.count for term in block_terms(config)) == cost.block_count(config)
    for term in block_terms(config) + terms(config):
        if term.count:
            arithmetic = term.arithmetic.replace(",", "").replace("x", "*")
            plain = "".join(letter for letter in arithmetic if letter in "0123456789+*")
            assert eval(plain) == term.count, term


def test_json_holds_the_same_figures() -> None:
    values = json.loads(json.dumps(page(BOOK).to_json()))
    assert values["parameters"]["total"] == 163_009_536
    assert values["parameters"]["block_total"] == 7_085_568
    assert sum(part["count"] for part in values["parameters"]["components"]) == 163_009_536
    assert values["memory"]["weights"] == values["memory"]["gradients"] == 4 * 163_009_536
    assert values["memory"]["optimizer"] == 8 * 163_009_536
    assert values["memory"]["kv_cache_per_token"] == 2 * 12 * 768 * 4
    assert values["flops_per_token"]["training"] == 3 * values["flops_per_token"]["forward"]
    assert values["config"]["n_layer"] == 12


def test_describe_loads_no_torch_and_answers_at_once() -> None:
    code = (
        "import sys; from gptsmith import describe; print(describe('gpt2-xl')); "
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    times = []
    for _ in range(3):
        start = processor_seconds()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(processor_seconds() - start)
    assert min(times) < 0.5


def test_figures_for_people() -> None:
    assert human_bytes(1) == "1 bytes"
    assert human_bytes(1536) == "1.5 KiB"
    assert human_bytes(72 * 1024) == "72 KiB"
    assert human_bytes(3 * 2**50) == "3072 TiB"
    assert human_flops(284_800_000) == "284.8 MFLOP"
    assert columns([("a", "1"), ("bcd", "20")], "<>") == ["a     1", "bcd  20"]


# ---- The trace -----------------------------------------------------------------------------------


def test_every_shape_of_the_trace() -> None:
    config = GPTConfig(**TINY, n_inner=31)  # V 37, H 3, C 12, so D 4
    found = [(line.name.strip(), line.inputs, line.output) for line in trace(config, 2, 5)]
    stream, heads = (2, 5, 12), (2, 3, 5, 4)
    assert found == [
        ("wte", ((2, 5),), stream),
        ("wpe", ((5,),), (5, 12)),
        ("wte + wpe", (stream, (5, 12)), stream),
        ("h.0.ln_1", (stream,), stream),
        ("h.0.attn.c_attn", (stream,), (2, 5, 36)),
        ("q, k, v", ((2, 5, 36),), heads),
        ("softmax", (heads, heads), (2, 3, 5, 5)),
        ("weights v", ((2, 3, 5, 5), heads), heads),
        ("heads joined", (heads,), stream),
        ("h.0.attn.c_proj", (stream,), stream),
        ("+ residual", (stream, stream), stream),
        ("h.0.ln_2", (stream,), stream),
        ("h.0.mlp.c_fc", (stream,), (2, 5, 31)),
        ("h.0.mlp.activation", ((2, 5, 31),), (2, 5, 31)),
        ("h.0.mlp.c_proj", ((2, 5, 31),), stream),
        ("+ residual", (stream, stream), stream),
        ("h.1", (stream,), stream),
        ("ln_f", (stream,), stream),
        ("lm_head", (stream,), (2, 5, 37)),
    ]


def test_the_spread_is_that_of_the_same_model() -> None:
    config = GPTConfig(**TINY)
    lines = {line.name: line for line in trace(config, 2, 5, seed=3)}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = GPT(config).eval()
        logits = model(torch.randint(37, (2, 5))).logits
    assert lines["lm_head"].spread == pytest.approx(logits.std(correction=0).item())
    assert lines["h.0.ln_1"].spread == pytest.approx(1, abs=0.1)
    assert lines["  softmax"].spread is None


def test_the_trace_agrees_with_the_stages_on_the_page() -> None:
    config = GPTConfig(**TINY, n_inner=31)
    letters = {"B": 2, "T": 5, "V": 37, "C": 12, "3C": 36, "M": 31, "H": 3, "D": 4}
    stages = [tuple(letters[x] for x in s.shape[1:-1].split(", ")) for s in forward_stages(config)]
    one_block = GPTConfig(**{**TINY, "n_layer": 1}, n_inner=31)
    omitted = ("wte", "wpe", "  heads joined")  # the page adds the embeddings in one line
    real = [line.output for line in trace(one_block, 2, 5) if line.name not in omitted]
    assert stages[1:] == real


def test_a_trace_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(trace(GPTConfig(**TINY), 1, 1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_model_of_gigabytes_is_traced_without_them() -> None:
    lines = list(trace(PRESETS["gpt2-xl"], 2, 4))
    assert lines[-1].output == (2, 4, 50257)
    assert [line.name for line in lines if line.name.startswith("h.")][-1] == "h.47"
    assert all(line.spread is None for line in lines)
    text = render(lines)
    assert "shapes only" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.slow
def test_a_trace_of_gpt2_fits_a_terminal() -> None:
    text = render(list(trace(GPTConfig(n_layer=1), 2, 4)))
    assert "(2, 12, 4, 64)" in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_trace_as_text_and_json() -> None:
    lines = list(trace(GPTConfig(**TINY), 2, 4))
    text = render(lines).splitlines()
    assert text[0].startswith("TRACE  2 x 4 random tokens through new weights")
    assert len(text) == len(lines) + 2
    assert max(map(len, text)) <= 100
    first = json.loads(json.dumps(lines[0].to_json()))
    assert first["inputs"] == [[2, 4]]
    assert first["output"] == [2, 4, 12]


def test_shapes_asked_for() -> None:
    assert parse_shape("2x4") == (2, 4)
    assert parse_shape("12x1024") == (12, 1024)
    for wrong in ("", "2", "2x", "0x4", "2x4x6", "-1x4", "2 x 4", "axb"):
        with pytest.raises(ValueError, match="BxT is needed"):
            parse_shape(wrong)
    with pytest.raises(ValueError, match="context_length"):
        list(trace(GPTConfig(**TINY), 1, 12))


def test_a_title_longer_than_the_page_is_shown_whole() -> None:
    title = "runs/" + "very-" * 30 + "long"
    first = str(describe(PRESETS["gpt2"], title=title)).splitlines()[0]
    assert first == f"{title} 124,439,808 parameters"

"""minGPT's state dicts, against a restatement of its architecture that takes them strictly."""

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptsmith
from gptsmith import GPTConfig
from gptsmith.cli.main import main
from gptsmith.convert import export_model, import_model
from tests.conftest import TINY, scrambled, some_tokens
from tests.references import attend, layer_norm

SETTINGS: dict[str, Any] = {"model_type": None, "n_layer": 2, "n_head": 3, "n_embd": 12}
NANO = {"model_type": "gpt-nano", "n_layer": None, "n_head": None}  # three heads


class MinGPT(nn.Module):
    """minGPT's GPT by the names of its state dict."""

    def __init__(self, V: int = 37, P: int = 11, C: int = 12, layers: int = 2) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(V, C), "wpe": nn.Embedding(P, C), "ln_f": nn.LayerNorm(C)}
        )
        self.transformer["h"] = nn.ModuleList()
        for _ in range(layers):
            attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
            attn.register_buffer("bias", torch.ones(P, P).tril().view(1, 1, P, P))
            mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})
            block = {"ln_1": nn.LayerNorm(C), "attn": attn, "ln_2": nn.LayerNorm(C), "mlp": mlp}
            self.transformer["h"].append(nn.ModuleDict(block))
        self.lm_head = nn.Linear(C, V, bias=False)

    def forward(self, tokens: Tensor, heads: int = 3) -> Tensor:
        """(B, T) -> (B, T, V), as in evaluation mode."""
        w = self.state_dict()

        def norm(x: Tensor, name: str) -> Tensor:
            return layer_norm(x, w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"])

        def linear(x: Tensor, name: str) -> Tensor:
            return x @ w[f"transformer.{name}.weight"].T + w[f"transformer.{name}.bias"]

        positions = torch.arange(tokens.shape[1])
        x = w["transformer.wte.weight"][tokens] + w["transformer.wpe.weight"][positions]
        for i in range(len(self.transformer["h"])):
            q, k, v = linear(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn").chunk(3, dim=2)
            x = x + linear(attend(q, k, v, heads), f"h.{i}.attn.c_proj")
            y = linear(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")
            y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
            x = x + linear(y, f"h.{i}.mlp.c_proj")
        return norm(x, "ln_f") @ w["lm_head.weight"].T


def saved(folder: Path, settings: dict[str, Any] | None = SETTINGS, name: str = "model.pt") -> Any:
    """A model as minGPT's projects save one: a state dict, and their whole configuration."""
    torch.manual_seed(5)
    model = MinGPT()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), folder / name)
    if settings is not None:
        whole = {"system": {"seed": 3407}, "model": settings, "trainer": {"max_iters": None}}
        (folder / "config.json").write_text(json.dumps(whole))
    return model


def as_json(model: MinGPT, settings: dict[str, Any]) -> dict[str, Any]:
    """A model with its settings as one JSON object."""
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "data": base64.b64encode(tensor.numpy().tobytes()).decode(),
        }
        for name, tensor in model.state_dict().items()
    }
    return {"config": settings, **tensors}


@pytest.mark.parametrize("form", ["folder", "any.name", "compiled", "json"])
@pytest.mark.parametrize("settings", [SETTINGS, NANO], ids=["sizes", "type"])
def test_a_state_dict_becomes_the_same_model(
    form: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    reference = saved(tmp_path / "there", settings | {"resid_pdrop": 0.2})
    source = tmp_path / "there"
    if form == "any.name":
        source = (source / "model.pt").rename(source / "any.name")
    elif form == "compiled":
        state = reference.state_dict().items()
        torch.save({f"_orig_mod.{name}": each for name, each in state}, source / "model.pt")
    elif form == "json":
        source = tmp_path / "model.json"
        source.write_text(json.dumps(as_json(reference, settings | {"resid_pdrop": 0.2})))
    report = import_model(source, tmp_path / "out")
    assert report.source_format == "minGPT state dict"
    assert report.difference == 0
    assert report.tensors.ignored == {
        f"h.{layer}.attn.bias": "a causal mask, not a weight" for layer in range(2)
    }
    model, tokenizer = gptsmith.load(tmp_path / "out")
    assert tokenizer is None
    assert model.config == GPTConfig(**TINY, qkv_bias=True, tie_weights=False, dropout=0.2)
    tokens = some_tokens(length=7)
    assert (model(tokens).logits - reference(tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("form", [{}, {"tie_weights": False}, {"bias": False}])
def test_mingpt_takes_what_we_write_strictly(form: dict[str, Any], tmp_path: Path) -> None:
    model = scrambled(GPTConfig(**TINY, **form, dropout=0.2))
    gptsmith.save(model, None, tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "there", to="mingpt")
    theirs = MinGPT()
    state = torch.load(tmp_path / "there" / "model.pt", weights_only=True)
    theirs.load_state_dict(state, strict=True)
    tokens = some_tokens(length=7)
    assert (model(tokens).logits - theirs(tokens)).abs().max() < 1e-4
    said = json.loads((tmp_path / "there" / "config.json").read_text())["model"]
    sizes = {"vocab_size": 37, "block_size": 11}
    rates = {"embd_pdrop": 0.2, "resid_pdrop": 0.2, "attn_pdrop": 0.2}
    assert said == SETTINGS | sizes | rates
    # A tied head is written as a copy, which nanoGPT's state dicts have too: the format is named.
    import_model(tmp_path / "there", tmp_path / "back", format="mingpt")
    back, _ = gptsmith.load(tmp_path / "back")
    assert torch.equal(back(tokens).logits, theirs_in_ours(theirs)(tokens).logits)


def theirs_in_ours(theirs: MinGPT) -> gptsmith.GPT:
    """The same weights in our model, by hand."""
    model = gptsmith.GPT(GPTConfig(**TINY, tie_weights=False)).eval()
    state = {name.removeprefix("transformer."): each for name, each in theirs.state_dict().items()}
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model


def test_a_bare_state_dict_of_nanogpt_is_not_taken_for_mingpts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    model = MinGPT()
    model.lm_head.weight = model.transformer["wte"].weight
    torch.save(model.state_dict(), tmp_path / "tied.pt")  # with the masks of nanoGPT's first years
    untied = {name: each for name, each in MinGPT().state_dict().items() if "attn.bias" not in name}
    torch.save(untied, tmp_path / "maskless.pt")
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    for name in ("tied.pt", "maskless.pt", "rows.jsonl"):
        assert main(["import", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert f"{name} is none of these" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.update(config={"model_type": "gpt-new"}), "does not say how many heads"),
        (lambda c: c.pop("config"), "does not say how many heads the model has: put minGPT's"),
        (lambda c: c["config"].update(n_head=5), "n_embd 12 is not a multiple of n_head 5"),
        (lambda c: c["config"].update(n_head="3"), "n_head is '3': a whole number"),
        (lambda c: c.pop("transformer.wpe.weight"), "lacks the embeddings of a minGPT"),
        (lambda c: c.pop("transformer.ln_f.bias"), "lacks 1 tensors of a minGPT, ln_f.bias first"),
        (lambda c: c.update(more=c["lm_head.weight"]), "1 tensors no minGPT has, more first"),
        (lambda c: c.update(more=3), "more is not a tensor"),
        (lambda c: c["lm_head.weight"].pop("shape"), "lm_head.weight is not a tensor"),
        (lambda c: c["lm_head.weight"].update(shape=[37, 11]), "lm_head.weight is not a tensor"),
        (lambda c: c["lm_head.weight"].update(shape=[12, 37]), r"lm_head.weight is \(12, 37\)"),
        (lambda c: c["lm_head.weight"].update(data="?"), "lm_head.weight is not a tensor"),
        (lambda c: c["lm_head.weight"].update(dtype="int9"), "one of float32, fp16, bf16"),
    ],
)
def test_a_file_that_lies_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    content = as_json(MinGPT(), dict(SETTINGS))
    damage(content)
    (tmp_path / "model.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        import_model(tmp_path / "model.json", tmp_path / "out", format="mingpt")
    assert not (tmp_path / "out").exists()


def test_without_its_configuration_it_says_what_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    saved(tmp_path / "there", settings=None)
    assert main(["import", str(tmp_path / "there"), str(tmp_path / "out")]) == 2
    assert 'a file of that name with {"model": {"n_head": 4}}' in capsys.readouterr().err

"""Recipes and settings: what ships, TOML and back, conversions, and what a mistake gets."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptsmith.config.fields import Bytes, SettingError
from gptsmith.config.model import GPTConfig
from gptsmith.config.recipe import (
    parse_value,
    read_toml,
    recipes,
    run_settings,
    sections,
    to_toml,
    updated,
    with_overrides,
)
from gptsmith.config.settings import DataSettings, ReportSettings, RunSettings, TrainingSettings
from tests.advice import cured
from tests.conftest import TOY

SHIPPED = {"shakespeare", "shakespeare-gpu", "gpt2-124m", "finetune-gpt2"}


def again(settings: RunSettings, folder: Path) -> RunSettings:
    path = folder / "config.toml"
    path.write_text(to_toml(settings), encoding="utf-8")
    return read_toml(path)


def refusal(body: str, folder: Path) -> str:
    """What a settings file with this body is refused with: one line, as a ValueError."""
    path = folder / "own.toml"
    path.write_text(body, encoding="utf-8")
    with pytest.raises(ValueError, match=r"\w") as caught:
        read_toml(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what ships


def test_the_promised_recipes_ship() -> None:
    assert set(recipes()) >= SHIPPED


@pytest.mark.parametrize("name", recipes())
def test_every_recipe_is_whole(name: str, tmp_path: Path) -> None:
    settings = read_toml(recipes()[name])
    assert again(settings, tmp_path) == settings
    if settings.training.start_from is None:  # else the context is the other model's
        assert settings.training.batch_tokens % settings.model.context_length == 0
    assert settings.training.warmup_steps < settings.training.steps


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_says_what_python_reads(name: str) -> None:
    """Every key of the file arrives, by the standard library's own reading of it."""
    settings = read_toml(recipes()[name])
    for section, table in tomllib.loads(recipes()[name].read_text(encoding="utf-8")).items():
        for key, value in table.items():
            if key != "preset":
                wanted = tuple(value) if isinstance(value, list) else value
                assert getattr(getattr(settings, section), key) == wanted


def test_no_field_has_two_sections() -> None:
    names = [f.name for kind in sections().values() for f in fields(kind)]
    assert len(names) == len(set(names))


def test_every_field_says_what_it_is() -> None:
    for kind in sections().values():
        for field in fields(kind):
            assert len(field.metadata["help"]) > 10, field.name


# -- TOML and back


@given(
    # "none" is how a person writes no value at all.
    text=st.none()
    | st.text(st.characters(exclude_categories=["Cs"])).filter(lambda t: t.lower() != "none"),
    rate=st.floats(0, 1e30),
    seed=st.integers(0, 2**63 - 1),
    bias=st.booleans(),
)
def test_settings_survive_toml(
    text: str | None, rate: float, seed: int, bias: bool, tmp_path_factory: Any
) -> None:
    settings = RunSettings(
        model=GPTConfig(bias=bias),
        data=DataSettings(data=text),
        training=TrainingSettings(learning_rate=rate, seed=seed),
    )
    assert again(settings, tmp_path_factory.getbasetemp()) == settings


@pytest.mark.parametrize("choice", ["grad_clip", "n_inner"])
def test_a_choice_of_none_is_kept(choice: str, tmp_path: Path) -> None:
    settings = with_overrides(RunSettings(), {choice: "none"})
    found = {k: v for part in vars(settings).values() for k, v in vars(part).items()}
    assert found[choice] is None
    assert again(settings, tmp_path) == settings


def test_a_preset_comes_first_whatever_the_order(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text('[model]\nn_layer = 3\npreset = "nanogpt"\n', encoding="utf-8")
    model = read_toml(path).model
    assert (model.n_layer, model.bias, model.activation) == (3, False, "gelu_erf")


def test_overrides_find_their_section() -> None:
    settings = with_overrides(RunSettings(), {"n_layer": "3", "steps": "7", "threads": "2"})
    assert (settings.model.n_layer, settings.training.steps) == (3, 7)
    assert settings.machine.threads == 2
    default = RunSettings()
    assert settings.data == default.data
    assert settings.training == replace(default.training, steps=7)


# -- conversions


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("12", int, 12),
        ("1e6", int, 1_000_000),
        ("65_536", int, 65_536),
        (3.0, int, 3),
        ("3", float, 3.0),
        (2, float, 2.0),
        ("none", int | None, None),
        ("None", float | None, None),
        ("5", int | None, 5),
        ("none", str | None, None),
        ("two", Literal["one", "two"], "two"),
        (True, bool, True),
        (False, bool | None, False),
        ("5GB", Bytes, 5 * 10**9),
        ("1.5 kib", Bytes, 1536),
        (7, Bytes | None, 7),
        ("8", Literal[8, 4], 8),
        (4, Literal[8, 4], 4),
        ("a/b", Path, Path("a/b")),
    ],
)
def test_words_become_values(value: Any, hint: Any, expected: Any) -> None:
    found = parse_value("x", value, hint)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "said"),
    [
        ("many", int, "a whole number"),
        ("1.5", int, "a whole number"),
        (2.5, int, "a whole number"),
        ("1e400", int, "a whole number"),
        ("nan", int, "a whole number"),
        (float("nan"), int, "a whole number"),
        (float("inf"), int, "a whole number"),
        (True, int, "a whole number"),
        ("fast", float, "a number"),
        (True, float, "a number"),
        (3, str, "text"),
        ("yes", bool, "true or false"),
        (1, bool, "true or false"),
        ("tow", Literal["one", "two"], "did you mean 'two'?"),
        ([1], int, "a whole number"),
        ({"a": 1}, float, "a number"),
        ("5 PB", Bytes, "a size such as 500MB or 5GB"),
        ("3", Literal[8, 4], "one of 8, 4"),
        (8.5, Literal[8, 4], "one of 8, 4"),
        (3, Path, "a path"),
    ],
)
def test_what_is_no_value_is_refused_by_name(value: Any, hint: Any, said: str) -> None:
    with pytest.raises(ValueError, match=r"^x is .* needed") as caught:
        parse_value("x", value, hint)
    assert said in str(caught.value)


# -- mistakes


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "[model]\nn_layr = 2",
            "own.toml [model]: there is no setting 'n_layr', did you mean 'n_layer'",
        ),
        ("[modle]\nn_layer = 2", "unknown section 'modle', did you mean 'model'?"),
        ("n_layer = 2", "unknown section 'n_layer'"),
        ("model = 3", "write [model]"),
        ("[[model]]\nn_layer = 1", "write [model]"),
        ("[model", "own.toml is not valid TOML"),
        ("\x00", "own.toml is not valid TOML"),
        ("[model]\nn_layer = 1\nn_layer = 2", "own.toml is not valid TOML"),
        ("[model]\nn_layer = 'two'", "n_layer is 'two'"),
        ("[model]\nn_layer = true", "n_layer is True"),
        ("[model]\nn_layer = [1]", "n_layer is [1]"),
        ("[model]\nn_layer = {a = 1}", "n_layer is {'a': 1}"),
        ("[model]\nn_layer = 1979-05-27", "n_layer is "),
        ("[model]\nbias = 'true'", "bias is 'true'"),
        ("[model]\nn_embd = 10", "n_embd 10 is not a multiple of n_head 12: try n_embd 12"),
        ("[model]\npreset = 'gpt22'", "did you mean 'gpt2'?"),
        ("[model]\npreset = 3", "preset"),
        ("[model]\npreset = [1]", "preset"),
        ("[model]\ndropout = nan", "dropout is nan"),
        ("[model]\nnorm_eps = inf", "norm_eps is inf"),
        ("[training]\nlearning_rate = nan", "learning_rate is nan"),
        ("[training]\nlearning_rate = inf", "learning_rate is inf"),
        ("[training]\nweight_decay = inf", "weight_decay is inf"),
        ("[training]\nepsilon = nan", "epsilon is nan"),
        ("[training]\nepsilon = -1.0", "epsilon is -1.0"),
        ("[training]\nseed = 99999999999999999999999", "seed is 9999"),
        ("[training]\nsteps = -3", "steps is -3"),
        ("[training]\nsteps = 0", "steps is 0"),
        ("[training]\nschedule = 'cosin'", "did you mean 'cosine'?"),
        ("[machine]\ndtype = 'float64'", "dtype is 'float64'"),
        ("[machine]\nthreads = 0", "threads is 0"),
        ("[data]\ndata = ['a']", "data is ['a']"),
        ("[prepare]\nvalidation_fraction = 1.0", "validation_fraction is 1.0"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(body: str, said: str, tmp_path: Path) -> None:
    assert said in refusal(body, tmp_path)


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_bytes(b"[data]\ndata = '\xe9'\n")
    with pytest.raises(ValueError, match=r"own\.toml is not valid TOML.*0xe9"):
        read_toml(path)


def test_an_unknown_name_suggests_a_known_one() -> None:
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        updated(TrainingSettings(), {"learning_rat": 1})
    with pytest.raises(ValueError, match="did you mean 'learning_rate'"):
        with_overrides(RunSettings(), {"learning_rat": 1})


def test_a_fresh_run_begins_with_a_recipe_a_file_data_or_settings(tmp_path: Path) -> None:
    text, own = tmp_path / "plays.txt", tmp_path / "own.toml"
    text.write_text("to be")
    own.write_text("[training]\nsteps = 7\n")
    default = read_toml(recipes()["default"])
    for what, choices, name in ((text, {}, "plays"), (None, {"data": str(text)}, "plays")):
        settings = replace(default, data=DataSettings(data=str(text)))
        assert run_settings(what, choices) == (settings, name)
    assert run_settings("shakespeare", {})[0] == read_toml(recipes()["shakespeare"])
    found, name = run_settings(own, {"n_layer": 3})
    assert (found.training.steps, found.model.n_layer, name) == (7, 3, "own")
    given = RunSettings(data=DataSettings(data=str(text)))
    found, name = run_settings(given, {"steps": 5})
    assert (found, name) == (replace(given, training=TrainingSettings(steps=5)), "plays")
    with pytest.raises(ValueError, match="n_layer cannot go with --from"):
        run_settings(text, {"n_layer": 3, "start_from": "gpt2"})


# -- what is advised


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--n-embd 9", "try n_embd 10"),
        ("--n-embd 10 --n-head 4 --block modern", "try n_embd 16"),
        ("--block modern --init book", "leave it out"),
        ("--activation relu2", "add block modern"),
        ("--n-kv-head 1", "add block modern"),
        ("--schedule cosin", "did you mean 'cosine'?"),
        ("--batch-tokens 33", "try 32"),
    ],
)
@pytest.mark.slow
def test_what_is_advised_for_settings_works(
    flags: str, message: str, toys: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = TOY.split() + flags.split()
    cured(["train", "text.txt", *words, "--out", "OUT"], message, capsys)


def test_what_is_advised_for_a_settings_file_works(tmp_path: Path) -> None:
    for body, message, cure in (
        ('[model]\nposition = "rotary"\n', "use block modern, or preset modern", "block"),
        ('[model]\nposition = "rotary"\n', "use block modern, or preset modern", "preset"),
        ("[training]\nlearning_rat = 0.1\n", "did you mean 'learning_rate'?", ""),
        ('[model]\npreset = "gpt2-larg"\n', "did you mean 'gpt2-large'?", ""),
    ):
        assert message in refusal(body, tmp_path)
        cured_body = body.replace("position", cure).replace("rotary", "modern")
        cured_body = cured_body.replace("rat =", "rate =").replace("larg", "large")
        (tmp_path / "own.toml").write_text(cured_body)
        read_toml(tmp_path / "own.toml")


def test_a_number_may_be_a_word(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('[report]\nkeep = "all"\n')
    assert read_toml(tmp_path / "run.toml").report.keep == "all"
    (tmp_path / "run.toml").write_text('[report]\nkeep = "some"\n')
    with pytest.raises(ValueError, match="keep is 'some': a whole number or all is needed"):
        read_toml(tmp_path / "run.toml")
    with pytest.raises(SettingError, match="keep is 0: at least 1"):
        ReportSettings(keep=0)

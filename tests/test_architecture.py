"""The laws of the house: reading order, strangers, purity, docstrings."""

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gptsmith

PACKAGE = Path(gptsmith.__file__).parent
DOCS = PACKAGE.parent / "docs"
# Every import points to an earlier line.
READING_ORDER = """
    config accounting names quantized settings recipe runtime folder
    tokenizers.tokenizer tokenizers.build tokenizers
    data.shakespeare data.sources data.documents data.tokenfile data.shards data.encode
    data.prepare data.batches data
    cache attention loss model packed weights devices checkpoint sampling drafts graphs decode
    rows generate evaluate quantize precision
    convert.pickles convert.limits convert.huggingface convert.nanogpt convert.book convert.llmc
    convert.gguf_header convert.gguf_tokenizer convert.gguf
    convert.crc32c convert.bundle convert.tensorflow convert.hub convert.onnx
    convert.formats convert.compare convert.report convert.carry convert
    training.schedules training.muon training.optimizers training.loop training.plot
    training.progress training.run training.plan training.start training
    inspection.text inspection.describe inspection.trace inspection
    serving.job serving.choice serving.slots serving.engine serving.service
    serving.errors serving.fields serving.protocol serving.text serving.chat
    serving.answers serving.schema serving.metrics serving.guard serving.manual
    serving.writing serving.wire serving.served serving.server serving.listen serving
    bench profile turns comparison peers client load flags
    commands.words commands.text commands.train commands.use commands.look
    commands.load commands.measure commands.convert commands.quantize commands.serve commands
    cli __main__ __init__
""".split()
SIBLINGS = ("training", "convert", "inspection", "serving")
NO_TORCH = (
    "config accounting names quantized settings recipe runtime folder tokenizers data.prepare "
    "training.schedules inspection.describe flags cli"
).split()
MATHEMATICS = ("cache", "attention", "loss", "model", "packed")
PURE = {"torch", "math", "typing"}
# Heavy or optional: imported where used.
OPTIONAL = (
    "pyarrow",
    "torchao",
    "onnx",
    "transformers",
    "torch.utils.tensorboard",
    "wandb",
    "matplotlib",
    "resource",
    "torch._inductor",
    "gguf",
    "huggingface_hub",
)


def module_names() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names.append(".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts))
    return names


def path_of(name: str) -> Path:
    path = PACKAGE.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree_of(name: str) -> ast.Module:
    return ast.parse(path_of(name).read_text(encoding="utf-8"))


def resolve(name: str, node: ast.ImportFrom) -> Iterator[str]:
    """The package's own modules that a relative import fetches."""
    is_package = path_of(name).name == "__init__.py" and name != "__init__"
    here = name.split(".") if is_package else name.split(".")[:-1]
    base = here[: len(here) - (node.level - 1)]
    module = [*base, *(node.module or "").split(".")] if node.module else base
    for alias in node.names:
        for candidate in ([*module, alias.name], module):
            found = ".".join(candidate)
            if found in READING_ORDER:
                yield found
                break


def imports(name: str) -> Iterator[tuple[str, bool]]:
    """What a module imports of the package, and whether it does so inside a function."""
    tree = tree_of(name)
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            for found in resolve(name, node):
                yield found, id(node) in inside


def test_the_reading_order_names_every_module() -> None:
    assert sorted(READING_ORDER) == module_names()


@pytest.mark.parametrize("name", READING_ORDER)
def test_imports_point_to_earlier_modules(name: str) -> None:
    for imported, _ in imports(name):
        if imported == "__init__" or name == "__init__":
            continue
        assert READING_ORDER.index(imported) < READING_ORDER.index(name), imported


@pytest.mark.parametrize("name", READING_ORDER)
def test_imports_inside_functions_are_optional_or_the_doors(name: str) -> None:
    tree = tree_of(name)
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef) or name.startswith("commands."):
            continue
        for node in ast.walk(function):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                for module in modules:
                    assert str(module).startswith(OPTIONAL), f"{function.name} imports {module}"


@pytest.mark.parametrize("name", READING_ORDER)
def test_siblings_are_strangers(name: str) -> None:
    family = name.split(".")[0]
    for imported, _ in imports(name):
        other = imported.split(".")[0]
        if family in SIBLINGS and other in SIBLINGS:
            assert family == other


def test_the_model_is_only_mathematics() -> None:
    found = {imported for imported, _ in imports("model")}
    assert found == {"config", "cache", "attention", "loss"}
    for name in MATHEMATICS:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= PURE
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).split(".")[0] in PURE


@pytest.mark.parametrize("name", NO_TORCH)
def test_no_torch_where_an_answer_should_be_quick(name: str) -> None:
    code = f"import sys, gptsmith.{name}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", READING_ORDER)
def test_only_the_door_and_progress_write_and_only_runtime_reads_the_environment(name: str) -> None:
    text = path_of(name).read_text(encoding="utf-8")
    if name != "training.progress" and not name.startswith(("cli", "commands.")):
        assert not re.search(r"\bprint\(|sys\.stdout|sys\.stderr", text)
    if name != "runtime":
        assert not re.search(r"environ|getenv", text)


@pytest.mark.parametrize("name", READING_ORDER)
def test_no_state_outside_functions_and_nothing_unsafe(name: str) -> None:
    for node in ast.walk(tree_of(name)):
        assert not isinstance(node, ast.Global)
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("exec", "eval", "pickle.load", "pickle.loads")
            if called == "torch.load":
                assert name == "convert.pickles"
                assert "weights_only=True" in map(ast.unparse, node.keywords)
        if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            assert (name, methods) == ("convert.pickles", ["find_class"])


@pytest.mark.parametrize("name", READING_ORDER)
def test_everything_public_says_what_it_is(name: str) -> None:
    tree = tree_of(name)
    assert ast.get_docstring(tree), "the module has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            registers_flags = name.startswith("commands.") and node.name.startswith("add_")
            assert registers_flags or ast.get_docstring(node), f"{node.name} has no docstring"


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in READING_ORDER
        if n
        in (
            *MATHEMATICS,
            "training.muon",
            "sampling",
            "drafts",
            "graphs",
            "decode",
            "rows",
            "generate",
        )
    ],
)
def test_functions_of_tensors_give_their_shapes(name: str) -> None:
    """A class's docstring may speak for its methods."""
    for node in tree_of(name).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        signature = ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))
        if "Tensor" in signature:
            assert re.search(r"\([A-Z1](, [^)]+)?,?\)", ast.get_docstring(node) or ""), node.name


@pytest.mark.parametrize("name", READING_ORDER)
def test_proportions(name: str) -> None:
    """Files of one sitting, functions of one look."""
    lines = path_of(name).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 420, len(lines)
    for node in ast.walk(tree_of(name)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 70, node.name


def test_the_tour_walks_through_every_module_in_this_order() -> None:
    tour = (DOCS / "tour.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\* `([\w./]+)\.py`", tour, flags=re.MULTILINE)
    expected = [
        name.replace(".", "/") for name in READING_ORDER if path_of(name).stem != "__init__"
    ]
    assert shown == [name for name in expected if name != "__main__"]


def test_the_surface_is_what_it_says() -> None:
    for name in gptsmith.__all__:
        assert getattr(gptsmith, name) is not None
    assert not inspect.ismodule(gptsmith.generate_greedy)

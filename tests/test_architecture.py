"""The laws of the house: rooms in import order, strangers, purity, docstrings, proportions.

Each file is read and parsed once; a law that is broken lists every place that breaks it.
"""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

import gptsmith

PACKAGE = Path(gptsmith.__file__).parent
ROOT = PACKAGE.parent
# Every import points to an earlier room, or stays within its own.
ROOMS = (
    "config",
    "machine",
    "tokenizers",
    "data",
    "model",
    "checkpoint",
    "generation",
    "evaluation",
    "training",
    "finetuning",
    "inspection",
    "convert",
    "serving",
    "cli",
)
STRANGERS = ("convert", "inspection", "serving", "training", "finetuning")
BESIDE_THE_ROOMS = ("recipes", "__init__.py", "__main__.py", "py.typed")
# What the mathematics is written in.
PURE = {"torch", "math", "typing", "collections", "dataclasses"}
# What a module needs besides, to call the C++ file beside it.
TO_CALL_CPP = {"ctypes", "functools", "pathlib", "warnings"}
# What answers quickly does without PyTorch.
NO_TORCH = (
    "config",
    "machine.dtypes",
    "machine.environment",
    "machine.files",
    "machine.terminal",
    "tokenizers",
    "data.prepare",
    "checkpoint.finding",
    "checkpoint.folder",
    "checkpoint.loading",
    "convert.formats",
    "training.compare",
    "training.schedules",
    "cli.main",
)
# Heavy or optional: imported where used.
OPTIONAL = (
    "gguf",
    "huggingface_hub",
    "matplotlib",
    "onnx",
    "pyarrow",
    "ray",
    "resource",
    "torch._inductor",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch.utils.tensorboard",
    "torchao",
    "transformers",
    "wandb",
)
LONGEST_FILE, LONGEST_FUNCTION = 425, 70  # lines
VERBS = ("load", "save", "train", "finetune", "generate", "stream", "evaluate", "describe")


@dataclass
class Module:
    """A file of the package, read and parsed once."""

    name: str  # "model.gpt"
    path: Path
    text: str
    tree: ast.Module = field(repr=False)

    @property
    def room(self) -> str:
        return self.name.partition(".")[0]

    @cached_property
    def functions(self) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
        found = (ast.FunctionDef, ast.AsyncFunctionDef)
        return [node for node in ast.walk(self.tree) if isinstance(node, found)]

    @cached_property
    def imports(self) -> list[tuple[str, str, bool]]:
        """(module of the package or of others, what is taken from it, whether in a function)."""
        inside = {id(node) for function in self.functions for node in ast.walk(function)}
        here = self.name.split(".")
        if self.path.name != "__init__.py":
            here = here[:-1]
        found = []
        for node in ast.walk(self.tree):
            deep = id(node) in inside
            if isinstance(node, ast.Import):
                found += [(alias.name, "", deep) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found += [(str(node.module), alias.name, deep) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = ["", *here[: len(here) - node.level + 1]]
                module = ".".join(base + (node.module.split(".") if node.module else []))
                found += [(module or ".", alias.name, deep) for alias in node.names]
        return found

    def own_imports(self) -> Iterator[tuple[str, bool]]:
        """The modules of the package that this one imports, and whether in a function."""
        for module, taken, deep in self.imports:
            if not module.startswith("."):
                continue
            whole = f"{module}.{taken}".strip(".")
            yield (whole if whole in MODULES else module.strip(".") or "__init__"), deep


def read_all() -> dict[str, Module]:
    modules = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        text = path.read_text(encoding="utf-8")
        modules[name] = Module(name, path, text, ast.parse(text))
    return modules


MODULES = read_all()
IN_ROOMS = [module for module in MODULES.values() if module.room in ROOMS]


def none_of(broken: list[str]) -> None:
    """Fail with one line for each place that breaks a law."""
    assert not broken, "\n" + "\n".join(broken)


# -- 1: import order


def test_the_house_has_these_rooms_and_nothing_else() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    assert there == {*ROOMS, *BESIDE_THE_ROOMS}


def test_the_readme_shows_the_rooms_that_there_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = re.search(r"^gptsmith/\n(?:[ ]+\S.*\n)+", text, flags=re.MULTILINE)
    assert tree, "the README shows no tree of rooms"
    shown = re.findall(r"^ +([\w.]+)/?(?:\s|$)", tree[0], flags=re.MULTILINE)
    assert shown == [*ROOMS, *BESIDE_THE_ROOMS]


def test_every_import_points_to_an_earlier_room() -> None:
    none_of(
        [
            f"{module.name} imports {imported}, which is in a later room"
            for module in IN_ROOMS
            for imported, _ in module.own_imports()
            if imported not in ("__init__",)
            and ROOMS.index(imported.partition(".")[0]) > ROOMS.index(module.room)
        ]
    )


def test_no_file_imports_itself_by_way_of_others() -> None:
    edges = {
        module.name: {name for name, _ in module.own_imports() if name != module.name}
        for module in MODULES.values()
        if module.name not in ("__init__", "__main__")
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            pytest.fail(" -> ".join((*path[path.index(name) :], name)))
        if name not in done:
            for imported in sorted(edges.get(name, ())):
                visit(imported, (*path, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_imports_in_functions_are_of_optional_packages_or_at_the_door() -> None:
    none_of(
        [
            f"{module.name} imports {imported} in a function"
            for module in IN_ROOMS
            if module.room != "cli"
            for imported, taken, deep in module.imports
            if deep and not f"{imported}.{taken}".startswith(OPTIONAL)
        ]
    )


# -- 2: strangers


def test_strangers_do_not_import_one_another() -> None:
    none_of(
        [
            f"{module.name} imports {imported}"
            for module in IN_ROOMS
            if module.room in STRANGERS
            for imported, _ in module.own_imports()
            if (other := imported.partition(".")[0]) in {*STRANGERS} - {module.room}
            and (module.room, other) != ("finetuning", "training")  # which it stands on
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("room", STRANGERS)
def test_the_rest_works_without_a_stranger(room: str, tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "gptsmith", ignore=shutil.ignore_patterns("__pycache__"))
    gone = {room, "finetuning"} if room == "training" else {room}
    for each in gone:
        shutil.rmtree(tmp_path / "gptsmith" / each)
    rest = [module.name for module in IN_ROOMS if module.room not in {*gone, "cli"}]
    code = (
        f"import importlib, gptsmith; assert {str(tmp_path)!r} in gptsmith.__file__\n"
        f"for name in {rest!r}: importlib.import_module('gptsmith.' + name)\n"
        "from gptsmith.cli.main import main; assert main(['--help']) == 0"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: gptsmith" in done.stdout


# -- 3: purity


def test_the_model_is_only_mathematics() -> None:
    broken = []
    for module in [module for module in IN_ROOMS if module.room == "model"]:
        ours, others = [".config", ".model"], PURE
        if module.path.with_suffix(".cpp").exists():  # the mathematics, in C++
            ours, others = [*ours, ".machine.native"], PURE | TO_CALL_CPP
        for imported, _, _ in module.imports:
            if not imported.startswith(tuple(ours)) and imported.split(".")[0] not in others:
                broken.append(f"{module.name} imports {imported}")
    none_of(broken)


def test_no_torch_where_an_answer_should_be_quick() -> None:
    quick = [m.name for m in IN_ROOMS if m.name in NO_TORCH or m.room in NO_TORCH]
    code = (
        "import importlib, sys\n"
        f"for name in {quick!r}:\n"
        "    importlib.import_module('gptsmith.' + name)\n"
        "    assert 'torch' not in sys.modules, name"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- 5 and 6: state, the environment, the terminal


def test_only_the_environment_module_reads_the_environment() -> None:
    readers = [m.name for m in MODULES.values() if re.search(r"\benviron\b|getenv", m.text)]
    assert readers == ["machine.environment"]


def test_only_the_door_and_the_terminal_write_to_it() -> None:
    writing = re.compile(r"(?<![\w.])print\(|sys\.stdout|sys\.stderr")
    none_of(
        [
            f"{module.name} writes to the terminal"
            for module in IN_ROOMS
            if module.room != "cli" and module.name != "machine.terminal"
            if writing.search(module.text)
        ]
    )


def test_no_state_outside_functions_and_nothing_unsafe() -> None:
    broken = []
    for module in MODULES.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                broken.append(f"{module.name} reassigns {', '.join(node.names)} of its module")
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called in ("exec", "eval", "pickle.load", "pickle.loads"):
                    broken.append(f"{module.name} calls {called}")
                safe = "weights_only=True" in map(ast.unparse, node.keywords)
                if called == "torch.load" and not (module.name == "convert.pickles" and safe):
                    broken.append(f"{module.name} calls torch.load")
            if isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(
                ast.unparse, node.bases
            ):
                methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
                if (module.name, methods) != ("tokenizers.pickled", ["find_class"]):
                    broken.append(f"{module.name} has an unpickler with {methods}")
    none_of(broken)


# -- 7: docstrings


def test_everything_public_says_what_it_is() -> None:
    broken = [f"{m.name} has no docstring" for m in MODULES.values() if not docstring(m.tree)]
    for module in MODULES.values():
        for node in module.tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not (node.name.startswith("_") or docstring(node)):
                broken.append(f"{module.name}.{node.name} has no docstring")
    none_of(broken)


def docstring(node: ast.Module | ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> str:
    return ast.get_docstring(node) or ""


def test_functions_of_tensors_give_their_shapes() -> None:
    """A class's docstring may speak for its methods."""
    shape = re.compile(r"\((?:\.\.\.|[A-Z0-9])[^)]*\)|any shape|\(\)")
    broken = []
    for module in IN_ROOMS:
        for node in module.tree.body:
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            signature = ast.unparse(node.args) + ast.unparse(node.returns or ast.Constant(None))
            if re.search(r"\bTensor\b", signature) and not shape.search(docstring(node)):
                broken.append(f"{module.name}.{node.name} gives no shapes")
    none_of(broken)


# -- 9: verbs, and proportions


def test_the_surface_is_what_it_says() -> None:
    for name in gptsmith.__all__:
        assert getattr(gptsmith, name) is not None
        assert name not in MODULES, "once imported, the module would stand in its place"
    assert {*VERBS} <= {*gptsmith.__all__}
    for verb in VERBS:
        assert inspect.isfunction(getattr(gptsmith, verb))


def test_proportions() -> None:
    """Files of one sitting, functions of one look."""
    broken = []
    for module in MODULES.values():
        lines = len(module.text.splitlines())
        if lines > LONGEST_FILE:
            broken.append(f"{module.name} has {lines} lines")
        for function in module.functions:
            length = (function.end_lineno or 0) - function.lineno
            if length > LONGEST_FUNCTION:
                broken.append(f"{module.name}.{function.name} has {length} lines")
    none_of(broken)


def test_the_tour_lists_every_file_in_this_order() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\* `(\w+)/(\w+)\.py`", tour, flags=re.MULTILINE)
    there = {tuple(m.name.split(".")) for m in IN_ROOMS if m.path.name != "__init__.py"}
    assert set(shown) == there
    assert len(shown) == len(there)
    rooms = [room for room, _ in shown]
    assert rooms == sorted(rooms, key=ROOMS.index)

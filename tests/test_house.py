"""The house: imports point down, heavy libraries stay out until they are needed, files stay small."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import distconv
from tests.files import python

PACKAGE = Path(distconv.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# From the roof down: who stands on a floor may use what lies below, and a folder's files one another.
FLOORS = (
    # Commands, which nobody imports.
    (
        "train",
        "launch",
        "evaluate",
        "misclassified",
        "export",
        "report",
        "prove",
        "reproduce",
        "bench",
        "doctor",
        "__main__",
    ),
    ("benchmarks", "checkup"),
    ("supervise",),
    ("run",),
    ("pictures",),
    ("settings",),
    ("config",),
    ("command_line",),
    ("tasks",),
    ("nn", "data", "comm"),
    ("monitor",),
    ("process",),
    ("kernels", "factory"),
    ("errors", "formatting"),
)
COMMANDS = FLOORS[0]
ALLOWED = {  # libraries that only some may import; for type hints alone, all may
    "mpi4py": ("comm/world.py",),
    "cupy": ("comm/world.py", "kernels/"),
    "numba": ("kernels/",),
}


def floor(part: str) -> int:
    """The number of a part's floor, counted from the roof."""
    for number, parts in enumerate(FLOORS):
        if part in parts:
            return number
    raise AssertionError(f"distconv/{part} stands on no floor: give it one in FLOORS")


def imports(node: ast.AST, with_hints: bool = True) -> Iterator[tuple[str, int]]:
    """All modules that a file imports, within functions too, each with its line."""
    for child in ast.iter_child_nodes(node):
        for_hints = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
        if isinstance(child, ast.Import):
            yield from ((alias.name, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: a relative import hides where it leads"
            yield from ((f"{child.module}.{alias.name}", child.lineno) for alias in child.names)
        elif with_hints or not for_hints:
            yield from imports(child, with_hints)


def part_of(module: str) -> str | None:
    """distconv.nn.layers.Conv -> nn; None for other packages, and for names of distconv/__init__ itself."""
    package, _, rest = module.partition(".")
    part = rest.split(".")[0]
    there = (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists()
    return part if package == "distconv" and part and there else None


def broken_rules(source: str, name: str) -> list[str]:
    """What a file, by its path within the package, imports against the rules."""
    parts = Path(name).parts
    mine = (parts[-1] if parts[-1] == "__main__.py" else parts[0]).removesuffix(".py")  # of a room, too, a command
    tree, broken = ast.parse(source), []
    for module, line in imports(tree):
        part = part_of(module)
        if part is None or part == mine:
            continue
        if mine == "kernels" or floor(part) <= floor(mine):
            broken.append(f"{name}:{line} imports {module}")
    for module, line in imports(tree, with_hints=False):
        allowed = ALLOWED.get(module.split(".")[0])
        if allowed is not None and not name.startswith(allowed):
            broken.append(f"{name}:{line} imports {module}")
    return broken


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down_and_heavy_libraries_have_their_places(path: Path) -> None:
    name = str(path.relative_to(PACKAGE))
    if name == "__init__.py":
        found = [module for module, _ in imports(ast.parse(path.read_text()), with_hints=False)]
        assert found == ["typing.TYPE_CHECKING", "distconv.comm.allreduce.Allreduce"]  # this one when it is first used
    else:
        floor(Path(name).parts[0].removesuffix(".py"))
        assert broken_rules(path.read_text(), name) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("kernels/cpu/arithmetic.py", "from distconv.errors import BadDataError"),
        ("nn/layers.py", "def f():\n    from distconv import config"),
        ("nn/layers.py", "from distconv.data.dataset import Dataset"),
        ("config.py", "import distconv.run.loop"),
        ("run/loop.py", "from distconv.train import main"),
        ("prove.py", "try:\n    from distconv import bench\nexcept ImportError: pass"),
        ("errors.py", "if TYPE_CHECKING:\n    from distconv.config import Config"),
        ("comm/exchange.py", "from mpi4py import MPI"),
        ("run/loop.py", "class A:\n    def f(self):\n        import mpi4py.MPI"),
        ("comm/exchange.py", "import cupy as cp"),
        ("nn/layers.py", "from numba import njit"),
    ],
)
def test_the_rules_see_what_breaks_them(name: str, source: str) -> None:
    assert len(broken_rules(source, name)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("comm/exchange.py", "if TYPE_CHECKING:\n    from mpi4py import MPI"),
        ("comm/world.py", "def f():\n    from mpi4py import MPI\n    import cupy"),
        ("kernels/gpu/device.py", "import cupy\nfrom distconv.kernels import cpu"),
        ("train.py", "from distconv import __version__, errors"),
    ],
)
def test_the_rules_let_pass_what_is_right(name: str, source: str) -> None:
    assert broken_rules(source, name) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_file_can_be_read_at_a_sitting(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


def loaded(*arguments: str) -> set[str]:
    """The packages that a fresh interpreter imports; it must end well."""
    result = python("-X", "importtime", *arguments)
    assert result.returncode == 0, result.stderr
    times = [line for line in result.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in times}


def test_importing_the_package_starts_nothing() -> None:
    found = loaded("-c", "import distconv")
    assert "distconv" in found and not found & {"mpi4py", "numpy", "numba", "cupy"}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_mpi_and_no_arithmetic(command: str) -> None:
    """Besides, who has loaded NumPy can no longer say how many threads it takes."""
    found = loaded("-m", f"distconv.{command}", "--help")
    assert "distconv" in found and not found & {"mpi4py", "numba", "cupy", "numpy"}


def test_the_printed_settings_need_no_mpi_and_no_arithmetic() -> None:
    found = loaded("-m", "distconv.train", "--print-config")
    assert "distconv" in found and not found & {"mpi4py", "numba", "cupy", "numpy"}


def test_the_table_of_failures_names_tests_that_are_there() -> None:
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "failures.md").read_text()
    rows = [line.split("|")[-2] for line in text.splitlines() if "test_" in line and line.startswith("|")]
    assert len(rows) > 30
    for row in rows:
        files = [tests / f"{name}.py" for name in re.findall(r"(?:parallel/)?test_\w+", row)]
        assert files and all(file.exists() for file in files), row
        source = "".join(file.read_text() for file in files)
        for words in re.findall(r"`…?(\w+)…`", row):
            assert re.search(rf"def test_\w*{words}", source), words

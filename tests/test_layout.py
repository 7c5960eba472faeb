"""The package's layers: a module imports from its own layer and from those below it, never upward."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import flashdecpp

PACKAGE = Path(flashdecpp.__file__).parent
# The layers that each one may import, besides itself and "ops": every module of the package's own folder that
# isn't named here. "flashdecpp" is the package's __init__, whose public names come from all layers.
BELOW: dict[str, set[str]] = {
    "ops": set(),
    "models": set(),
    "loading": {"models"},
    "engine": {"models", "loading"},
    "calibration": {"models", "loading", "engine"},
    "integrations": {"models", "loading", "engine"},
    "tuning": set(),
    "info": {"tuning"},
}
BELOW["cli"] = {*BELOW, "flashdecpp"}
BELOW["flashdecpp"] = BELOW["__main__"] = {*BELOW}


def imported_names(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """The line and the full dotted name of everything that a file imports, inside functions as well."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (base, node.module)))
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer(name: str) -> str:
    """The layer of the package, of one of its modules, or of a name in either."""
    head = (*name.split("."), "")[1]
    if head in BELOW:
        return head
    return "ops" if head and any(PACKAGE.glob(f"{head}.*")) else "flashdecpp"


def upward_imports(root: Path) -> list[str]:
    """Every forbidden import of the package in `root`: its file, line, layer and name."""
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(parts).removesuffix(".__init__")
        own = layer(module)
        for line, name in imported_names(path, module):
            if name.startswith("flashdecpp.") and layer(name) not in {own, "ops", *BELOW[own]}:
                found.append(f"{path.relative_to(root.parent)}:{line}: {own} may not import {name}")
    return found


def test_imports_go_one_way() -> None:
    found = upward_imports(PACKAGE)
    assert not found, "\n".join(found)


def test_every_folder_is_a_layer() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} <= BELOW.keys()


@pytest.mark.parametrize(
    ("file", "line", "refused"),
    [
        ("models/decoder.py", "from flashdecpp.engine.llm import LLM", "flashdecpp.engine.llm.LLM"),
        ("models/decoder.py", "from ..loading import weights", "flashdecpp.loading.weights"),
        ("models/decoder.py", "from flashdecpp import LLM", "flashdecpp.LLM"),
        ("models/decoder.py", "def f():\n    import flashdecpp.cli.app", "flashdecpp.cli.app"),
        ("loading/__init__.py", "from ..engine import llm", "flashdecpp.engine.llm"),
        ("engine/engine.py", "from flashdecpp import calibration", "flashdecpp.calibration"),
        ("calibration/text.py", "from flashdecpp.cli import main", "flashdecpp.cli.main"),
        ("tuning/tuner.py", "from flashdecpp.models import rope", "flashdecpp.models.rope"),
        ("ops.py", "from . import tuning", "flashdecpp.tuning"),
        ("_memory.py", "from .models.rope import Rope", "flashdecpp.models.rope.Rope"),
    ],
)
def test_an_upward_import_is_found(tmp_path: Path, file: str, line: str, refused: str) -> None:
    path = tmp_path / "flashdecpp" / file
    path.parent.mkdir(parents=True)
    path.write_text(f"from flashdecpp import _C, ops\n{line}\n")
    (found,) = upward_imports(tmp_path / "flashdecpp")
    assert found.startswith(f"flashdecpp/{file}:{1 + len(line.splitlines())}: ")
    assert found.endswith(f" may not import {refused}")


def test_public_names_resolve() -> None:
    assert len(set(flashdecpp.__all__)) == len(flashdecpp.__all__)
    for name in flashdecpp.__all__:
        assert getattr(flashdecpp, name).__name__ in (name, f"flashdecpp.{name}")

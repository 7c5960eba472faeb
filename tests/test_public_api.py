"""The public names of the package: one flat list, documented, typed, and cheap to import."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashdecpp
from flashdecpp import _C, _requirements

PACKAGE = Path(flashdecpp.__file__).parent


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_dir_lists_the_public_names() -> None:
    assert [name for name in dir(flashdecpp) if not name.startswith("_")] == sorted(flashdecpp.__all__)
    assert {"__version__", "__all__", "__doc__"} <= set(dir(flashdecpp))


def test_dir_is_the_same_before_anything_is_used() -> None:
    assert run("import flashdecpp; print(*dir(flashdecpp))").split() == dir(flashdecpp)


def test_the_docstring_has_a_line_for_each_name() -> None:
    assert flashdecpp.__doc__ is not None
    documented = re.findall(r"^- `(\w+)`: \S", flashdecpp.__doc__, re.MULTILINE)
    assert sorted(documented) == sorted(flashdecpp.__all__)


def test_star_import_brings_exactly_these_names() -> None:
    namespace: dict[str, object] = {}
    exec("from flashdecpp import *", namespace)
    assert namespace.keys() - {"__builtins__"} == set(flashdecpp.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'flashdecpp' has no attribute 'Engine'"):
        _ = flashdecpp.Engine  # type: ignore[attr-defined]


def test_transformers_is_imported_on_first_use() -> None:
    code = "import sys, flashdecpp; print('transformers' in sys.modules); flashdecpp.{}; "
    code += "print('transformers' in sys.modules)"
    assert run(code.format("ops")).split() == ["False", "False"]
    assert run(code.format("accelerate")).split() == ["False", "True"]


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").exists()
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    assert 'flashdecpp = ["py.typed", "_C.pyi"]' in project


def test_the_stub_of_the_extension_names_what_it_has() -> None:
    for node in ast.parse((PACKAGE / "_C.pyi").read_text()).body:
        if isinstance(node, ast.FunctionDef):
            assert callable(getattr(_C, node.name))
        elif isinstance(node, ast.AnnAssign):
            assert isinstance(node.target, ast.Name) and hasattr(_C, node.target.id)
        elif isinstance(node, ast.ClassDef):
            members = vars(getattr(_C, node.name))
            functions = {x.name for x in node.body if isinstance(x, ast.FunctionDef)}
            values = {t.id for x in node.body if isinstance(x, ast.Assign) for t in x.targets}  # type: ignore[attr-defined]
            assert functions | values <= members.keys(), node.name


RUNNER = {
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "gguf",
    "typer",
}


def without(packages: set[str], code: str) -> str:
    """What a fresh interpreter prints where these packages are not installed."""
    return run(f"import sys; sys.modules.update(dict.fromkeys({sorted(packages)}))\n{code}")


def test_the_ops_need_the_base_packages_only() -> None:
    code = """
import torch, flashdecpp
from flashdecpp import ops, quantize_, QuantizedLinear, BlockPool, check
assert torch.ops.flashdecpp.linear and flashdecpp.tuning.find_tables().problems == []
x = torch.ones(1, 32)
model = torch.nn.Sequential(torch.nn.Linear(32, 8))
quantize_(model)
print(ops.linear(x, torch.ones(8, 32)).sum().item(), type(model[0]) is QuantizedLinear)
print(BlockPool(4).free_blocks)
"""
    assert without(RUNNER, code).split() == ["256.0", "True", "4"]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("LLM", "gguf"),
        ("LLM", "transformers"),
        ("SamplingParams", "tokenizers"),
        ("Guide", "tokenizers"),
        ("accelerate", "transformers"),
    ],
)
def test_a_package_of_the_extra_that_is_missing_is_one_sentence(name: str, package: str) -> None:
    code = f"""
try:
    from flashdecpp import {name}
except ImportError as error:
    print(error)
"""
    wanted = f"{name} needs {package}, which is not installed: pip install 'flashdecpp[runner]'"
    assert without({package}, code).strip() == wanted


def test_what_needs_the_extra_is_known() -> None:
    project = (PACKAGE.parent / "pyproject.toml").read_text()
    extra = re.search(r"^runner = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    assert extra is not None
    assert {re.split("[>=]", name)[0] for name in re.findall(r'"([^"]+)"', extra[1])} == RUNNER
    assert {package for needed in _requirements.NEEDED.values() for package in needed} == RUNNER


def test_what_imports_the_package_has_the_ops_at_once() -> None:
    code = (
        "import sys, flashdecpp, torch; print(torch.ops.flashdecpp.linear, 'flashdecpp.ops' in sys.modules)"
    )
    assert run(code).split() == ["flashdecpp.linear", "True"]


def test_a_cpu_needs_no_compiler_for_its_masks() -> None:
    code = "import sys, flashdecpp; flashdecpp.LLM; print('torch.nn.attention.bias' in sys.modules)"
    assert run(code).split() == ["False"]

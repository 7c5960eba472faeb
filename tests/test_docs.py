"""What the documentation says that a program can check: links, paths, code, options, tables."""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from flashdecpp import ops
from flashdecpp.cli.app import app
from flashdecpp.models.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def fences(text: str, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def inline_code(text: str) -> list[str]:
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(text))]


def table(page: str, first_header: str) -> list[list[str]]:
    """The rows of a table, cell by cell, found by its first header."""
    lines = iter((ROOT / page).read_text().splitlines())
    for line in lines:
        if line.startswith(f"| {first_header} |"):
            break
    else:
        raise AssertionError(f"{page} has no table that begins with {first_header}")
    next(lines)
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -------------------------------------------------------------------------------------- pages and paths


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\((docs/[^)#]+)", README.read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in DOCS}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        there = page.parent / path
        if not there.exists() or (anchor and anchor not in anchors(there.read_text() if path else text)):
            broken.append(target)
    return broken


def anchors(text: str) -> set[str]:
    """Those that GitHub makes of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_resolve(page):
    assert broken_links(page, page.read_text()) == []


def test_a_broken_link_is_found():
    text = (
        "# One two\n[a](nowhere.md) [b](README.md#one-two) [c](README.md#three) [d](#one-two) [e](http://x)"
    )
    assert broken_links(README, text) == ["nowhere.md", "README.md#one-two", "README.md#three"]


def missing_paths(text: str) -> list[str]:
    """Paths into this repository that are not there, in inline code; a name may be a pattern."""
    paths = re.compile(r"(csrc|flashdecpp|tests|bench|docs|examples)/[\w./*-]*")
    return [code for code in inline_code(text) if paths.fullmatch(code) and not list(ROOT.glob(code))]


@every_page
def test_paths_exist(page):
    assert missing_paths(page.read_text()) == []


def test_a_missing_path_is_found():
    assert missing_paths("`csrc/cuda/arch.h` `csrc/*/linear.c*` `csrc/cuda/gone.h`") == ["csrc/cuda/gone.h"]


def missing_results(text: str) -> list[str]:
    """Result files that are named and not there, but for lines whose figures are still to be filled in."""
    lines = [line for line in text.splitlines() if "@@" not in line]
    results = re.findall(r"`(?:bench/results/)?(\w+_(?:h100|h200|cpu\w*)\.(?:json|png))`", "\n".join(lines))
    return [name for name in results if not (ROOT / "bench" / "results" / name).exists()]


@every_page
def test_results_exist(page):
    assert missing_results(page.read_text()) == []


def test_a_missing_result_is_found():
    text = "`runner_h100.json` `gone_h100.json`\n| @@x@@ | `later_h200.json` |"
    assert missing_results(text) == ["gone_h100.json"]


# ------------------------------------------------------------------------------------------------- code


def needs_a_model(code: str) -> bool:
    return "LLM(" in code or ".from_pretrained(" in code


@every_page
def test_python_runs(page):
    """The blocks of a page, one after the other; of those that need a model, what they import."""
    namespace: dict[str, object] = {"__name__": "docs"}
    for number, code in enumerate(fences(page.read_text(), "python")):
        tree = ast.parse(code)
        if needs_a_model(code):
            tree.body = [part for part in tree.body if isinstance(part, ast.Import | ast.ImportFrom)]
        exec(compile(tree, f"{page.name}, block {number}", "exec"), namespace)


def test_python_is_there_to_run():
    runnable = [
        code for page in PAGES for code in fences(page.read_text(), "python") if not needs_a_model(code)
    ]
    assert len(runnable) >= 6


# ---------------------------------------------------------------------------------------------- options

COMMANDS = {
    name: {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    | {"--help"}
    for name, command in typer.main.get_command(app).commands.items()
}


def script_options(script: str) -> set[str]:
    return {"--help", *re.findall(r'"(--?[\w-]+)"', (ROOT / script).read_text())}


def command_lines(text: str) -> Iterator[list[str]]:
    """Words of `flashdecpp COMMAND ...` and `python SCRIPT ...`, in blocks and in inline code."""
    lines = [line for code in fences(text, "") for line in code.replace("\\\n", " ").splitlines()]
    for line in [*lines, *inline_code(text)]:
        start = re.search(r"(?:^|\s)(flashdecpp [a-z]|python (?:bench|tests)/)", line)
        if start:
            words = shlex.split(line[start.start(1) :], comments=True)
            yield words[: words.index("<")] if "<" in words else words


def unknown_options(text: str) -> list[str]:
    """Commands, and options of commands and scripts, that there are not."""
    unknown = []
    for program, what, *words in command_lines(text):
        given = [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        if program == "flashdecpp" and what not in COMMANDS:
            unknown.append(what)
        else:
            known = COMMANDS[what] if program == "flashdecpp" else script_options(what)
            unknown += [option for option in given if option not in known]
    anywhere = set.union(*COMMANDS.values(), *map(script_options, SCRIPTS))
    unknown += [
        option
        for code in inline_code(text)
        if code.startswith("--")
        for option in code.split()
        if option.startswith("--") and option not in anywhere
    ]
    return unknown


SCRIPTS = [str(path.relative_to(ROOT)) for path in (ROOT / "bench").glob("*.py")]


@every_page
def test_options_exist(page):
    assert unknown_options(page.read_text()) == []


def test_an_unknown_option_is_found():
    text = """`--phi` `--phj` `flashdecpp tune --shapes '1,2' --depth 3` `flashdecpp fly`

```
flashdecpp info -q
python bench/linear.py --chain --gone
```
"""
    assert sorted(unknown_options(text)) == ["--depth", "--gone", "--phj", "-q", "fly"]


@every_page
def test_make_targets_exist(page):
    text = page.read_text()
    lines = [line for code in fences(text, "") for line in code.splitlines()] + inline_code(text)
    asked = {found[1] for line in lines if (found := re.match(r"make ([a-z-]+)", line))}
    assert asked <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


# ----------------------------------------------------------------------------------------------- tables


def test_every_environment_variable_is_documented():
    files = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("flashdecpp", "csrc", "bench", "build_support"):
        files += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp", ".cu")]
    read = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\(|listed\()"(\w+)"(?!\] =)|ENV\{(\w+)\}""")
    found = {a or b for path in files for a, b in read.findall(path.read_text())} - {"PATH"}
    assert {name for row in table("docs/building.md", "variable") for name in names(row[0])} == found


def test_every_dependency_is_documented():
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r"^(?:dependencies|runner) = \[(.*?)\]", project, re.MULTILINE | re.DOTALL)
    packages = {re.split(r"[>=]", package)[0] for package in re.findall(r'"([^"]+)"', " ".join(wanted))}
    assert len(wanted) == 2
    rows = table("docs/building.md", "package")
    assert {name.split()[0] for row in rows for name in row[0].split(",")} == packages


def test_what_includes_torch_is_documented():
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    found = {str(path.relative_to(ROOT)) for path in files if "#include <torch/" in path.read_text()}
    (row,) = [row for row in table("CONTRIBUTING.md", "where") if re.search("includes? torch", row[1])]
    assert set(names(row[0])) == found


def test_every_family_is_documented():
    rows = table("docs/models.md", "family")
    assert {name for row in rows for name in names(row[1])} == {a.name for a in ARCHITECTURES}
    gguf = {a.gguf for a in ARCHITECTURES if a.gguf}
    assert {name for row in rows for name in names(row[2])} == gguf


def test_every_op_is_documented():
    text = (ROOT / "docs" / "ops.md").read_text()
    assert [name for name in ops.__all__ if not re.search(rf"`(?:ops\.|flashdecpp\.)?{name}\b", text)] == []


def test_ablations_are_those_measured():
    results = json.loads((ROOT / "bench" / "results" / "runner_h100.json").read_text())["results"]
    measured = [row["ms"] for row in results["models"]["llama-2-7b"]["ablations"]]
    written = [[float(ms) for ms in row[1:]] for row in table("docs/benchmarks.md", "ms per decode step")]
    kinds = ("all", "online softmax", "linear: gemv alone", "linear: flat_gemm alone", "linear: blas alone")
    assert written == [[row[kind] for row in measured] for kind in kinds]

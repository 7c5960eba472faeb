"""Where progress bars are drawn: on a terminal and in a notebook, and nowhere else."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from flashdecpp._progress import in_notebook, progress_bar


def pretend_ipython(monkeypatch: pytest.MonkeyPatch, config: dict[str, object]) -> None:
    module = ModuleType("IPython")
    module.get_ipython = lambda: SimpleNamespace(config=config)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", module)


def drawn(capsys: pytest.CaptureFixture[str], shown: bool = True) -> str:
    with progress_bar(total=2, desc="counting", unit=" steps", shown=shown) as bar:
        bar.update()
        bar.refresh()
    out, err = capsys.readouterr()
    assert out == ""  # which belongs to answers
    return err


def test_a_pipe_gets_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert not in_notebook()
    assert drawn(capsys) == ""


def test_a_terminal_gets_a_bar_if_it_is_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert "counting" in drawn(capsys)
    assert drawn(capsys, shown=False) == ""


def test_a_notebook_gets_a_bar_although_it_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_ipython(monkeypatch, {"IPKernelApp": {}})
    assert in_notebook()
    assert "counting" in drawn(capsys)
    assert drawn(capsys, shown=False) == ""


def test_ipython_without_a_kernel_is_no_notebook(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_ipython(monkeypatch, {"TerminalIPythonApp": {}})
    assert not in_notebook()
    assert drawn(capsys) == ""

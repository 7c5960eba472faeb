"""Plots a table. Needs matplotlib."""

from __future__ import annotations

import math
from pathlib import Path

from .table import Table

COLORS = {"gemv": "#c8102e", "flat_gemm": "#2a7f3f", "blas": "#174a7c"}


def plot(table: Table, path: Path) -> None:
    """Writes a PNG with a panel per shape: time over M of each implementation, and the inflection points."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    columns = min(3, len(table.profiles))
    lines = math.ceil(len(table.profiles) / columns)
    figure = Figure(figsize=(5 * columns, 3.6 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for profile, axes in zip(table.profiles, panels, strict=False):
        for impl, times in profile.us.items():
            measured = [(m, time) for m, time in zip(profile.m, times, strict=True) if time is not None]
            axes.plot(*zip(*measured, strict=True), marker=".", color=COLORS[impl], label=impl)
        for name, m, style in (("M1", profile.m1, ":"), ("M2", profile.m2, "--")):
            axes.axvline(m, color="0.3", linestyle=style, linewidth=1, label=f"{name} = {m}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(profile.m, [str(m) for m in profile.m], fontsize="x-small")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.minorticks_off()
        axes.set(title=f"{profile.dtype} [{profile.n}, {profile.k}]", xlabel="M", ylabel="microseconds")
        axes.legend(fontsize="small")
    for axes in list(figure.axes)[len(table.profiles) :]:
        axes.remove()
    figure.suptitle(f"linear on {table.device}")
    figure.savefig(path, format="png", dpi=150)

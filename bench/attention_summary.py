"""Summarizes the results of bench/attention.py in a few figures."""

from __future__ import annotations

from statistics import geometric_mean

LARGE = 500e6  # above this many bytes of KV, a call should be bandwidth-bound


def summary(rows: list[dict]) -> dict[str, str]:
    """The lines to print: each group's speed relative to its peers, its floor and its variants."""
    lines: dict[str, str] = {}
    for group in dict.fromkeys(row["group"] for row in rows):
        own = [row for row in rows if row["group"] == group]
        for layout in ("paged", "contiguous"):
            unified, online = f"{layout} unified", f"{layout} online"
            over = {row["shape"]: row["over_best_peer"].get(layout) for row in own}
            lines[f"{group}: {layout}, best peer's time over ours"] = _spread(over)
            large = {
                row["shape"]: row["fraction"].get(unified)
                for row in own
                if row["kv_bytes"] > LARGE or row["shortest"]
            }
            lines[f"{group}: {layout}, fraction of the ceiling (KV > 500 MB)"] = _spread(large)
            ablation = {row["shape"]: _ratio(row, online, row, unified) for row in own}
            lines[f"{group}: {layout}, online's time over unified's"] = _spread(ablation)
    lines |= _fp8(rows) | _features(rows) | _generic(rows)
    errors = [error for row in rows for error in row["error"].values()]
    lines["largest relative error of anyone"] = f"{max(errors, default=0):.2g}"
    lines["rows recomputed with the unified maximum"] = str(sum(row["fallbacks"] for row in rows))
    return {line: value for line, value in lines.items() if value}


def _ratio(row: dict, name: str, other: dict, other_name: str) -> float | None:
    """One contestant's time over another's, if both were measured."""
    time, other_time = row["us"].get(name), other["us"].get(other_name)
    return time / other_time if time and other_time else None


def _spread(values: dict[str, float | None]) -> str:
    """Geometric mean, minimum and maximum, the latter two with their shapes; empty without values."""
    known = {shape: value for shape, value in values.items() if value is not None}
    if not known:
        return ""
    low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
    mean = geometric_mean(known.values())
    return f"{mean:.3f}   {known[low]:.3f} ({low}) to {known[high]:.3f} ({high})"


def _fp8(rows: list[dict]) -> dict[str, str]:
    """Speedup of an fp8 cache over a 16-bit cache of the same shape."""
    halves = {row["shape"]: row for row in rows if row["group"] == "fp8" and not row["fp8"]}
    pairs = [(halves[row["shape"].removesuffix(" fp8")], row) for row in rows if row["fp8"]]
    return {
        f"fp8: paged, 16 bit's time over fp8's (KV {what} 200 MB in 16 bit)": _spread(
            {
                row["shape"]: _ratio(half, "paged unified", row, "paged unified")
                for half, row in pairs
                if (half["kv_bytes"] > 200e6) == large
            }
        )
        for what, large in (("above", True), ("below", False))
    }


def _features(rows: list[dict]) -> dict[str, str]:
    """The cost of each feature relative to the same shape without any."""
    own = [row for row in rows if row["group"] == "features"]
    costs = {row["feature"]: _ratio(row, "paged unified", own[0], "paged unified") for row in own[1:]}
    return {
        f"features: {name}, time over that without any": f"{cost:.3f}" for name, cost in costs.items() if cost
    }


def _generic(rows: list[dict]) -> dict[str, str]:
    """Speedup of the kernels chosen for this GPU over the generic ones."""
    chosen = {row["shape"]: row for row in rows if row["group"] == "main"}
    pairs = [
        (row, chosen[row["shape"]]) for row in rows if row["group"] == "ampere" and row["shape"] in chosen
    ]
    return {
        f"generic kernel's time over the chosen one's, {layout}": _spread(
            {
                row["shape"]: _ratio(row, f"{layout} unified", other, f"{layout} unified")
                for row, other in pairs
            }
        )
        for layout in ("paged", "contiguous")
    }

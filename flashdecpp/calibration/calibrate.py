"""Measures the softmax inputs of a model on a text and chooses phi for every head."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flashdecpp._progress import progress_bar
from flashdecpp.engine.llm import LLM
from flashdecpp.errors import ModelError
from flashdecpp.models.config import ModelConfig
from flashdecpp.models.kv_cache import KVCache, blocks_for
from flashdecpp.models.phi import PERCENTILES, SAFE_WINDOWS, Calibration

# Softmax inputs computed at a time, which bounds the memory (32 MB, and as much for masks)
LOGITS_AT_ONCE = 1 << 23


def measure(llm: LLM, tokens: Sequence[int]) -> Calibration:
    """Runs the model on the tokens, in chunks as long as its context, with a progress bar."""
    if not tokens:
        raise ModelError("the text to calibrate with is empty")
    config, device = llm.config, llm.device
    length = min(len(tokens), llm.max_len)
    cache = KVCache.for_model(config, blocks_for(length), device, llm.dtype)
    table = torch.arange(cache.num_blocks, dtype=torch.int32, device=device)[None]
    rows = len(tokens) * config.layers * config.q_heads
    with progress_bar(total=rows, desc="calibrating", unit=" rows", unit_scale=True) as bar:
        observer = SoftmaxObserver(config, bar)
        for start in range(0, len(tokens), length):
            chunk = torch.tensor(tokens[start : start + length], device=device)
            llm.decoder.prefill(chunk, cache, table, observe=observer)
    return observer.summary(llm.name, str(llm.dtype).removeprefix("torch."))


class SoftmaxObserver:
    """Records, for every head, the minimum of all softmax inputs and the maximum of each row."""

    def __init__(self, config: ModelConfig, bar: tqdm) -> None:
        self._config, self._bar = config, bar
        shape = (config.layers, config.q_heads)
        self._minimum = torch.full(shape, torch.inf, dtype=torch.float32, device="cpu")
        self._row_maxima: list[list[torch.Tensor]] = [[] for _ in range(config.layers)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """q [1, rows, q_heads, head_dim]: the newest of the tokens of k [1, keys, kv_heads, head_dim]."""
        config, window = self._config, self._config.windows[layer]
        rows, keys = q.size(1), k.size(1)
        at_once = max(1, LOGITS_AT_ONCE // (config.q_heads * keys))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            end = keys - rows + stop  # keys visible to these rows
            x = softmax_inputs(q[0, start:stop], k[0, :end], config)
            position = torch.arange(end - (stop - start), end, device=q.device)[:, None]
            key = torch.arange(end, device=q.device)
            unseen = key > position
            if window > 0:
                unseen |= key <= position - window
            least = x.masked_fill(unseen, torch.inf).amin(dim=(1, 2)).cpu()
            self._minimum[layer] = torch.minimum(self._minimum[layer], least)
            self._row_maxima[layer].append(x.masked_fill_(unseen, -torch.inf).amax(dim=2).cpu())
        self._bar.update(rows * config.q_heads)

    def row_maxima(self, layer: int) -> torch.Tensor:
        """[q_heads, rows], in the order of the tokens."""
        return torch.cat(self._row_maxima[layer], dim=1)

    def summary(self, model: str, dtype: str) -> Calibration:
        """The statistics of all rows. Raises a ModelError if an input was not finite."""
        phi, maximum, percentiles = [], [], []
        coverage: dict[str, list[torch.Tensor]] = {name: [] for name in SAFE_WINDOWS}
        for index in range(self._config.layers):
            maxima = self.row_maxima(index)
            if not (maxima.isfinite().all() and self._minimum[index].isfinite().all()):
                raise ModelError(f"softmax inputs of layer {index} are not finite in {dtype}; try another")
            chosen = choose_phi(maxima)
            phi.append(chosen)
            maximum.append(maxima.amax(dim=1))
            levels = [float(name) for name in PERCENTILES]
            percentiles.append(torch.from_numpy(np.percentile(maxima.numpy(), levels, axis=1)).float())
            distance = (maxima - chosen[:, None]).abs()
            for name, width in SAFE_WINDOWS.items():
                coverage[name].append((distance <= width).float().mean(dim=1))
        return Calibration(
            model=model,
            dtype=dtype,
            tokens=maxima.size(1),
            phi=torch.stack(phi),
            minimum=self._minimum,
            maximum=torch.stack(maximum),
            row_maximum=dict(zip(PERCENTILES, torch.stack(percentiles, dim=1), strict=True)),
            coverage={name: torch.stack(layers) for name, layers in coverage.items()},
        )


def softmax_inputs(q: torch.Tensor, k: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Scaled and soft-capped q.k in float32, [q_heads, rows, keys].

    q: [rows, q_heads, head_dim]; k: [keys, kv_heads, head_dim].
    """
    rows, q_heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    scale, cap = config.attn_scale or head_dim**-0.5, config.attn_softcap
    # The query heads of a KV head are adjacent, so they form the rows of one product.
    queries = (q.float() * scale).view(rows, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    x = (queries.flatten(1, 2) @ k.float().permute(1, 2, 0)).view(q_heads, rows, keys)
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def choose_phi(row_maxima: torch.Tensor) -> torch.Tensor:
    """Chooses phi [q_heads] for row maxima [q_heads, rows].

    Among all windows as wide as the narrowest safe one (half's), it picks the one with the most row maxima,
    or of several the one whose maxima lie closest together. phi is the midpoint of the outermost maxima in
    that window, which leaves the same margin on both sides.
    """
    lowest = row_maxima.sort(dim=1).values
    end = torch.searchsorted(lowest, lowest + 2 * SAFE_WINDOWS["half"], right=True)
    count = end - torch.arange(lowest.size(1), device=lowest.device)
    highest = lowest.gather(1, end - 1)
    fullest = count == count.amax(dim=1, keepdim=True)
    best = (highest - lowest).masked_fill(~fullest, torch.inf).argmin(dim=1, keepdim=True)
    return ((lowest + highest) / 2).gather(1, best).squeeze(1)


def report(calibration: Calibration) -> Iterator[str]:
    """Yields the lines of a short summary."""
    c = calibration
    layers, heads = c.phi.shape
    low, high = c.minimum.amin(dim=1), c.maximum.amax(dim=1)
    widest = int((high - low).argmax())
    layer, head = divmod(int(c.coverage["half"].argmin()), heads)
    lowest, highest = (c.row_maximum[p][layer, head] for p in (PERCENTILES[0], PERCENTILES[-1]))
    yield f"softmax inputs of {c.model} in {c.dtype}: {c.tokens} tokens, {layers} layers of {heads} heads"
    yield f"  all inputs          {low.min():.1f} to {high.max():.1f}"
    yield f"  widest layer        {widest}: {low[widest]:.1f} to {high[widest]:.1f}"
    yield f"  phi                 {c.phi.min():.1f} to {c.phi.max():.1f}"
    outside = 1 - c.coverage["half"][layer, head]
    yield f"  worst head          layer {layer} head {head}: {outside:.2%} outside the window of half,"
    phi = c.phi[layer, head]
    yield f"                      phi {phi:.1f}, 99.8% of row maxima {lowest:.1f} to {highest:.1f}"
    for name, width in SAFE_WINDOWS.items():
        fallbacks = 1 - c.coverage[name].double().mean()
        yield f"  expected fallbacks  {fallbacks:.3%} of all rows in {name} (phi +-{width:g})"


def need_matplotlib() -> None:
    """Raises a ModelError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ModelError("--plot needs matplotlib: pip install matplotlib, or flashdecpp[plot]") from None


def plot(calibration: Calibration, path: Path) -> None:
    """Writes a PNG with the range of inputs, the row maxima and phi of every head, layer by layer."""
    need_matplotlib()
    from matplotlib.figure import Figure

    c = calibration
    layers, heads = c.phi.shape
    x = np.arange(layers * heads + 1) / heads  # one unit per layer, divided among its heads

    def line(table: torch.Tensor) -> np.ndarray:
        values = table.flatten().numpy()
        return np.append(values, values[-1])  # the last step needs an end point

    def maxima(low: str, high: str, color: str) -> tuple[str, torch.Tensor, torch.Tensor, str]:
        return f"row maxima, {low} to {high} %", c.row_maximum[low], c.row_maximum[high], color

    figure = Figure(figsize=(max(8.0, layers * 0.4), 5), layout="constrained")
    axes = figure.add_subplot()
    bands: tuple[tuple[str, torch.Tensor, torch.Tensor, str], ...] = (
        ("all inputs", c.minimum, c.maximum, "0.88"),
        maxima(PERCENTILES[0], PERCENTILES[-1], "#b7d3ee"),
        maxima(PERCENTILES[1], PERCENTILES[-2], "#6aa5dc"),
    )
    for label, low, high, color in bands:
        axes.fill_between(x, line(low), line(high), step="post", color=color, linewidth=0, label=label)
    axes.step(x, line(c.row_maximum["50"]), where="post", color="#174a7c", linewidth=1, label="their median")
    axes.step(x, line(c.phi), where="post", color="#c8102e", linewidth=1, label="phi")
    axes.set(xlim=(0, layers), xlabel="layer (its heads side by side)", ylabel="scaled q.k")
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set_title(f"{c.model}, {c.dtype}, {c.tokens} tokens")
    axes.grid(axis="x", color="0.8", linewidth=0.5)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, format="png", dpi=150)

"""Measures the softmax inputs of a model over a text, and chooses phi for every head."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from flashdecpp.engine.llm import LLM
from flashdecpp.errors import ModelError
from flashdecpp.models.config import ModelConfig
from flashdecpp.models.kv_cache import KVCache, blocks_for
from flashdecpp.models.phi import PERCENTILES, SAFE_WINDOWS, Calibration

# Softmax inputs that are held at once: bounds the memory of a measurement (32 MB, and again for masks)
LOGITS_AT_ONCE = 1 << 23


def measure(llm: LLM, tokens: Sequence[int]) -> Calibration:
    """Runs the model over the tokens, in pieces of its context if they are more; a progress bar on stderr."""
    if not tokens:
        raise ModelError("the text to calibrate with is empty")
    config, device = llm.config, llm.device
    length = min(len(tokens), llm.max_len)
    cache = KVCache.for_model(config, blocks_for(length), device, llm.dtype)
    table = torch.arange(cache.num_blocks, dtype=torch.int32, device=device)[None]
    rows = len(tokens) * config.layers * config.q_heads
    with tqdm(
        total=rows,
        unit=" rows",
        unit_scale=True,
        desc="calibrating",
        file=sys.stderr,
        leave=False,
        disable=None,
    ) as bar:
        observer = SoftmaxObserver(config, bar)
        for start in range(0, len(tokens), length):
            piece = torch.tensor(tokens[start : start + length], device=device)
            llm.decoder.prefill(piece, cache, table, observe=observer)
    return observer.summary(llm.name, str(llm.dtype).removeprefix("torch."))


class SoftmaxObserver:
    """Keeps, of the softmax inputs of every head, the least and the maximum of each row."""

    def __init__(self, config: ModelConfig, bar: tqdm) -> None:
        self._config, self._bar = config, bar
        shape = (config.layers, config.q_heads)
        self._minimum = torch.full(shape, torch.inf, dtype=torch.float32, device="cpu")
        self._row_maxima: list[list[torch.Tensor]] = [[] for _ in range(config.layers)]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor) -> None:
        """q [1, rows, q_heads, head_dim] are the newest of the tokens of k [1, keys, kv_heads, head_dim]."""
        config, window = self._config, self._config.windows[layer]
        rows, keys = q.size(1), k.size(1)
        at_once = max(1, LOGITS_AT_ONCE // (config.q_heads * keys))
        for start in range(0, rows, at_once):
            stop = min(start + at_once, rows)
            end = keys - rows + stop  # the first key that none of these rows sees
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
        """The statistics of all that was seen. Raises ModelError where an input was not finite."""
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
            coverage={name: torch.stack(shares) for name, shares in coverage.items()},
        )


def softmax_inputs(q: torch.Tensor, k: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Scaled and soft-capped q.k in float32, [q_heads, rows, keys].

    q: [rows, q_heads, head_dim]; k: [keys, kv_heads, head_dim].
    """
    rows, q_heads, head_dim = q.shape
    keys, kv_heads, _ = k.shape
    scale, cap = config.attn_scale or head_dim**-0.5, config.attn_softcap
    # The query heads of one KV head are neighbours: together they are the rows of one product.
    queries = (q.float() * scale).view(rows, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    x = (queries.flatten(1, 2) @ k.float().permute(1, 2, 0)).view(q_heads, rows, keys)
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def choose_phi(row_maxima: torch.Tensor) -> torch.Tensor:
    """phi [q_heads] for row maxima [q_heads, rows].

    Of all windows as wide as the narrowest safe one (half's) the one that holds the most row maxima, and of
    several such the one whose maxima lie closest together. phi is the middle between the outermost maxima it
    holds, so that the margin is the same on both sides.
    """
    lowest = row_maxima.sort(dim=1).values
    end = torch.searchsorted(lowest, lowest + 2 * SAFE_WINDOWS["half"], right=True)
    count = end - torch.arange(lowest.size(1), device=lowest.device)
    highest = lowest.gather(1, end - 1)
    most = count == count.amax(dim=1, keepdim=True)
    best = (highest - lowest).masked_fill(~most, torch.inf).argmin(dim=1, keepdim=True)
    return ((lowest + highest) / 2).gather(1, best).squeeze(1)


def report(calibration: Calibration) -> Iterator[str]:
    """What a calibration found, as the lines of a short table."""
    c = calibration
    layers, heads = c.phi.shape
    low, high = c.minimum.amin(dim=1), c.maximum.amax(dim=1)
    widest = int((high - low).argmax())
    layer, head = divmod(int(c.coverage["half"].argmin()), heads)
    least, most = (c.row_maximum[p][layer, head] for p in (PERCENTILES[0], PERCENTILES[-1]))
    yield f"softmax inputs of {c.model} in {c.dtype}: {c.tokens} tokens, {layers} layers of {heads} heads"
    yield f"  all inputs          {low.min():.1f} to {high.max():.1f}"
    yield f"  widest layer        {widest}: {low[widest]:.1f} to {high[widest]:.1f}"
    yield f"  phi                 {c.phi.min():.1f} to {c.phi.max():.1f}"
    outside = 1 - c.coverage["half"][layer, head]
    yield f"  worst head          layer {layer} head {head}: {outside:.2%} outside the window of half,"
    yield f"                      phi {c.phi[layer, head]:.1f}, 99.8% of row maxima {least:.1f} to {most:.1f}"
    for name, width in SAFE_WINDOWS.items():
        share = 1 - c.coverage[name].double().mean()
        yield f"  expected fallbacks  {share:.3%} of all rows in {name} (phi +-{width:g})"


def need_matplotlib() -> None:
    """Raises ModelError where `plot` could not draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ModelError("--plot needs matplotlib: pip install matplotlib, or flashdecpp[plot]") from None


def plot(calibration: Calibration, path: Path) -> None:
    """A PNG: for every head, layer after layer, the range of its inputs, its row maxima and phi."""
    need_matplotlib()
    from matplotlib.figure import Figure

    c = calibration
    layers, heads = c.phi.shape
    x = np.arange(layers * heads + 1) / heads  # the layer, and within it the head

    def line(table: torch.Tensor) -> np.ndarray:
        values = table.flatten().numpy()
        return np.append(values, values[-1])  # a step goes on to the point after it

    figure = Figure(figsize=(max(8.0, layers * 0.4), 5), layout="constrained")
    axes = figure.add_subplot()
    outermost, outer = (PERCENTILES[0], PERCENTILES[-1]), (PERCENTILES[1], PERCENTILES[-2])
    bands = (
        ("all inputs, least to greatest", c.minimum, c.maximum, "0.88"),
        (
            f"row maxima, {outermost[0]} to {outermost[1]} %",
            *(c.row_maximum[p] for p in outermost),
            "#b7d3ee",
        ),
        (f"row maxima, {outer[0]} to {outer[1]} %", *(c.row_maximum[p] for p in outer), "#6aa5dc"),
    )
    for label, low, high, colour in bands:
        axes.fill_between(x, line(low), line(high), step="post", color=colour, linewidth=0, label=label)
    axes.step(x, line(c.row_maximum["50"]), where="post", color="#174a7c", linewidth=1, label="their median")
    axes.step(x, line(c.phi), where="post", color="#c8102e", linewidth=1, label="phi")
    axes.set(xlim=(0, layers), xlabel="layer (its heads side by side)", ylabel="scaled q.k")
    axes.set_xticks(range(0, layers, max(1, layers // 16)))
    axes.set_title(f"{c.model}, {c.dtype}, {c.tokens} tokens")
    axes.grid(axis="x", color="0.8", linewidth=0.5)
    axes.legend(loc="lower left", fontsize="small")
    figure.savefig(path, format="png", dpi=150)

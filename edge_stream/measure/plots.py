"""Plots of measurements (matplotlib, the extra `plot`). Each function writes a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_stream.errors import EdgeStreamError
from edge_stream.output.files import check_writable, replace_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from edge_stream.measure.ppl import Reading

_CELLS = 64  # per side of an attention map
_SAMPLES = 30  # least number of scored tokens per point, where only samples were scored
_COLOURS = {"stream": "C0", "window": "C1", "dense": "C2", "recompute": "C3", "shift": "C4"}


def check_plot(path: str | None) -> None:
    """Raise EdgeStreamError if the plot could not be written: better now than after the measurement."""
    if path is None:
        return
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise EdgeStreamError("plots need matplotlib: pip install 'edge-stream[plot]'")
    check_writable(Path(path))
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise EdgeStreamError(f"cannot plot to {path}: use a name that ends in .png, .svg or .pdf")


def _figure(width: float = 7, height: float = 4.2) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", dpi=120)


def latency(rows: Sequence[dict[str, Any]], path: str) -> None:
    """Median ms per generated token by cache size, or by depth if there is one cache size; a line per mode."""
    rows = [row for row in rows if row["p50_ms"] is not None]
    if not rows:
        raise EdgeStreamError("nothing to plot: no token was generated (-n)")
    sizes = {row["n_ctx"] for row in rows if row["mode"] == "stream"} or {row["n_ctx"] for row in rows}
    x, label = ("n_ctx", "cache size (tokens)") if len(sizes) > 1 else ("n_depth", "tokens before (depth)")
    figure = _figure()
    axes = figure.subplots()
    kinds = sorted({row["cache_type_k"] for row in rows})
    for kind, style in zip(kinds, ("-", "--", ":", "-.") * len(kinds), strict=False):
        for mode in dict.fromkeys(row["mode"] for row in rows):
            line = sorted(
                (row for row in rows if (row["mode"], row["cache_type_k"]) == (mode, kind)), key=lambda r: r[x]
            )
            if not line:
                continue
            middle = [row["p50_ms"] for row in line]
            below = [row["p50_ms"] - row["p25_ms"] for row in line]
            above = [row["p75_ms"] - row["p50_ms"] for row in line]
            name = mode if len(kinds) == 1 else f"{mode} {kind}"
            axes.errorbar(
                [row[x] for row in line],
                middle,
                yerr=[below, above],
                fmt=f"o{style}",
                color=_COLOURS[mode],
                capsize=3,
                label=name,
            )
    axes.set_yscale("log")
    if all(row[x] > 0 for row in rows):
        axes.set_xscale("log", base=2)
    axes.set_xlabel(label)
    axes.set_ylabel("ms per token (median, quartiles)")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    _save(figure, path)


def perplexity(readings: Sequence[Reading], path: str, block: int = 0) -> None:
    """Perplexity along the stream in blocks of tokens, a line per mode, and their memory below."""
    import numpy as np

    figure = _figure(8, 5.6)
    axes, memory = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    size = block or max(1, max(len(reading.nll) for reading in readings) // 60)
    for reading in readings:
        nll, colour = reading.nll, _COLOURS[reading.mode]
        # a point of few samples would be noise
        mine = max(size, _SAMPLES * reading.every) if reading.mode == "recompute" else size
        starts = range(0, len(nll), mine)
        parts = [nll[s : s + mine] for s in starts]
        seen = [(s + len(p) / 2, float(np.exp(np.nanmean(p)))) for s, p in zip(starts, parts, strict=True) if _any(p)]
        label = reading.mode if mine == size else f"{reading.mode} (blocks of {mine:,}, 1 token in {reading.every})"
        axes.plot(*zip(*seen, strict=True), "-" if mine == size else "o--", color=colour, label=label, linewidth=1.3)
        if reading.stopped:
            axes.plot(*seen[-1], "x", color=colour)
        if reading.memory:
            memory.plot(*zip(*reading.memory, strict=True), color=colour, linewidth=1.3)
    n_ctx = readings[0].n_fill
    for panel in (axes, memory):
        panel.axvline(n_ctx, color="grey", linestyle=":", label=f"cache full ({n_ctx})")
        panel.grid(alpha=0.3, which="both")
    axes.set_yscale("log")
    axes.set_ylabel(f"perplexity (blocks of {size})")
    axes.legend()
    memory.set_ylim(bottom=0, top=1.15 * memory.get_ylim()[1])  # keeps a flat line off the frame
    memory.set_ylabel("memory (MiB)")
    memory.set_xlabel("tokens of the stream")
    memory.xaxis.set_major_formatter(lambda value, _position: f"{value:,.0f}")
    _save(figure, path)


def _any(values: Any) -> bool:
    import numpy as np

    return bool(np.isfinite(values).any())


def attention(maps: NDArray[np.float32], path: str, gamma: float = 0.35) -> None:
    """A heat map per layer. maps: [n_layer, n_tokens, n_tokens], rows are queries. A long text is pooled."""
    maps, block = pooled(maps, _CELLS)
    n_layer = len(maps)
    columns = min(6, n_layer)
    lines = -(-n_layer // columns)
    figure = _figure(2.1 * columns, 2.2 * lines + 0.3)
    from matplotlib.colors import PowerNorm

    panels = figure.subplots(lines, columns, squeeze=False)
    for i, panel in enumerate(panels.flat):
        panel.set_xticks([])
        panel.set_yticks([])
        if i >= n_layer:
            panel.axis("off")
            continue
        shown = panel.imshow(maps[i], norm=PowerNorm(gamma, 0, 1), cmap="viridis", interpolation="nearest")
        panel.set_title(f"layer {i}", fontsize=8)
        panel.spines[:].set_visible(False)  # the frame would hide the first token
    tokens = "a token" if block == 1 else f"{block} tokens"
    figure.colorbar(shown, ax=panels, shrink=0.6, label=f"attention on {tokens}, mean over heads")
    _save(figure, path)


def pooled(maps: NDArray[np.float32], n_max: int) -> tuple[NDArray[np.float32], int]:
    """Maps of n <= n_max cells per side, [n_layer, n, n], and the tokens per cell.

    A cell is a sum over keys and a mean over queries, so that no token is lost between pixels. The newest tokens, if
    they do not fill a cell, are left out.
    """
    block = -(-maps.shape[1] // n_max)
    n = maps.shape[1] // block
    cut = maps[:, : n * block, : n * block].reshape(len(maps), n, block, n, block)
    return cut.sum(axis=4).mean(axis=2), block


def distance(rows: Sequence[dict[str, Any]], n_ctx: int, path: str) -> None:
    """StreamEval: accuracy against distance in tokens, a line per mode."""
    figure = _figure()
    axes = figure.subplots()
    for mode in dict.fromkeys(row["mode"] for row in rows):
        line = [row for row in rows if row["mode"] == mode]
        axes.plot([r["distance"] for r in line], [r["accuracy"] for r in line], "o-", color=_COLOURS[mode], label=mode)
    axes.axvline(n_ctx, color="grey", linestyle=":", label=f"cache ({n_ctx} tokens)")
    axes.set_xlabel("distance between fact and question (tokens)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def recall(rows: Sequence[dict[str, Any]], n_ctx: int, path: str) -> None:
    """Accuracy over distance in tokens, with recall and without."""
    figure = _figure()
    axes = figure.subplots()
    for name, label, colour in (("accuracy", "with recall", "C0"), ("accuracy_off", "without", "C1")):
        axes.plot([r["distance"] for r in rows], [r[name] for r in rows], "o-", color=colour, label=label)
    axes.axvline(n_ctx, color="grey", linestyle=":", label=f"cache ({n_ctx} tokens)")
    axes.set_xscale("log")
    axes.set_xlabel("distance between fact and question (tokens)")
    axes.set_ylabel("accuracy")
    axes.set_ylim(-0.03, 1.03)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def token_latency(best: dict[str, NDArray[np.float64]], repetitions: int, path: str) -> None:
    """Milliseconds of each token. best: mode -> the minimum over repetitions, [n_tokens]."""
    figure = _figure(8, 3.6)
    axes = figure.subplots()
    for mode, ms in best.items():
        axes.plot(range(1, len(ms) + 1), ms, "-", color=_COLOURS[mode], label=mode, linewidth=0.8)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("token, after the cache filled")
    axes.set_ylabel(f"ms (best of {repetitions})")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Any, path: str) -> None:
    replace_file(path, lambda name: figure.savefig(name))

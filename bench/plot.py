"""The figures as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from bench.series import Series
from bench.workloads import CHAIN, MAP, ONE_STEP, SLOW_COMMITS

OURS, OTHERS = "#1f77b4", "#b0b0b0"


def plot(path: Path, all_series: Sequence[Series]) -> None:
    """Rates of all contestants, and the time of maps over their size."""
    measured = [s for s in all_series if s.values and not s.error]
    bars = [name for name in (ONE_STEP, SLOW_COMMITS, CHAIN) if _of(measured, name)]
    maps = _of(measured, MAP)
    heights = [len(_of(measured, name)) + 2 for name in bars] + ([14] if maps else [])
    if not heights:
        return
    figure = Figure(figsize=(8, 0.3 * sum(heights)), layout="constrained")
    axes = figure.subplots(len(heights), height_ratios=heights, squeeze=False)
    for name, axis in zip(bars, axes[:, 0], strict=False):
        series = _of(measured, name)[::-1]
        rates = [s.tasks / s.median for s in series]
        colors = [OURS if s.contestant.startswith("pgflow_worker") else OTHERS for s in series]
        drawn = axis.barh([s.contestant for s in series], rates, color=colors)
        axis.bar_label(drawn, fmt="%.0f", padding=3)
        axis.margins(x=0.1)
        axis.set_title(f"{series[0].size} {name}: tasks/s", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    if maps:
        axis = axes[-1, 0]
        for contestant in dict.fromkeys(s.contestant for s in maps):
            points = [(s.size, s.median) for s in maps if s.contestant == contestant]
            axis.loglog(*zip(*points, strict=True), marker="o", label=contestant)
        axis.set_title("maps: seconds over elements", loc="left")
        axis.grid(visible=True, which="major", alpha=0.3)
        axis.legend()
    # Without matplotlib's version, so that the same figures make the same file.
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _of(all_series: Sequence[Series], workload: str) -> list[Series]:
    return [s for s in all_series if s.workload == workload]

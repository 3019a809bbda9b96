"""What was measured, as tables for a terminal or for Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from math import isnan
from pathlib import Path
from typing import Any

from tabulate import tabulate

from bench.bars import Bar
from bench.series import Series

# A table: title, header, rows.
Part = tuple[str, Sequence[str], list[list[str]]]

BEGIN = "<!-- Written by make bench: begin -->"
END = "<!-- Written by make bench: end -->"


@dataclass(frozen=True)
class Results:
    """One run of the benchmark."""

    date: str
    machine: dict[str, str]
    repetitions: int
    series: list[Series]
    bars: list[Bar]
    parts: list[Part]

    @property
    def errors(self) -> list[str]:
        """What went wrong."""
        return [f"{s.workload}, {s.contestant}: {s.error}" for s in self.series if s.error]

    def write_json(self, path: Path) -> None:
        """Write everything, samples included."""
        content: dict[str, Any] = asdict(self)
        for plain, bar in zip(content["bars"], self.bars, strict=True):
            plain["verdict"] = bar.verdict
        path.write_text(json.dumps(content, indent=1) + "\n")

    def markdown(self) -> str:
        """Everything as Markdown, without headings."""
        lines = [
            f"Measured on {self.date}, medians of {self.repetitions}, on: "
            + ", ".join(f"{name} {value}" for name, value in self.machine.items())
            + ".",
        ]
        if self.series:
            lines += ["", _table(*_bars(self.bars))]
        for title, header, rows in (*_parts(self.series), *self.parts):
            lines += ["", f"**{title}**", "", _table(header, rows)]
        return "\n".join(lines) + "\n"


def write_docs(path: Path, results: Results) -> None:
    """Replace what is between the marks in the document."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{path} does not have the marks {BEGIN} and {END}")
    path.write_text(f"{before}{BEGIN}\n\n{results.markdown()}\n{END}{after}")


def _bars(bars: Iterable[Bar]) -> tuple[Sequence[str], list[list[str]]]:
    return ("bar", "measured", "must be", "verdict"), [
        [
            bar.what,
            "" if bar.measured is None else f"{bar.measured:.3g} {bar.unit}".strip(),
            f"{'at least' if bar.at_least else 'at most'} {bar.bound:g} {bar.unit}".strip(),
            bar.verdict,
        ]
        for bar in bars
    ]


def _parts(all_series: Iterable[Series]) -> Iterable[Part]:
    for workload, group in groupby(all_series, lambda series: series.workload):
        series = list(group)
        if any(s.tasks > 1 for s in series):
            yield workload, *_throughput(series)
        else:
            yield workload, *_latencies(series)


def _throughput(all_series: list[Series]) -> tuple[Sequence[str], list[list[str]]]:
    """Every series beside the first one of its size."""
    first: dict[int, Series] = {}
    header = ("contestant", "number", "seconds", "tasks/s", "of the first", "commits/task", "times")
    return (*header, ""), [
        [
            s.contestant,
            str(s.size),
            _number(s.median, ".2f"),
            _number(s.tasks / s.median, ".0f"),
            _number(first.setdefault(s.size, s).median / s.median, ".2f"),
            _number(s.commits_per_task, ".2f"),
            str(len(s.values)),
            _remark(s),
        ]
        for s in all_series
    ]


def _latencies(all_series: list[Series]) -> tuple[Sequence[str], list[list[str]]]:
    return ("", "median", "95th percentile", "times", ""), [
        [
            s.contestant,
            _amount(s.median, s.unit),
            _amount(s.p95, s.unit),
            str(len(s.values)),
            _remark(s),
        ]
        for s in all_series
    ]


def _amount(value: float, unit: str) -> str:
    return (
        f"{_number(1000 * value, '.1f')} ms" if unit == "s" else f"{_number(value, '.2f')} {unit}"
    )


def _number(value: float, form: str) -> str:
    return "" if isnan(value) else format(value, form)


def _remark(series: Series) -> str:
    return f"error: {series.error}" if series.error else series.note


def _table(header: Sequence[str], rows: list[list[str]]) -> str:
    """A Markdown table that can be read as text as well."""
    alignment = ["left", *["right"] * (len(header) - 1)]
    if not header[-1]:
        alignment[-1] = "left"
        if not any(row[-1] for row in rows):  # nothing to remark
            header, rows, alignment = header[:-1], [row[:-1] for row in rows], alignment[:-1]
    return str(tabulate(rows, header, tablefmt="pipe", disable_numparse=True, colalign=alignment))

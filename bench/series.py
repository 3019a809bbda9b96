"""Measurements, and taking them in turns."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bench.cluster import Cluster
from bench.contestants import Contestant, Work

# A contestant that needs longer than this is measured once.
LONG_SECONDS = 20.0


@dataclass(frozen=True)
class Sample:
    """One measurement. value: in the series' unit; commits: in the database, meanwhile."""

    value: float
    commits: int | None = None


@dataclass
class Series:
    """What was measured of one contestant in one workload.

    size: how many of what the workload names; tasks: how many that makes in each sample.
    """

    workload: str
    contestant: str
    size: int
    tasks: int = 1
    unit: str = "s"
    values: list[float] = field(default_factory=list)
    commits: list[int] = field(default_factory=list)
    note: str = ""
    error: str = ""

    def add(self, sample: Sample) -> None:
        """Add a measurement."""
        self.values.append(sample.value)
        if sample.commits is not None:
            self.commits.append(sample.commits)

    @property
    def median(self) -> float:
        """The median of the values; nan if there is none."""
        return statistics.median(self.values) if self.values else float("nan")

    @property
    def p95(self) -> float:
        """The 95th percentile."""
        if len(self.values) < 2:
            return self.median
        return statistics.quantiles(self.values, n=20, method="inclusive")[-1]

    @property
    def commits_per_task(self) -> float:
        """The median number of commits for each task; nan if they were not counted."""
        return statistics.median(self.commits) / self.tasks if self.commits else float("nan")


@dataclass(frozen=True)
class Entry:
    """One contestant's place in a workload: where its samples go, and how one is taken."""

    series: Series
    take: Callable[[], Sample]


def take_turns(entries: Iterable[Entry], repetitions: int) -> list[Series]:
    """Let every contestant run once, then every one again, so that noise hits all alike."""
    entries = list(entries)
    for number in range(repetitions):
        first = entries[0].series
        _say(f"{first.workload}, {first.size}: {number + 1} of {repetitions}")
        for entry in entries:
            series = entry.series
            if series.error:
                continue
            if number and series.median > LONG_SECONDS and series.unit == "s":
                series.note = f"longer than {LONG_SECONDS:g} s: measured once"
                continue
            try:
                series.add(entry.take())
            except Exception as error:
                # The others can still be measured; the benchmark will fail in the end.
                series.error = f"{type(error).__name__}: {error}".partition("\n")[0]
                _say(f"{series.contestant}: {series.error}")
    return [entry.series for entry in entries]


def _say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)


def measure(
    cluster: Cluster, contestant: Contestant, work: Work, *, commit_delay_ms: int = 0
) -> Sample:
    """Let the contestant do the work in a fresh, analysed database."""
    with cluster.copy(contestant.template) as database:
        contestant.enqueue(database, work)
        # What was written until now is not to be written to disk during the measurement.
        database.run("analyze", "checkpoint")
        if commit_delay_ms:
            database.run(
                f"alter database {database.name} set commit_delay = {1000 * commit_delay_ms}",
                f"alter database {database.name} set commit_siblings = 0",
            )
        before = cluster.commits(database)
        with contestant.ready(database, work) as go:
            started = time.perf_counter()
            go()
            seconds = time.perf_counter() - started
        commits = cluster.commits(database) - before
        contestant.check(database, work)
    return Sample(seconds, commits)

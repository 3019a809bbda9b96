"""The bars: ratios of medians within one run, and whether they are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.latency import IDLE_CALL, IDLE_WORK, IDLE_WORKER, PICK_UP, SELECT_1
from bench.offload import BACKEND_SHARE, CPU_TASKS, IN_SERVER, NO_OPS, ON_DASK
from bench.series import Series
from bench.workloads import (
    ASYNC,
    IO,
    LOOP_ANALYZE_TWICE,
    LOOP_PER_BATCH,
    LOOP_PER_TASK,
    MAP,
    ONE_STEP,
    PSYCOPG_100,
    THREAD,
    WORKER,
    WORKER_TX,
    Sizes,
)

IO_SECONDS = 0.1


@dataclass(frozen=True)
class Bar:
    """A figure and its bound. measured: None if it was not."""

    what: str
    measured: float | None
    bound: float
    at_least: bool = False
    unit: str = ""

    @property
    def met(self) -> bool:
        """Whether it is; a bar that was not measured is not met."""
        if self.measured is None:
            return False
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    @property
    def verdict(self) -> str:
        """In words."""
        return "not measured" if self.measured is None else "met" if self.met else "not met"


class _Medians:
    """Medians by workload, contestant and size; None for what was not measured."""

    def __init__(self, all_series: Iterable[Series]) -> None:
        self._medians = {
            (series.workload, series.contestant, series.size): series.median
            for series in all_series
            if series.values and not series.error
        }

    def get(self, workload: str, contestant: str, size: int) -> float | None:
        return self._medians.get((workload, contestant, size))

    def ratio(self, workload: str, size: int, slower: str, faster: str) -> float | None:
        """How many times as long one takes as the other."""
        one, other = self.get(workload, slower, size), self.get(workload, faster, size)
        return one / other if one and other else None


def bars(all_series: Iterable[Series], sizes: Sizes) -> list[Bar]:
    """Every bar, measured or not."""
    medians = _Medians(all_series)
    runs, elements, io_tasks = sizes.runs, sizes.elements, sizes.io_tasks
    of_map = 2000 if 2000 in elements else elements[-1]

    per_element = [medians.get(MAP, WORKER, number) for number in elements]
    per_element = [
        time and time / number for time, number in zip(per_element, elements, strict=True)
    ]
    known = [time for time in per_element if time]
    growth = max(known) / min(known) if len(known) == len(elements) else None

    limit = medians.get(IO, LOOP_PER_BATCH, io_tasks)
    rounds = -(-io_tasks // sizes.max_concurrent)
    ideal = IO_SECONDS * rounds

    def of_ideal(contestant: str) -> float | None:
        time = medians.get(IO, contestant, io_tasks)
        return time / (ideal + limit) if time and limit else None

    far, near = (medians.get(NO_OPS, name, sizes.no_ops) for name in (ON_DASK, IN_SERVER))
    no_op = far - near if far and near else None
    chain = medians.get(PICK_UP, "chain", sizes.pick_ups)
    return [
        Bar(
            "one-step runs without tx: rate / loop that commits per batch",
            medians.ratio(ONE_STEP, runs, LOOP_PER_BATCH, WORKER),
            0.8,
            at_least=True,
        ),
        Bar(
            "one-step runs without tx: rate / psycopg with batches of 100",
            medians.ratio(ONE_STEP, runs, PSYCOPG_100, WORKER),
            1.4,
            at_least=True,
        ),
        Bar(
            "one-step runs with tx: rate / loop that commits per task",
            medians.ratio(ONE_STEP, runs, LOOP_PER_TASK, WORKER_TX),
            0.85,
            at_least=True,
        ),
        Bar(
            f"map of {of_map} without tx: rate / plain loop",
            medians.ratio(MAP, of_map, LOOP_PER_BATCH, WORKER),
            10,
            at_least=True,
        ),
        Bar(
            f"map of {of_map} without tx: rate / loop with ANALYZE",
            medians.ratio(MAP, of_map, LOOP_ANALYZE_TWICE, WORKER),
            3,
            at_least=True,
        ),
        Bar(
            f"map without tx: longest / shortest time per element, {elements[0]} to {elements[-1]}",
            growth,
            2,
        ),
        Bar(
            f"{io_tasks} I/O tasks, async def: time / (ideal {ideal:g} s + limit)",
            of_ideal(ASYNC),
            1.3,
        ),
        Bar(
            f"{io_tasks} I/O tasks, thread=True: time / (ideal {ideal:g} s + limit)",
            of_ideal(THREAD),
            1.3,
        ),
        Bar(
            f"{sizes.cpu_tasks} CPU tasks of 100 ms: rate on two Dask workers / in the server",
            medians.ratio(CPU_TASKS, sizes.cpu_tasks, IN_SERVER, ON_DASK),
            1.7,
            at_least=True,
        ),
        Bar(
            "the same: the backend's share of the CPU time",
            medians.get(BACKEND_SHARE, ON_DASK, sizes.cpu_tasks),
            15,
            unit="%",
        ),
        Bar(
            "what a task that does nothing takes longer on Dask",
            no_op and 1000 * no_op / sizes.no_ops,
            10,
            unit="ms",
        ),
        *(
            Bar(
                f"idle call, a {client} for each: time / select 1",
                medians.ratio(
                    IDLE_CALL,
                    sizes.idle_pairs,
                    f"{client}, {IDLE_WORK}",
                    f"{client}, {SELECT_1}",
                ),
                1.3,
            )
            for client in ("connection", "psql")
        ),
        Bar(
            "chain of three, waiting worker: median latency",
            chain and 1000 * chain,
            80,
            unit="ms",
        ),
        Bar(
            "waiting worker, idle: share of a core",
            medians.get(IDLE_WORKER, "chain", sizes.pick_ups),
            2,
            unit="%",
        ),
    ]

"""Handlers on a Dask cluster of two workers, beside the same handlers in the server."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.cluster import Cluster, Database
from bench.contestants import Work, deploy, must_be, start_runs
from bench.latency import cpu_seconds
from bench.series import Entry, Sample, Series, take_turns

CPU_TASKS = "CPU tasks of 100 ms"
NO_OPS = "tasks that do nothing, one at a time"
BACKEND_SHARE = "backend's share of the CPU time, CPU tasks"
IN_SERVER, ON_DASK = "thread=True, in the server", "thread=True, on two Dask workers"
SECONDS = 30.0


class Offloaded:
    """A flow whose handlers run where they are sent. pids: of the cluster's processes."""

    def __init__(self, cluster: Cluster, template: Database, address: str, pids: list[int]) -> None:
        self._cluster = cluster
        self._template = template
        self._address = address
        self._pids = pids
        self.share = Series(BACKEND_SHARE, ON_DASK, 0, unit="%")

    def take(self, work: Work, *, on_dask: bool, warm: bool) -> Sample:
        """The time of a call. warm: in a session that has worked before."""
        with self._cluster.copy(self._template) as database:
            deploy(database, work.flow)
            if on_dask:
                database.rows("select 1 from pgflow_worker.set_environment(%s)", sys.prefix)
                database.rows(
                    "select 1 from pgflow_worker.set_executor(%s, %s)", work.flow, self._address
                )
            with database.connect() as connection:
                call = """call pgflow_worker.work(%s, batch_size => %s, max_concurrent => %s,
                    mode => 'drain', max_duration => '10 minutes')"""
                arguments = [work.flow, work.batch_size, work.max_concurrent]
                if warm:
                    start_runs(database, work.flow, Work(work.flow, 4))
                    connection.execute(call, arguments)
                start_runs(database, work.flow, work)
                database.run("analyze", "checkpoint")
                backend = connection.info.backend_pid
                before = cpu_seconds(backend), sum(map(cpu_seconds, self._pids))
                started = time.perf_counter()
                [[report]] = connection.execute(call, arguments)
                seconds = time.perf_counter() - started
                must_be("report", report["completed"], work.runs)
                own = cpu_seconds(backend) - before[0]
                others = sum(map(cpu_seconds, self._pids)) - before[1]
                if on_dask and not warm:
                    self.share.add(Sample(100 * own / (own + others)))
        return Sample(seconds)


def offloaded(
    cluster: Cluster, template: Database, cpu_tasks: int, no_ops: int, repetitions: int
) -> Iterator[list[Series]]:
    """Both kinds of tasks, in the server and on the cluster in turns."""
    with _dask() as (address, pids):
        flows = Offloaded(cluster, template, address, pids)
        for workload, work, warm in (
            (CPU_TASKS, Work("thread_cpu", cpu_tasks, max_concurrent=4), False),
            (NO_OPS, Work("thread_noop", no_ops, max_concurrent=1), True),
        ):
            yield take_turns(
                [
                    Entry(
                        Series(workload, name, work.runs, work.runs),
                        partial(flows.take, work, on_dask=on_dask, warm=warm),
                    )
                    for name, on_dask in ((IN_SERVER, False), (ON_DASK, True))
                ],
                repetitions,
            )
        flows.share.size = cpu_tasks
        yield [flows.share]


@contextmanager
def _dask() -> Iterator[tuple[str, list[int]]]:
    """A scheduler's address, and the pids of it and of two workers with one thread each."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        log = stack.enter_context(Path(name, "log").open("wb"))

        def start(program: str, *arguments: str) -> int:
            command = [sys.executable, "-m", f"distributed.cli.{program}", *arguments]
            process = subprocess.Popen(command, cwd=name, stdout=log, stderr=log)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process.pid

        def wait_for(text: str, number: int) -> str:
            deadline = time.monotonic() + SECONDS
            while Path(name, "log").read_text().count(text) < number:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"Dask did not start: {Path(name, 'log').read_text()}")
                time.sleep(0.05)
            return Path(name, "scheduler").read_text()

        plain = ("--host", "127.0.0.1", "--no-dashboard")
        file = str(Path(name, "scheduler"))
        pids = [start("dask_scheduler", *plain, "--port", "0", "--scheduler-file", file)]
        address = str(json.loads(wait_for("Scheduler at:", 1))["address"])
        for _ in range(2):
            options = ("--nthreads", "1", "--no-nanny", "--memory-limit", "0")
            pids.append(start("dask_worker", address, *plain, *options))
        wait_for("Registered to:", 2)
        yield address, pids

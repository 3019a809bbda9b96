"""A waiting worker: how soon it picks a run up, and what it costs; and the cost of an idle call."""

from __future__ import annotations

import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import psutil
import psycopg

from bench.cluster import Cluster, Connection, Database
from bench.contestants import deploy, must_be
from bench.series import Entry, Sample, Series, take_turns

PICK_UP = "pick-up latency of a waiting worker"
IDLE_WORKER = "waiting worker, idle: share of a core"
IDLE_CALL = "idle call"
SELECT_1, IDLE_WORK = "select 1", "work() with nothing to do"

WAIT = "call pgflow_worker.work(%s, mode => 'wait', max_duration => '1 hour')"
# Between two runs. Each flow has its turn after two of these, when its worker has long been idle.
PAUSE_SECONDS = (1.2, 1.8)


def pick_up(
    cluster: Cluster, template: Database, flows: Sequence[str], runs: int, idle_seconds: float
) -> list[Series]:
    """Latency of runs that find their flow's worker idle; and the CPU that such a worker takes.

    A waiting worker for each flow; the flows take turns.
    """
    latency = {flow: Series(PICK_UP, flow, runs) for flow in flows}
    idle = {flow: Series(IDLE_WORKER, flow, runs, unit="%") for flow in flows}
    with cluster.copy(template) as database, ExitStack() as stack:
        for flow in flows:
            deploy(database, flow)
        database.run("analyze", "checkpoint")
        pids = {flow: stack.enter_context(waiting_worker(database, flow)) for flow in flows}
        connection = stack.enter_context(database.connect())
        for number in range(runs + 1):
            for flow, series in latency.items():
                time.sleep(random.uniform(*PAUSE_SECONDS))
                seconds = _run_once(connection, flow)
                if number:  # the first one loads what is loaded once
                    series.add(Sample(seconds))
        time.sleep(2 * PAUSE_SECONDS[1])
        for _ in range(5):
            before = {flow: cpu_seconds(pid) for flow, pid in pids.items()}
            time.sleep(idle_seconds)
            for flow, pid in pids.items():
                used = cpu_seconds(pid) - before[flow]
                idle[flow].add(Sample(100 * used / idle_seconds))
    return [*latency.values(), *idle.values()]


@contextmanager
def waiting_worker(database: Database, flow: str | None) -> Iterator[int]:
    """A session in mode `wait`, for a flow or all; yields the process id of its backend."""
    with database.connect() as worker, database.connect() as other:
        thread = threading.Thread(target=_wait_for_tasks, args=(worker, flow), daemon=True)
        pid = worker.info.backend_pid
        thread.start()
        try:
            yield pid
        finally:
            other.execute("select pg_terminate_backend(%s, 5000)", [pid])
            thread.join()


def _wait_for_tasks(connection: Connection, flow: str | None) -> None:
    with suppress(psycopg.OperationalError):  # it will be terminated
        connection.execute(WAIT, [flow])


def _run_once(connection: Connection, flow: str) -> float:
    """Seconds from before a run is started to when its completion is seen."""
    started = time.perf_counter()
    row = connection.execute("select run_id from pgflow.start_flow(%s, '{}')", [flow]).fetchone()
    deadline = started + 30
    while True:
        found = connection.execute(
            "select status from pgflow.runs where run_id = %s", row
        ).fetchone()
        now = time.perf_counter()
        if found == ("completed",):
            return now - started
        if now > deadline:
            must_be(f"run of {flow}", found, ("completed",))
        time.sleep(0.001)


def cpu_seconds(pid: int) -> float:
    """What a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def idle_calls(cluster: Cluster, template: Database, pairs: int) -> list[Series]:
    """A session that calls work() with nothing to do, and one that runs `select 1`, in turns."""
    nothing = SELECT_1, "select 1"
    idle = IDLE_WORK, "call pgflow_worker.work('one_step')"
    clients = ("connection", Database.run), ("psql", _in_psql)
    entries = []
    with cluster.copy(template) as database:
        # A queue and tables that have been in use.
        deploy(database, "one_step")
        database.run(
            "select pgflow.start_flow('one_step', '{}') from generate_series(1, 200)",
            "call bench.loop('one_step', true)",
            "analyze",
            "checkpoint",
        )
        for client, run in clients:
            for what, statement in (nothing, idle):
                timed = partial(_timed, run, database, statement)
                timed()  # to warm up
                entries.append(Entry(Series(IDLE_CALL, f"{client}, {what}", pairs), timed))
        series = take_turns(entries, pairs)
        [[busy]] = database.rows("select count(*) from pgflow_worker.invocations")
        must_be("idle calls that worked", busy, 0)
    return series


def _timed(run: Callable[..., None], database: Database, statement: str) -> Sample:
    started = time.perf_counter()
    run(database, statement)
    return Sample(time.perf_counter() - started)


def _in_psql(database: Database, statement: str) -> None:
    subprocess.run(
        ["psql", "--no-psqlrc", "--quiet", "--command", statement],
        env=database.environment,
        stdout=subprocess.DEVNULL,
        check=True,
    )

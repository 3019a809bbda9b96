"""What a worker's session weighs, and what workers without work take."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import psutil

from bench.cluster import Cluster, Database
from bench.contestants import FLOWS, Work, deploy, start_runs
from bench.latency import cpu_seconds, waiting_worker
from bench.report import Part
from bench.workloads import Sizes

IDLE_CALLS = 50
EVERY_SECONDS = 5
MEGABYTE = 1_000_000

CALL = "call pgflow_worker.work(%s, mode => 'drain', batch_size => 100, max_concurrent => 50)"


def memory(cluster: Cluster, template: Database, sizes: Sizes) -> Part:
    """Of a session, before and after various calls."""
    flows = "one_step", "one_step_tx", "async_io", "thread_io"
    found: dict[str, list[tuple[float, float]]] = {}
    with cluster.copy(template) as database:
        for flow in flows:
            deploy(database, flow)

        def weigh(name: str, pid: int) -> None:
            found.setdefault(name, []).append((_memory(pid, "Private_Dirty"), _memory(pid, "Pss")))

        for _ in range(sizes.repetitions):
            with database.connect() as connection:
                connection.execute("select 1")
                weigh("a connection that has done nothing", connection.info.backend_pid)
            with database.connect() as connection:
                connection.execute(CALL, [flows[0]])
                weigh("after a call with nothing to do", connection.info.backend_pid)
            for flow in flows:
                with database.connect() as connection:
                    start_runs(database, flow, Work(flow, 100))
                    connection.execute(CALL, [flow])
                    weigh(f"after 100 tasks of {flow}", connection.info.backend_pid)
            with waiting_worker(database, flows[0]) as pid:
                time.sleep(1)
                weigh("wait, nothing done yet", pid)
                start_runs(database, flows[0], Work(flows[0], 100))
                time.sleep(2)
                weigh("wait, after 100 tasks of one_step", pid)
    return (
        "memory of a session, MB",
        ("", "its own", "with its share of what is shared"),
        [
            [name, *(f"{median(values):.1f}" for values in zip(*samples, strict=True))]
            for name, samples in found.items()
        ],
    )


def idle(cluster: Cluster, template: Database, sizes: Sizes) -> Part:
    """What it takes to look for work in many flows that have none."""
    slugs = [f"flow_{n}" for n in range(sizes.idle_flows)]
    source = (FLOWS / "one_step.py").read_text()
    postmaster = psutil.Process(int((cluster.data / "postmaster.pid").read_text().split()[0]))
    kinds: dict[str, list[str | None]] = {"one each": [*slugs], "one for all": [None]}
    rows = []
    with cluster.copy(template) as database:
        for slug in slugs:
            module = source.replace('Flow("one_step")', f'Flow("{slug}")')
            database.rows("select 1 from pgflow_worker.deploy(%s, %s)", slug, module)
        database.run("analyze")
        for name, workers in kinds.items():
            with ExitStack() as stack:
                pids = [stack.enter_context(waiting_worker(database, slug)) for slug in workers]
                time.sleep(sizes.idle_seconds)  # at first they look more often
                before = sum(map(cpu_seconds, pids))
                time.sleep(sizes.idle_seconds)
                used = (sum(map(cpu_seconds, pids)) - before) / sizes.idle_seconds
                weight = sum(_memory(pid, "Private_Dirty") for pid in pids)
            rows.append([f"wait, {name}", f"{len(pids)}", f"{100 * used:.1f} %",
                         f"{weight:.0f} MB"])  # fmt: skip
        for name, workers in kinds.items():
            before = _of_children(postmaster)
            for n in range(IDLE_CALLS):
                with database.connect() as connection:
                    connection.execute(CALL, [workers[n % len(workers)]])
            used = (_of_children(postmaster) - before) / IDLE_CALLS * len(workers) / EVERY_SECONDS
            rows.append([f"drain every {EVERY_SECONDS} s, {name}", "for moments",
                         f"{100 * used:.1f} %", ""])  # fmt: skip
    header = ("", "connections", "share of a core", "memory of their own")
    return f"workers of {len(slugs)} flows without work", header, rows


def _of_children(postmaster: psutil.Process) -> float:
    """CPU seconds of the server's processes that have ended."""
    times = postmaster.cpu_times()
    return float(times.children_user + times.children_system)


def _memory(pid: int, kind: str) -> float:
    """Megabytes of a process, as the kernel counts them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    [kilobytes] = [line.split()[1] for line in lines if line.startswith(f"{kind}:")]
    return 1024 * int(kilobytes) / MEGABYTE

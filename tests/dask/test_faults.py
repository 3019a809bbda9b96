"""What can happen to a cluster: no task is lost, and none pays for it with an attempt."""

from __future__ import annotations

import re
import signal
import subprocess
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pgflow_worker.boot import KEPT
from pgflow_worker.cluster import PLACE_SECONDS
from tests.dask.conftest import OF_CLUSTER, OTHER, Dask, Flows, until
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

# Notes in a file which process runs it, and waits there until another file appears.
WAITS = """
    import os, time
    from pathlib import Path

    flow = Flow("flow", max_attempts=3)

    @flow.step(thread=True)
    def far(flow_input):
        with Path(flow_input, "pids").open("a") as file:
            file.write(f"{os.getpid()}\\n")
        while not Path(flow_input, "go").exists():
            time.sleep(0.01)
        return os.getpid()

    @flow.step
    def near(flow_input):
        return "near"
"""
ONCE = WAITS.replace("max_attempts=3", "max_attempts=1")


def pids(directory: Path) -> list[int]:
    file = directory / "pids"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def begun(
    flows: Flows, background: Background, dask: Dask, directory: Path, source: str = WAITS
) -> tuple[str, Future[Any]]:
    """A run whose handler runs on the cluster, and the call of work()."""
    flows.deploy_to(dask, source)
    run_id = flows.start("flow", str(directory))
    call = background(flows.work, "flow", mode="drain")
    until(lambda: pids(directory))
    return run_id, call


def attempts_made(flows: Session) -> int:
    return int(flows.value("select attempts_count from pgflow.step_tasks where step_slug = 'far'"))


def errors(flows: Session) -> list[tuple[str, str]]:
    """What doctor() finds wrong, and the cures; nothing in these databases is pg_cron's."""
    return flows.rows(
        "select what, cure from pgflow_worker.doctor() where severity = 'error' and what !~ 'cron'"
    )


def show_at_once(flows: Session) -> None:
    """What rests is to be seen now."""
    flows.run("update pgmq.q_flow set vt = clock_timestamp()")


def test_a_worker_that_is_killed(
    flows: Flows, other: Session, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    run_id, call = begun(flows, background, own_dask, tmp_path)
    [first] = pids(tmp_path)
    next(worker for worker in own_dask.workers if worker.pid == first).kill()
    [_, second] = until(lambda: len(pids(tmp_path)) == 2 and pids(tmp_path))
    (tmp_path / "go").touch()
    assert counts(call.result(30)) == {"completed": 2}
    assert flows.output(run_id)["far"] == second


def test_a_task_that_kills_its_workers(flows: Flows, own_dask: Dask) -> None:
    flows.deploy_to(
        own_dask,
        """
        import os

        flow = Flow("flow", max_attempts=1)

        @flow.step(thread=True, max_attempts=2)
        def far(flow_input): os._exit(1)
        """,
    )
    flows.start("flow")
    assert counts(flows.work("flow")) == {"retried": 1}
    [(error,)] = flows.rows("select error from pgflow_worker.attempts")
    assert error.startswith("Dask workers died while they ran this task: ")


def test_what_must_not_run_twice(
    flows: Flows, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    _, call = begun(flows, background, own_dask, tmp_path, ONCE)
    [first] = pids(tmp_path)
    next(worker for worker in own_dask.workers if worker.pid == first).kill()
    assert counts(call.result(30))["failed"] == 1
    assert pids(tmp_path) == [first]
    [(error,)] = flows.rows("select error from pgflow_worker.attempts where step_slug = 'far'")
    assert error == "the Dask worker that ran this task died, and it must not run twice"


def test_a_scheduler_that_is_killed_and_comes_back(
    flows: Flows, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    run_id, call = begun(flows, background, own_dask, tmp_path)
    own_dask.scheduler.kill()
    report = call.result(30)
    assert counts(report) == {"completed": 1, "snoozed": 1}
    [(outcome, error)] = flows.rows(
        "select outcome, error from pgflow_worker.attempts where step_slug = 'far'"
    )
    assert outcome == "snoozed"
    assert error == f"the connection to Dask scheduler {own_dask.address} was lost"
    assert attempts_made(flows) == 0
    own_dask.start_scheduler()
    own_dask.start_worker()
    (tmp_path / "go").touch()
    show_at_once(flows)
    assert counts(flows.work("flow", mode="drain")) == {"completed": 1}
    assert attempts_made(flows) == 1
    assert flows.output(run_id)["near"] == "near"


def test_a_scheduler_that_is_killed_under_what_must_not_run_twice(
    flows: Flows, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    _, call = begun(flows, background, own_dask, tmp_path, ONCE)
    own_dask.scheduler.kill()
    assert counts(call.result(30))["failed"] == 1
    [(error,)] = flows.rows("select error from pgflow_worker.attempts where step_slug = 'far'")
    assert error.endswith("was lost, and the task must not run twice")


def test_a_waiting_worker_connects_again(
    flows: Flows, other: Session, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    flows.deploy_to(own_dask, WAITS)
    flows.start("flow", str(tmp_path))
    call = background(flows.work, "flow", mode="wait", max_duration="60 s")
    until(lambda: pids(tmp_path))
    own_dask.scheduler.kill()
    own_dask.start_scheduler()
    own_dask.start_worker()
    (tmp_path / "go").touch()
    until(lambda: other.value("select status = 'completed' from pgflow.runs"))
    other.run("select pgflow_worker.pause('flow')")
    assert counts(call.result(30)) == {"completed": 2, "snoozed": 1}


def test_nobody_there(flows: Flows, tmp_path: Path) -> None:
    nowhere = Dask(tmp_path)
    nowhere.port = 1
    flows.deploy_to(nowhere, WAITS)
    flows.start("flow", str(tmp_path))
    began = time.monotonic()
    report = flows.work("flow", mode="drain")
    assert time.monotonic() - began < 15
    assert counts(report) == {"completed": 1, "parked": 1}
    [note] = report["notes"]
    assert note.startswith(
        'step "far" cannot run now, its messages rest for 15 s at a time, without an attempt: '
        "the connection to Dask scheduler tcp://127.0.0.1:1 cannot be made: "
    )
    assert attempts_made(flows) == 0
    # Nothing more to do for the next calls.
    assert counts(flows.work("flow", mode="drain")) == {}
    [(what, cure)] = errors(flows)
    assert what.startswith("the connection to Dask scheduler tcp://127.0.0.1:1 cannot be made: ")
    # Which of them Dask's last attempt before its time was up has met.
    assert re.search("ConnectionRefusedError|TimeoutError", what.partition("after 5 s (")[2])
    assert cure == "select pgflow_worker.set_executor('flow', null);  -- or mend the cluster"
    flows.run(cure)
    assert errors(flows) == []
    show_at_once(flows)
    (tmp_path / "go").touch()
    assert counts(flows.work("flow", mode="drain")) == {"completed": 1}


def test_a_scheduler_that_does_not_answer_any_more(
    flows: Flows, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    _, call = begun(flows, background, own_dask, tmp_path)
    time.sleep(1)  # until the server knows that it has begun
    own_dask.scheduler.send_signal(signal.SIGSTOP)
    report = call.result(30)
    assert counts(report) == {"completed": 1, "snoozed": 1}
    assert attempts_made(flows) == 0
    query = "select error from pgflow_worker.attempts where step_slug = 'far'"
    assert flows.value(query) == f"the connection to Dask scheduler {own_dask.address} was lost"
    # Nor does it answer to who comes anew.
    show_at_once(flows)
    assert counts(flows.work("flow", mode="drain")) == {"parked": 1}


def test_workers_that_are_all_killed(
    flows: Flows, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    _, call = begun(flows, background, own_dask, tmp_path)
    # The one that runs it last, or Dask would give up a task that has killed two.
    for worker in sorted(own_dask.workers, key=lambda worker: worker.pid in pids(tmp_path)):
        worker.kill()
        worker.wait()
    report = call.result(15)
    assert counts(report) == {"completed": 1, "snoozed": 1}
    assert report["notes"] == [
        'step "far" has tasks that were not run, they rest for 15 s at a time, without an '
        f"attempt: Dask scheduler {own_dask.address} has no workers"
    ]
    assert attempts_made(flows) == 0


def test_no_workers(flows: Flows, tmp_path: Path) -> None:
    dask = Dask(tmp_path)
    try:
        dask.start_scheduler()
        flows.deploy_to(dask, WAITS)
        flows.start("flow", str(tmp_path))
        report = flows.work("flow", mode="drain")
        assert counts(report) == {"completed": 1, "parked": 1}
        what = f"Dask scheduler {dask.address} has no workers"
        assert report["notes"][0].endswith(f": {what}")
        assert [found for found, _ in errors(flows)] == [what]
    finally:
        dask.stop()


@pytest.mark.parametrize(
    ("preload", "problem"),
    [
        (
            "import sys, threading\n"
            "threading.Timer(2, setattr, (sys, 'version_info', (3, 10, 4))).start()",
            "RuntimeError: Python 3.10.4 is too old: it takes 3.11",
        ),
        (
            "import sys; sys.modules['sqlite3'] = None",
            'module "flows_of_test" cannot be imported: ModuleNotFoundError: import of sqlite3',
        ),
    ],
)
def test_a_worker_that_lacks_something(
    flows: Flows, tmp_path: Path, preload: str, problem: str
) -> None:
    dask = Dask(tmp_path)
    try:
        dask.start_scheduler()
        dask.start_worker("--preload", preload)
        flows.deploy_to(dask, "    import sqlite3\n" + WAITS)
        flows.start("flow", str(tmp_path))
        (tmp_path / "go").touch()
        time.sleep(2.5)  # until the first has changed its version
        assert counts(flows.work("flow", mode="drain")) == {"completed": 1, "snoozed": 1}
        [(error,)] = flows.rows("select error from pgflow_worker.attempts where step_slug = 'far'")
        assert problem in error
        assert attempts_made(flows) == 0
        [(what, _)] = errors(flows)
        assert what.startswith("Dask worker tcp://127.0.0.1:")
        assert problem in what
        # As soon as there is another.
        dask.workers[0].kill()
        dask.start_worker()
        show_at_once(flows)
        assert counts(flows.work("flow", mode="drain")) == {"completed": 1}
    finally:
        dask.stop()


@pytest.mark.skipif(OTHER is None, reason="OTHER_DASK names no environment")
def test_an_older_dask_in_the_server(flows: Flows, own_dask: Dask, tmp_path: Path) -> None:
    flows.run("select pgflow_worker.set_environment(%s)", OTHER)
    flows.deploy_to(own_dask, WAITS)
    flows.start("flow", str(tmp_path))
    (tmp_path / "go").touch()
    report = flows.work("flow", mode="drain")
    assert counts(report) == {"completed": 1, "snoozed": 1}
    versions = r"\(Dask is \S+ in the server and \S+ on the scheduler\)"
    assert re.search(versions, report["notes"][0])
    assert attempts_made(flows) == 0
    assert [what for what, _ in errors(flows) if not re.search(versions, what)] == []


def test_one_worker_of_two_that_lacks_something(flows: Flows, tmp_path: Path) -> None:
    dask = Dask(tmp_path)
    try:
        dask.start_scheduler()
        dask.start_worker("--preload", "import sys; sys.modules['sqlite3'] = None")
        good = dask.start_worker()
        flows.deploy_to(dask, "    import sqlite3\n" + WAITS)
        (tmp_path / "go").touch()
        for _ in range(10):
            flows.start("flow", str(tmp_path))
        report = flows.work("flow", mode="drain", max_concurrent=2)
        assert report["parked"] == 0  # the step does not rest, only what met the first worker
        assert report["completed"] + report["snoozed"] == 20
        assert 10 < report["completed"] < 20
        assert set(pids(tmp_path)) == {good.pid}
    finally:
        dask.stop()


def test_what_takes_longer_than_it_may_wait_for_a_place(flows: Flows, own_dask: Dask) -> None:
    flows.deploy_to(
        own_dask,
        f"""
        import asyncio, time

        flow = Flow("flow", timeout=60)

        @flow.step(thread=True)
        def in_thread(flow_input): time.sleep({PLACE_SECONDS + 1})

        @flow.step
        async def in_loop(flow_input): await asyncio.sleep({PLACE_SECONDS + 1})
        """,
    )
    flows.start("flow")
    assert counts(flows.work("flow", mode="drain")) == {"completed": 2}


@pytest.mark.skipif(OTHER is None, reason="OTHER_DASK names no environment")
def test_another_version_of_dask(flows: Flows, tmp_path: Path) -> None:
    dask = Dask(tmp_path, OTHER or "")
    try:
        dask.start_scheduler()
        dask.start_worker()
        dask.start_worker()
        flows.deploy_to(dask, WAITS)
        flows.start("flow", str(tmp_path))
        report = flows.work("flow", mode="drain")
        assert counts(report) == {"completed": 1, "parked": 1}
        assert "(perhaps its version of Dask is another than " in report["notes"][0]
        assert attempts_made(flows) == 0
        [(what, _)] = errors(flows)
        assert "(perhaps its version of Dask is another than " in what
    finally:
        dask.stop()


def test_resources_that_nobody_has(flows: Flows, own_dask: Dask, tmp_path: Path) -> None:
    flows.deploy_to(own_dask, WAITS.replace("thread=True", 'thread=True, resources={"GPU": 2}'))
    flows.start("flow", str(tmp_path))
    report = flows.work("flow", mode="drain")
    assert counts(report) == {"completed": 1, "snoozed": 1}
    [(error,)] = flows.rows("select error from pgflow_worker.attempts where step_slug = 'far'")
    assert error == (
        f"no worker with resources {{'GPU': 2}} of Dask scheduler {own_dask.address} had a free "
        "place within 20 s"
    )
    [(what, _)] = errors(flows)
    assert what == (
        f"no worker of Dask scheduler {own_dask.address} has what step \"far\" needs: {{'GPU': 2}}"
    )


def test_no_dask(session: Session, own_dask: Dask, tmp_path: Path) -> None:
    flows = Flows(session.connection)
    flows.deploy_to(own_dask, WAITS)
    flows.start("flow", str(tmp_path))
    report = flows.work("flow", mode="drain")
    assert counts(report) == {"completed": 1, "parked": 1}
    assert "Dask cannot be used (ModuleNotFoundError: No module named 'dask')" in report["notes"][0]
    [(what, _)] = errors(flows)
    assert what.startswith("Dask cannot be used (ModuleNotFoundError: No module named 'dask'): ")


def test_a_full_cluster_keeps_the_other_steps_running_and_takes_turns(
    flows: Flows, tmp_path: Path
) -> None:
    """Two databases, one place: who waits for it has not begun."""
    dask = Dask(tmp_path)
    try:
        dask.start_scheduler()
        dask.start_worker()
        busy = f"""
            import time
            from distributed import Client

            with Client({dask.address!r}) as client:
                future = client.submit(time.sleep, 22)
                print(future.key, flush=True)
                time.sleep(25)
        """
        process = subprocess.Popen(
            [f"{OF_CLUSTER}/bin/python", "-c", textwrap.dedent(busy)], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        time.sleep(0.5)
        flows.deploy_to(dask, WAITS)
        flows.start("flow", str(tmp_path))
        (tmp_path / "go").touch()
        report = flows.work("flow", mode="drain")
        assert counts(report) == {"completed": 1, "snoozed": 1}
        assert attempts_made(flows) == 0
        show_at_once(flows)
        assert counts(flows.work("flow", mode="drain")) == {"completed": 1}
        process.wait(30)
    finally:
        dask.stop()


def test_doctor_tells_of_busy_workers_and_of_a_cluster_once(
    flows: Flows, other: Session, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    flows.deploy_to(own_dask, WAITS)
    flows.deploy(WAITS.replace('"flow"', '"flow_2"'), "more_flows")
    flows.run("select pgflow_worker.set_executor('flow_2', %s)", own_dask.address)
    for _ in range(2):
        flows.start("flow", str(tmp_path))
    call = background(flows.work, "flow", mode="drain")
    until(lambda: len(pids(tmp_path)) == 2)
    query = "select what from pgflow_worker.doctor() where what ~ 'Dask'"
    [(what,)] = other.rows(query)
    assert what.startswith(f"workers of Dask scheduler {own_dask.address} are busy: tcp://")
    (tmp_path / "go").touch()
    assert counts(call.result(30)) == {"completed": 4}
    assert other.rows(query) == []
    own_dask.scheduler.kill()
    assert len(errors(other)) == 1
    why = other.value("select why from pgflow_worker.doctor() where what ~ 'Dask'")
    assert why == 'messages rest, without an attempt; flows: "flow", "flow_2"'


def test_a_handler_that_runs_keeps_its_code(
    flows: Flows, other: Session, background: Background, own_dask: Dask, tmp_path: Path
) -> None:
    """While others bring as many sets of code as a process keeps, and more."""
    own_dask.workers[0].kill()
    own_dask.start_worker(threads=2)
    own_dask.workers[1].kill()
    later = "from pgflow_worker import Fail; return Fail.__name__"
    source = WAITS.replace("return os.getpid()", later)
    run_id, call = begun(flows, background, own_dask, tmp_path, source)
    changing = Flows(other.connection)
    for number in range(KEPT + 1):
        changing.deploy(
            f"""
            flow = Flow("changing")

            @flow.step(thread=True)
            def far(flow_input): return {number}
            """,
            "changing",
        )
        changing.run("select pgflow_worker.set_executor('changing', %s)", own_dask.address)
        changing.start("changing")
        assert counts(changing.work("changing", mode="drain")) == {"completed": 1}
    (tmp_path / "go").touch()
    # Its own module has not changed, but a call ends when any has.
    assert call.result(30)["failed"] == 0
    flows.work("flow", mode="drain")
    assert flows.output(run_id)["far"] == "Fail"

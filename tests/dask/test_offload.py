"""Handlers on a Dask cluster: the same rules as in the server."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.dask.conftest import Dask, Flows, until
from tests.database.conftest import Session, counts

FLOW = """
    import os
    import time

    flow = Flow("flow", max_attempts=2, base_delay=1, timeout=3)
"""


def attempts(flows: Flows) -> list[tuple[Any, ...]]:
    return flows.rows("select outcome, error from pgflow_worker.attempts order by finished_at")


def error_of(flows: Flows, run_id: str) -> str:
    return str(
        flows.value(
            "select error_message from pgflow.step_tasks where run_id = %s and status = 'failed'",
            run_id,
        )
    )


def test_a_dag_mixes_both(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy_to(
        shared_dask,
        FLOW
        + """
    @flow.step(thread=True)
    def far(flow_input):
        return [flow_input["x"], os.getpid()]

    @flow.step
    async def also_far(flow_input, ctx: Context):
        return [ctx.step_slug, ctx.attempt, ctx.idempotency_key, os.getpid()]

    @flow.step
    def near(far, also_far, tx: Transaction):
        [row] = tx.execute("select pg_backend_pid() as pid")
        return {"far": far, "also_far": also_far, "near": [row["pid"], os.getpid()]}
    """,
    )
    run_id = flows.start("flow", {"x": 7})
    report = flows.work("flow", mode="drain")
    assert counts(report) == {"completed": 3}, report
    output = flows.output(run_id)["near"]
    pids = {worker.pid for worker in shared_dask.workers}
    assert output["far"][0] == 7
    assert output["far"][1] in pids
    assert output["also_far"][:3] == ["also_far", 1, f"{run_id}/also_far/0"]
    assert output["also_far"][3] in pids
    assert output["near"][0] == output["near"][1]


def test_dasks_threads_take_no_signals(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy_to(
        shared_dask,
        """
        import os
        from pathlib import Path

        flow = Flow("flow")

        @flow.step(thread=True)
        def far(flow_input): pass

        @flow.step
        def near(far):
            threads = [t for t in Path("/proc/self/task").iterdir() if int(t.name) != os.getpid()]
            return [(t / "status").read_text().partition("SigBlk:\\t")[2][:16] for t in threads]
        """,
    )
    run_id = flows.start("flow")
    assert counts(flows.work("flow", mode="drain")) == {"completed": 2}
    masks = flows.output(run_id)["near"]
    assert masks  # the connection is still there
    taken = {int(mask, 16) for mask in masks}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
        assert all(mask & 1 << (number - 1) for mask in taken)


def test_one_step_alone(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy(
        FLOW
        + """
    @flow.step(thread=True)
    def far(flow_input): return os.getpid()

    @flow.step(thread=True)
    def near(flow_input): return os.getpid()
    """
    )
    set_executor = "select pgflow_worker.set_executor('flow', %s, %s)"
    flows.run(set_executor, shared_dask.address, "far")
    run_id = flows.start("flow")
    report = flows.work_batch("flow")
    assert report["completed"] == 2, (report, attempts(flows))
    backend = flows.connection.info.backend_pid
    output = flows.output(run_id)
    assert output["near"] == backend
    assert output["far"] in {worker.pid for worker in shared_dask.workers}
    flows.run(set_executor, None, "far")
    run_id = flows.start("flow")
    assert flows.work("flow", mode="drain")["completed"] == 2
    assert flows.output(run_id) == {"near": backend, "far": backend}


def test_code_travels_and_so_does_the_next_version(flows: Flows, shared_dask: Dask) -> None:
    source = """
    import prices

    @flow.step(thread=True)
    def price(flow_input):
        from other_prices import OTHER
        return prices.price() + OTHER
    """
    flows.deploy("OTHER = 10", "other_prices")
    flows.deploy("def price(): return 1", "prices")
    flows.deploy_to(shared_dask, FLOW + source)
    runs = [flows.start("flow")]
    flows.work("flow", mode="drain")
    flows.deploy("def price(): return 2", "prices")
    runs.append(flows.start("flow"))
    flows.work("flow", mode="drain")
    assert [flows.output(run)["price"] for run in runs] == [11, 12]


def test_a_map_with_at_most_so_many_at_once(flows: Flows, tmp_path: Path) -> None:
    dask = Dask(tmp_path)
    try:
        dask.start_scheduler()
        dask.start_worker(threads=8)
        flows.deploy_to(
            dask,
            """
            import time

            flow = Flow("flow")

            @flow.map(thread=True)
            def moment(element):
                began = time.monotonic()
                time.sleep(0.3)
                return [began, time.monotonic()]
            """,
        )
        run_id = flows.start("flow", list(range(9)))
        report = flows.work("flow", mode="drain", max_concurrent=3)
        assert counts(report) == {"completed": 9}
        # Nothing of this process stood still.
        assert (report["frozen_ms"], report["notes"]) == (0, [])
        times = flows.output(run_id)["moment"]
        most = max(sum(a <= began < b for a, b in times) for began, _ in times)
        assert most == 3
    finally:
        dask.stop()


def test_errors_have_their_remote_traceback(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy_to(
        shared_dask,
        FLOW
        + """
    def deeper(value):
        return value["missing"]

    @flow.step(thread=True)
    def fails(flow_input, ctx: Context):
        ctx.log.warning("about to fail, attempt %s", ctx.attempt)
        return deeper(flow_input)
    """,
    )
    flows.start("flow")
    assert counts(flows.work("flow")) == {"retried": 1}
    [(error, traceback, log)] = flows.rows(
        "select error, traceback, log from pgflow_worker.attempts"
    )
    assert error == "KeyError: 'missing' (flows_of_test.py:9, in deeper)"
    assert 'return value["missing"]' in traceback
    assert "pgflow_worker" not in traceback
    assert log.endswith("WARNING about to fail, attempt 1")


def test_a_handler_chooses_what_its_failure_means(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy_to(
        shared_dask,
        """
        from pgflow_worker import Retry, Snooze

        flow = Flow("flow")

        @flow.step(thread=True)
        def far(flow_input):
            match flow_input:
                case "snooze": raise Snooze("not yet", after=100)
                case "retry": raise Retry("again", after=100)
                case "fail": raise Fail("for good")
        """,
    )
    for choice in ("snooze", "retry", "fail"):
        flows.start("flow", choice)
    assert counts(flows.work("flow")) == {"snoozed": 1, "retried": 1, "failed": 1}


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        ("return {1}", 'result of step "far": $ is of type set, which JSON does not have'),
        ("return float('nan')", 'result of step "far": $ is NaN'),
        ("return 'x' * 80_000_000", 'result of step "far" takes 80000002 bytes as JSON'),
    ],
)
def test_outputs_are_checked(flows: Flows, shared_dask: Dask, handler: str, error: str) -> None:
    flows.deploy_to(
        shared_dask,
        f"""
        flow = Flow("flow", max_attempts=1)

        @flow.step(thread=True)
        def far(flow_input):
            {handler}
        """,
    )
    run_id = flows.start("flow")
    assert counts(flows.work("flow")) == {"failed": 1}
    assert error_of(flows, run_id).startswith(error)


def test_a_large_result(flows: Flows, shared_dask: Dask) -> None:
    flows.deploy_to(
        shared_dask,
        FLOW
        + """
    @flow.step(thread=True)
    def far(flow_input): return "x" * 20_000_000
    """,
    )
    run_id = flows.start("flow")
    assert counts(flows.work("flow")) == {"completed": 1}
    assert len(flows.output(run_id)["far"]) == 20_000_000


@pytest.mark.parametrize(
    "handler",
    [
        "def slow(flow_input):\n            while True: pass",
        "def slow(flow_input):\n"
        "            while True:\n"
        "                try: time.sleep(0.1)\n"
        "                except BaseException: os.environ['STOPPED'] = 'yes'; raise",
    ],
)
def test_a_handler_in_a_thread_has_its_time(flows: Flows, shared_dask: Dask, handler: str) -> None:
    flows.deploy_to(
        shared_dask,
        f"""
        import os, time

        flow = Flow("flow", timeout=3, max_attempts=1)

        @flow.step(thread=True)
        {handler}
        """,
    )
    run_id = flows.start("flow")
    assert counts(flows.work("flow")) == {"failed": 1}
    assert error_of(flows, run_id) == 'step "slow" took longer than 3 s'
    # Both workers are free again.
    flows.run("select pgflow_worker.undeploy('flows_of_test')")
    flows.deploy_to(shared_dask, NAPS.format(slug="flow_2"), flow_slug="flow_2")
    run_id = flows.start("flow_2", [1, 2])
    assert flows.work("flow_2", mode="drain")["completed"] == 2


NAPS = """
    import time

    flow = Flow("{slug}")

    @flow.map(thread=True)
    def nap(element):
        time.sleep(0.2)
"""


def test_an_async_handler_has_its_time(flows: Flows, shared_dask: Dask, tmp_path: Path) -> None:
    flows.deploy_to(
        shared_dask,
        """
        import asyncio
        from pathlib import Path

        flow = Flow("flow", timeout=3, max_attempts=1)

        @flow.step
        async def slow(flow_input):
            try:
                await asyncio.sleep(1000)
            except asyncio.CancelledError:
                Path(flow_input).write_text("cancelled")
                raise
        """,
    )
    marker = tmp_path / "marker"
    run_id = flows.start("flow", str(marker))
    assert counts(flows.work("flow")) == {"failed": 1}
    assert error_of(flows, run_id) == 'step "slow" took longer than 3 s'
    assert marker.read_text() == "cancelled"


def test_the_coroutines_of_a_process_share_an_event_loop(flows: Flows, own_dask: Dask) -> None:
    flows.deploy_to(
        own_dask,
        """
        import asyncio, functools, os

        flow = Flow("flow")

        @functools.cache
        def client(): return asyncio.Event()  # which is bound to the loop that waits for it

        @flow.map
        async def far(element):
            try:
                await asyncio.wait_for(client().wait(), 0.05)
            except TimeoutError:
                return os.getpid()
        """,
    )
    run_id = flows.start("flow", list(range(8)))
    assert counts(flows.work("flow", mode="drain")) == {"completed": 8}
    assert set(flows.output(run_id)["far"]) == {worker.pid for worker in own_dask.workers}
    # And the processes can end.
    own_dask.workers[0].terminate()
    assert own_dask.workers[0].wait(20) is not None


WAITING = """
    import asyncio, time
    from pathlib import Path

    flow = Flow("flow", max_attempts=2)

    @flow.step(thread=True)
    def in_thread(flow_input):
        Path(flow_input, "thread").write_text("begun")
        try:
            while True: time.sleep(0.01)
        except BaseException as error:
            Path(flow_input, "thread").write_text("ended")
            raise

    @flow.step
    async def in_loop(flow_input):
        Path(flow_input, "loop").write_text("begun")
        try:
            await asyncio.sleep(1000)
        except BaseException as error:
            Path(flow_input, "loop").write_text("ended")
            raise
"""


def states(directory: Path) -> list[str]:
    files = [directory / "thread", directory / "loop"]
    return [file.read_text() if file.exists() else "" for file in files]


@pytest.mark.parametrize("signal", ["pg_cancel_backend", "pg_terminate_backend"])
def test_a_cancel_reaches_the_cluster(
    flows: Flows,
    other: Session,
    background: Callable[..., Future[Any]],
    shared_dask: Dask,
    tmp_path: Path,
    signal: str,
) -> None:
    tmp_path.chmod(0o777)
    flows.deploy_to(shared_dask, WAITING)
    flows.start("flow", str(tmp_path))
    call = background(flows.work, "flow", mode="drain")
    until(lambda: states(tmp_path) == ["begun", "begun"])
    began = time.monotonic()
    other.run(f"select {signal}(%s)", flows.connection.info.backend_pid)
    with pytest.raises((psycopg.errors.QueryCanceled, psycopg.OperationalError)):
        call.result(20)
    assert time.monotonic() - began < 5
    until(lambda: states(tmp_path) == ["ended", "ended"])
    query = "select outcome, error from pgflow_worker.attempts"
    for outcome, error in other.rows(query):
        assert outcome == "failed"
        assert error.startswith("canceled: ")


def test_a_killed_backend_leaves_nothing_running(
    flows: Flows,
    other: Session,
    background: Callable[..., Future[Any]],
    own_dask: Dask,
    tmp_path: Path,
) -> None:
    flows.deploy_to(own_dask, WAITING)
    flows.start("flow", str(tmp_path))
    call = background(flows.work, "flow", mode="drain")
    until(lambda: states(tmp_path) == ["begun", "begun"])
    other.run("select pg_terminate_backend(%s)", flows.connection.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        call.result(20)
    until(lambda: states(tmp_path) == ["ended", "ended"])
    assert os.environ  # the test's own process goes on


SECRET = """
    from pgflow_worker import secret

    flow = Flow("flow", max_attempts=1, secrets=["api_key"])

    @flow.step(thread=True)
    def far(flow_input):
        raise Fail("with " + secret("api_key"))
"""


@pytest.mark.parametrize(
    ("send", "error"),
    [
        (False, 'LookupError: the secrets of flow "flow" are not sent to the cluster'),
        (True, "with ***"),
    ],
)
def test_secrets_go_only_where_they_may(
    flows: Flows,
    shared_dask: Dask,
    tmp_path_factory: pytest.TempPathFactory,
    send: bool,
    error: str,
) -> None:
    directory = Path("/var/tmp") / f"pgflow_worker_secrets_{os.getpid()}"
    directory.mkdir(mode=0o700)
    try:
        (directory / "api_key").write_text("sesame-open")
        (directory / "api_key").chmod(0o600)
        flows.run("select pgflow_worker.set_secrets(%s)", str(directory))
        flows.deploy_to(shared_dask, SECRET, send_secrets=send)
        run_id = flows.start("flow")
        assert counts(flows.work("flow")) == {"failed": 1}
        assert error_of(flows, run_id).startswith(error)
        assert (
            flows.rows("select 1 from pgflow_worker.attempts where attempts::text ~ 'sesame'") == []
        )
    finally:
        (directory / "api_key").unlink()
        directory.rmdir()


def test_resources(flows: Flows, own_dask: Dask) -> None:
    special = own_dask.start_worker("--resources", "GPU=1")
    flows.deploy_to(
        own_dask,
        """
        import os

        flow = Flow("flow")

        @flow.map(thread=True, resources={"GPU": 1})
        def far(element): return os.getpid()
        """,
    )
    run_id = flows.start("flow", list(range(6)))
    assert counts(flows.work("flow", mode="drain")) == {"completed": 6}
    assert set(flows.output(run_id)["far"]) == {special.pid}


def test_tls(flows: Flows, other: Session, tmp_path: Path) -> None:
    dask = Dask(tmp_path)
    try:
        settings = dask.encrypt()
        dask.start_scheduler()
        dask.start_worker()
        source = (
            FLOW
            + """
    @flow.step(thread=True)
    def far(flow_input): return os.getpid()
    """
        )
        flows.deploy_to(dask, source)
        flows.start("flow")
        # The server has no certificate yet.
        assert counts(flows.work("flow", mode="drain")) == {"parked": 1}
        # Dask reads its settings when it is imported: here they come with the module.
        flows.deploy(f"    import os; os.environ |= {settings!r}" + source)
        flows.run("update pgmq.q_flow set vt = clock_timestamp()")
        assert counts(other.work("flow", mode="drain")) == {"completed": 1}
    finally:
        dask.stop()

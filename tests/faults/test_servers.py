"""Disks that are full, standbys, two databases, clocks that are set back."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import connect_to, create_database
from tests.database.conftest import Session, counts
from tests.faults.conftest import STEPS, go_on, outputs
from tests.faults.servers import Copy, copy_of

Background = Callable[..., "Future[Any]"]


# Servers


def test_two_databases_with_the_same_flow(
    server: PostgreSQLExecutor,
    template: str,
    session: Session,
    other: Session,
    waiting: "Future[Any]",
) -> None:
    """Each has its own slots, and takes back the tasks of its own workers only."""
    create_database(server, "twin", template)
    try:
        with connect_to(server, "twin") as connection:
            twin = Session(connection)
            twin.deploy(STEPS)
            twin.start("f", "twin")
            # What a worker has left that died in slot 1 of the other database.
            twin.run("""
                insert into pgflow.workers (worker_id, queue_name, function_name)
                select worker_id, 'f', 'pgflow_worker' from pgflow_worker._slots('f')
                where slot = 1;
                select pgflow.start_tasks('f', array[1], (select worker_id from pgflow.workers))
            """)
            assert counts(twin.work("f", mode="drain")) == {"rescued": 1, "completed": 2}
            assert outputs(twin) == ["twin"]
    finally:
        with connect_to(server, "postgres") as connection:
            connection.execute("drop database twin with (force)")
    assert other.value("select count(*) from pgflow.step_tasks where status = 'started'") == 1
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}


def test_a_temporary_file_that_grows_too_large(session: Session) -> None:
    """The attempt fails with PostgreSQL's error, which names the setting."""
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def step(tx: Transaction):
            tx.execute("select n from generate_series(1, 100000) as n order by -n")
    """)
    session.run("set work_mem = '64kB'; set temp_file_limit = '100kB'")
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    # PostgreSQL 18 puts the name in quotes.
    error = error.replace('"', "")
    assert error.startswith("DatabaseError: temporary file size exceeds temp_file_limit (100kB)")
    session.run("reset temp_file_limit; update pgmq.q_f set vt = now()")
    assert counts(session.work("f")) == {"completed": 1}


def test_a_standby_and_its_promotion(
    server: PostgreSQLExecutor,
    database: str,
    session: Session,
    other: Session,
    waiting: "Future[Any]",
) -> None:
    """work() on a standby is skipped with a note; once promoted it takes the tasks back."""
    with copy_of(server, standby=True) as standby, standby.connect(database) as connection:
        there = Session(connection)
        there.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
        for mode in ("batch", "wait"):
            report = there.work("f", mode=mode)
            assert (report["status"], report["notes"]) == (
                "skipped",
                ["this server or transaction is read-only"],
            )
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            there.deploy(STEPS)
        there.run("select pg_promote()")
        # The advisory lock that the handler waits for is the primary's.
        assert counts(there.work("f", mode="drain")) == {"rescued": 1, "completed": 4}
        assert outputs(there) == ["wait", "behind"]
    go_on(other)
    assert counts(waiting.result()) == {"completed": 4}


# A file system of its own for one directory, and then a program, as an ordinary user.
SMALL_DISK = """
mount -t tmpfs -o size=48m tmpfs "$0" && exec unshare --user --map-user=1 --map-group=1 "$@"
"""


@pytest.fixture(scope="module")
def small_disk(server: PostgreSQLExecutor, template: str) -> Iterator[tuple[Copy, Path]]:
    """A server with a database "small" on a file system of 48 MB, and where that is mounted."""
    with TemporaryDirectory(prefix="pgflow_worker_disk_", dir="/tmp") as directory:
        in_namespace = ("unshare", "--user", "--map-root-user", "--mount")
        try:
            subprocess.run(
                [*in_namespace, "sh", "-c", SMALL_DISK, directory, "true"],
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            # Containers and hardened kernels often forbid it; nothing else makes a disk full.
            pytest.skip(f"this user may not mount a file system in a namespace of its own: {error}")
        wrapper = (*in_namespace, "sh", "-c", SMALL_DISK, directory)
        with copy_of(server, wrapper=wrapper) as copy:
            with copy.connect("postgres") as connection:
                connection.execute(f"create tablespace small location '{directory}'")
                connection.execute(f"create database small template {template} tablespace small")
            yield copy, Path(directory)


@pytest.fixture
def small(small_disk: tuple[Copy, Path]) -> Iterator[Session]:
    """A session in the database on the small disk, where runs of the flow "f" have been.

    One that failed as well, so that no table or index has to be extended for the next of its kind.
    """
    copy, _ = small_disk
    with copy.connect("small") as connection:
        session = Session(connection)
        session.deploy("""
            import random
            flow = Flow("f", max_attempts=3, base_delay=1)

            def noise(size):  # so that it cannot be compressed
                return random.randbytes(size // 2).hex()

            @flow.step
            def step(flow_input, tx: Transaction):
                if flow_input == "fail":
                    raise Fail("on purpose")
                if flow_input == "insert":
                    tx.execute("insert into written values ($1)", [noise(1_000_000)])
                return flow_input

            @flow.step
            def large(step):
                return noise(1_000_000) if step == "return" else None
        """)
        session.run("create table if not exists written (value text)")
        for flow_input in ("insert", "fail"):
            session.start("f", flow_input)
        session.work("f", mode="drain")
        yield session
        session.run("delete from pgflow.step_tasks")


FILL = """
do language plpython3u $$
    with open('{}/ballast', 'ab', buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(8192))
        except OSError as error:
            assert error.errno == 28, error
$$
"""
EMPTY = "do language plpython3u $$ import os; os.remove('{}/ballast') $$"


def test_a_disk_that_is_full_for_a_handler(small: Session, small_disk: tuple[Copy, Path]) -> None:
    """The attempt fails with PostgreSQL's error; another follows when there is room."""
    small.start("f", "insert")
    small.run(FILL.format(small_disk[1]))
    try:
        assert counts(small.work("f")) == {"retried": 1}
    finally:
        small.run(EMPTY.format(small_disk[1]))
    error = small.value("select error_message from pgflow.step_tasks where status = 'queued'")
    assert error.startswith("DatabaseError: could not extend file")
    assert "No space left on device" in error
    small.run("update pgmq.q_f set vt = now()")
    assert counts(small.work("f", mode="drain")) == {"completed": 2}


def test_a_disk_that_is_full_for_a_result(small: Session, small_disk: tuple[Copy, Path]) -> None:
    """The call ends with PostgreSQL's error and its hint; no attempt is counted."""
    run = small.start("f", "return")
    assert counts(small.work("f")) == {"completed": 1}
    small.run(FILL.format(small_disk[1]))
    try:
        with pytest.raises(psycopg.errors.DiskFull, match="No space left") as caught:
            small.work("f")
    finally:
        small.run(EMPTY.format(small_disk[1]))
    assert caught.value.diag.message_hint == "Check free disk space."
    assert small.rows(
        "select attempts_count, error_message from pgflow.step_tasks where status = 'queued'"
    ) == [(0, None)]
    assert counts(small.work("f")) == {"completed": 1}
    assert small.value("select status from pgflow.runs where run_id = %s", run) == "completed"


# Clocks
#
# A clock that is set back by an hour is the same as stored times that are an hour later.


def later_by_an_hour(session: Session, *columns: str) -> None:
    """Move the times in these columns, given as table.column; a minus before it moves them back."""
    for column in columns:
        table, _, name = column.lstrip("-").rpartition(".")
        sign = "-" if column.startswith("-") else "+"
        session.run(f"update {table} set {name} = {name} {sign} interval '1 hour'")


EVERY_TIME = (
    *("pgmq.q_f.vt", "pgmq.q_f.enqueued_at", "pgflow.step_tasks.queued_at"),
    *("pgflow.step_states.created_at", "pgflow.runs.started_at"),
)


def test_a_clock_set_back_while_tasks_wait(session: Session) -> None:
    """They wait until the clock has caught up, and the calls say nothing; new runs go on."""
    session.deploy(STEPS)
    session.start("f", "old")
    session.run("alter table pgflow.step_states drop constraint started_at_is_after_created_at")
    later_by_an_hour(session, *EVERY_TIME)
    session.start("f", "new")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert counts(session.work("f", mode="drain")) == {}
    session.run("update pgmq.q_f set vt = vt - interval '1 hour'")
    later_by_an_hour(session, "-pgmq.q_f.enqueued_at", *(f"-{column}" for column in EVERY_TIME[2:]))
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert sorted(outputs(session)) == ["new", "old"]


def test_a_message_of_a_time_to_come(session: Session) -> None:
    """A task that was taken back after the clock was set back waits, and costs no time."""
    session.deploy(STEPS)
    session.start("f", "old")
    later_by_an_hour(session, "pgmq.q_f.enqueued_at", "pgflow.step_tasks.queued_at")
    session.start("f", "new")
    assert counts(session.work("f", mode="drain", max_duration="2 s")) == {"completed": 2}
    assert session.value("select read_ct < 20 from pgmq.q_f where msg_id = 1")
    later_by_an_hour(session, "-pgmq.q_f.enqueued_at", "-pgflow.step_tasks.queued_at")
    session.run("update pgmq.q_f set vt = now()")
    assert counts(session.work("f", mode="drain")) == {"completed": 2}
    assert outputs(session) == ["old", "new"]


def test_a_clock_set_back_while_a_handler_runs(
    session: Session, other: Session, waiting: "Future[Any]"
) -> None:
    """The call ends with the violated constraint of pgflow's; no attempt is counted."""
    other.run("alter table pgflow.step_tasks drop constraint started_at_is_after_queued_at")
    later_by_an_hour(other, "pgflow.step_tasks.queued_at")
    go_on(other)
    with pytest.raises(psycopg.errors.CheckViolation, match="is_after_queued_at"):
        waiting.result()
    assert session.rows("select distinct status, attempts_count from pgflow.step_tasks") == [
        ("queued", 0)
    ]
    later_by_an_hour(other, "-pgflow.step_tasks.queued_at")
    session.run("update pgmq.q_f set vt = now()")
    assert counts(session.work("f", mode="drain")) == {"completed": 4}


def test_a_task_that_cannot_be_taken_back(session: Session) -> None:
    """A note says why; the other tasks run, and it is taken back when that can be done."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return flow_input
    """)
    session.start("f", "old")
    # What a worker has left that died in slot 1; then the clock is set back.
    session.run("""
        insert into pgflow.workers (worker_id, queue_name, function_name)
        select worker_id, 'f', 'pgflow_worker' from pgflow_worker._slots('f') where slot = 1;
        select pgflow.start_tasks('f', array[1], (select worker_id from pgflow.workers))
    """)
    session.run("alter table pgflow.step_tasks drop constraint started_at_is_after_queued_at")
    later_by_an_hour(session, "pgflow.step_tasks.queued_at")
    session.start("f", "new")
    report = session.work("f", mode="drain")
    assert counts(report) == {"completed": 1}
    assert "failed_at_is_after_queued_at" in str(report["notes"])
    later_by_an_hour(session, "-pgflow.step_tasks.queued_at")
    assert counts(session.work("f", mode="drain")) == {"failed": 1}


def test_a_clock_that_is_really_set_back(
    server: PostgreSQLExecutor, database: str, session: Session, tmp_path: Path
) -> None:
    """What has begun is finished; what it starts waits until the clock has caught up."""
    libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        pytest.fail("libfaketime is not here: run make dev-deps")
    clock = tmp_path / "clock"
    clock.write_text("+0")
    session.deploy("""
        flow = Flow("f", max_attempts=3, base_delay=1)

        @flow.step
        def first(flow_input):
            if "clock" in flow_input:
                with open(flow_input["clock"], "w") as clock:
                    clock.write("-1h")
            return flow_input["name"]

        @flow.step
        def second(first): return first
    """)
    environment = {
        "LD_PRELOAD": str(libraries[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    with (
        copy_of(server, environment=environment) as misled,
        misled.connect(database) as connection,
    ):
        there = Session(connection)
        before = there.value("select clock_timestamp()")
        there.start("f", {"name": "old", "clock": str(clock)})
        assert counts(there.work("f", mode="drain", max_duration="1 s")) == {"completed": 1}
        assert there.value("select clock_timestamp() < %s", before)
        there.start("f", {"name": "new"})
        assert counts(there.work("f", mode="drain", max_duration="1 s")) == {"completed": 2}
        clock.write_text("+0")
        assert counts(there.work("f", mode="drain")) == {"completed": 1}
        assert sorted(outputs(there)) == ["new", "old"]

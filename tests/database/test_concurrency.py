"""Handlers that run at the same time: how many, what holds up what, what is started when."""

from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

Background = Callable[..., "Future[Any]"]

# Each handler notes how many run with it, and waits long enough for as many as may.
PEAK = """
    import asyncio, threading, time
    flow = Flow("peak")
    lock = threading.Lock()
    running = peak = 0

    def enter(change):
        global running, peak
        with lock:
            running += change
            peak = max(peak, running)
        return peak

    @flow.step
    async def looped(flow_input):
        enter(1)
        await asyncio.sleep(0.03)
        return enter(-1)

    @flow.step(thread=True)
    def threaded(flow_input):
        enter(1)
        time.sleep(0.03)
        return enter(-1)

    @flow.step
    def plain(flow_input):
        enter(1)
        time.sleep(0.01)
        return enter(-1)
"""

# Waits until the file of its run is there, if it has one.
WAITER = """
    import asyncio, os, time
    flow = Flow("waiter", max_attempts=1)

    @flow.step
    async def looped(flow_input):
        while flow_input.get("file") and not os.path.exists(flow_input["file"]):
            await asyncio.sleep(0.01)

    other = Flow("thread_waiter", max_attempts=1)

    @other.step(thread=True)
    def threaded(flow_input):
        while flow_input.get("file") and not os.path.exists(flow_input["file"]):
            time.sleep(0.01)
"""


def xids(session: Session, status: str) -> int:
    """In how many transactions tasks got a status, see note_transactions."""
    number: int = session.value("select count(distinct xid) from noted where status = %s", status)
    return number


@pytest.fixture
def note_transactions(session: Session) -> None:
    """Notes the transaction of every change of a task, and how many tasks are started then."""
    session.run("""
        create table public.noted (
            status text, started bigint, xid xid8 default pg_current_xact_id()
        );
        create function note() returns trigger language plpgsql as $$
        begin
            insert into public.noted (status, started)
            select new.status, count(*) filter (where status = 'started') from pgflow.step_tasks;
            return null;
        end $$;
        create trigger note after update on pgflow.step_tasks
        for each row execute function note();
    """)


@pytest.fixture
def in_python(session: Session) -> Callable[[str], str]:
    """Evaluates Python in the session's backend, without touching this package."""
    session.run("""
        create function in_python(expression text) returns text language plpython3u as $$
            import sys, threading
            return str(eval(expression))
        $$
    """)

    def evaluate(expression: str) -> str:
        text: str = session.value("select in_python(%s)", expression)
        return text

    return evaluate


# How many at a time


@pytest.mark.parametrize("places", [1, 2, 5])
def test_the_peak_is_exactly_the_cap(session: Session, places: int) -> None:
    session.deploy(PEAK)
    for _ in range(8):
        session.start("peak")
    report = session.work("peak", batch_size=100, max_concurrent=places, mode="drain")
    assert counts(report) == {"completed": 24}
    assert session.value("select max(output::int) from pgflow.step_tasks") == places


@pytest.mark.parametrize("flow", ["waiter", "thread_waiter"])
def test_a_slow_handler_holds_up_neither_others_nor_new_work(
    session: Session, other: Session, background: Background, tmp_path: Path, flow: str
) -> None:
    session.deploy(WAITER)
    slow = session.start(flow, {"file": str(tmp_path / "go")})
    session.start(flow)
    call = background(session.work, flow, max_concurrent=2, mode="drain")
    other.until("select count(*) = 1 from pgflow.runs where status = 'completed'")
    # Sent while the slow one runs, and more than fit a batch.
    for _ in range(12):
        other.start(flow)
    other.until("select count(*) = 13 from pgflow.runs where status = 'completed'")
    assert other.value("select status from pgflow.runs where run_id = %s", slow) == "started"
    (tmp_path / "go").touch()
    assert counts(call.result()) == {"completed": 14}


def test_a_batch_is_one_batch_however_fast_its_handlers_are(session: Session) -> None:
    session.deploy(WAITER)
    for _ in range(5):
        session.start("waiter")
    assert counts(session.work("waiter", batch_size=3)) == {"completed": 3}
    assert counts(session.work_batch("waiter", batch_size=1)) == {"completed": 1}


# What is left behind


def test_threads_take_no_signals_and_end_with_the_call(
    session: Session, in_python: Callable[[str], str]
) -> None:
    session.deploy("""
        import signal, threading
        flow = Flow("f")

        def unblocked():
            return sorted(signal.valid_signals() - signal.pthread_sigmask(signal.SIG_BLOCK, []))

        @flow.step
        async def looped(): return unblocked()

        @flow.step(thread=True)
        def threaded(): return unblocked()

        @flow.step
        def plain(): return len(unblocked())
    """)
    session.start("f")
    assert counts(session.work("f")) == {"completed": 3}
    # SIGKILL and SIGSTOP cannot be blocked.
    outputs = dict(session.rows("select step_slug, output from pgflow.step_tasks"))
    assert outputs["looped"] == outputs["threaded"] == [9, 19]
    assert outputs["plain"] > 50
    session.until("select in_python('threading.active_count()') = '1'")


def test_only_a_flow_that_needs_them_pays_for_threads(
    session: Session, connect: Callable[..., Connection], in_python: Callable[[str], str]
) -> None:
    session.deploy('flow = Flow("f")\n@flow.step\ndef step(): return 1\n')
    costly = "sorted({'asyncio', 'concurrent.futures', 'logging'} & sys.modules.keys())"
    fresh = Session(connect())  # whose Python has not deployed anything
    session.start("f")
    assert counts(fresh.work("f")) == {"completed": 1}
    assert fresh.value("select in_python(%s)", "'pgflow_worker.worker' in sys.modules") == "True"
    assert fresh.value("select in_python(%s)", costly) == "[]"


def test_one_event_loop_and_one_import_in_a_call(session: Session) -> None:
    session.deploy("""
        import asyncio, functools, itertools
        flow = Flow("f")
        counter = itertools.count(1)

        @functools.cache
        def client():
            return next(counter), asyncio.get_running_loop()

        @flow.step
        async def step(flow_input):
            await asyncio.sleep(0)
            number, loop = client()
            assert loop is asyncio.get_running_loop()
            return number
    """)
    for _ in range(2):
        for _ in range(5):
            session.start("f")
        assert counts(session.work("f", batch_size=2, mode="drain")) == {"completed": 5}
    assert session.value("select bool_and(output = '1') from pgflow.step_tasks")


# Time


def test_an_async_handler_that_takes_too_long_is_stopped(session: Session) -> None:
    session.deploy("""
        import asyncio
        flow = Flow("f", max_attempts=1)

        @flow.step(timeout=3)
        async def step():
            await asyncio.sleep(60)
    """)
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1}
    assert session.value("select error_message from pgflow.step_tasks") == (
        'step "step" took longer than 3 s'
    )


def test_time_in_which_handlers_stood_still_does_not_count(session: Session) -> None:
    session.deploy("""
        import asyncio, time
        flow = Flow("f")

        @flow.step
        async def looped(ctx: Context):
            started = time.monotonic()
            await asyncio.sleep(0.3)
            return [time.monotonic() - started, ctx.timeout - ctx.remaining()]

        @flow.step
        def in_sql(tx: Transaction):
            time.sleep(0.1)  # until the other one has begun
            tx.execute("select pg_sleep(1.2)")
    """)
    session.start("f")
    report = session.work("f")
    assert counts(report) == {"completed": 2}
    passed, counted = session.value(
        "select output from pgflow.step_tasks where step_slug = 'looped'"
    )
    assert passed > 1.1
    assert counted < 1.0
    assert report["frozen_ms"] > 900
    [note] = report["notes"]
    assert note.startswith("concurrent handlers stood still for 1.")
    assert "workers = 2" in note


def test_handlers_that_block_each_other_are_named(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.step
        def fetch(): time.sleep(0.4)
    """)
    for _ in range(3):
        session.start("f")
    assert session.work("f")["notes"] == [
        'step "fetch" ran 3 tasks one after another, 0.4 s each: make it async def or thread=True'
    ]


# Claim what can run


@pytest.mark.usefixtures("note_transactions")
@pytest.mark.parametrize(("seconds", "most"), [(0.7, 2), (0, 30)])
def test_only_what_can_begin_soon_is_started(session: Session, seconds: float, most: int) -> None:
    session.deploy(f"""
        import time
        flow = Flow("f")

        @flow.step
        def step(): time.sleep({seconds})
    """)
    for _ in range(4 if seconds else 60):
        session.start("f")
    session.work("f", batch_size=100)
    started = session.value("select max(started) from noted")
    assert started <= most if seconds else started >= most


def test_what_cannot_be_started_in_time_is_given_back(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.step
        def step(): time.sleep(0.3)
    """)
    for _ in range(9):
        session.start("f")
    report = session.work("f", mode="drain", max_duration="0.4 seconds")
    done = report["completed"]
    assert 1 <= done <= 3
    assert session.rows(
        "select status, attempts_count, count(*) from pgflow.step_tasks group by 1, 2 order by 1"
    ) == [("completed", 1, done), ("queued", 0, 9 - done)]
    # For the next call at once.
    assert session.value("select count(*) from pgmq.q_f where vt <= clock_timestamp()") == 9 - done


@pytest.mark.parametrize("seconds", [0.0, 1.5])
def test_the_message_of_a_long_task_stays_invisible(session: Session, seconds: float) -> None:
    session.deploy(f"""
        import time
        flow = Flow("f", timeout=200)

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("select max(vt) > now() + interval '1 minute' as long from pgmq.q_f")
            time.sleep({seconds})
            return row["long"]
    """)
    session.start("f")
    session.start("f")
    session.work("f")
    # The second one's: by then it is known how long the step takes.
    assert session.rows("select output from pgflow.step_tasks order by message_id") == [
        (True,),
        (bool(seconds),),
    ]


# Shared commits


@pytest.mark.usefixtures("note_transactions")
@pytest.mark.parametrize(("wants", "most"), [("", 5), ("tx: Transaction", 40)])
def test_fast_handlers_without_tx_share_a_commit(session: Session, wants: str, most: int) -> None:
    session.deploy(f'flow = Flow("f")\n@flow.step\ndef step({wants}): return 1\n')
    for _ in range(40):
        session.start("f")
    assert counts(session.work("f", batch_size=100)) == {"completed": 40}
    transactions = xids(session, "completed")
    assert transactions == most if wants else transactions <= most
    assert session.value("select count(*) from pgflow_worker.attempts") == 40


@pytest.mark.usefixtures("note_transactions")
def test_slow_handlers_do_not_wait_for_each_others_commit(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")

        @flow.step
        def step(): time.sleep(0.02)
    """)
    for _ in range(5):
        session.start("f")
    session.work("f")
    assert xids(session, "completed") == 5


@pytest.mark.parametrize("sqlstate", ["P0001", "40001"])
def test_a_shared_commit_that_fails_is_made_one_by_one(session: Session, sqlstate: str) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return flow_input["n"]
    """)
    session.run(f"""
        create sequence public.tries;
        create function public.spoil() returns trigger language plpgsql as $$
        begin
            if new.output = '7' and ('{sqlstate}' = 'P0001' or nextval('public.tries') = 1) then
                raise exception using errcode = '{sqlstate}', message = 'spoilt';
            end if;
            return new;
        end $$;
        create trigger spoil before update on pgflow.step_tasks
        for each row when (new.status = 'completed') execute function public.spoil();
    """)
    for n in range(20):
        session.start("f", {"n": n})
    report = session.work("f", batch_size=100)
    if sqlstate == "40001":  # worth another try
        assert counts(report) == {"completed": 20}
        return
    assert counts(report) == {"completed": 19, "failed": 1}
    assert session.rows("select error_message from pgflow.step_tasks where status = 'failed'") == [
        ('result of step "step": spoilt',)
    ]


def test_a_refused_completion_does_not_take_the_others_with_it(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input): return flow_input["result"]
    """)
    # The code does not know that a map depends on its step: pgflow refuses without an error.
    session.run("select pgflow.add_step('f', 'each', array['step'], step_type => 'map')")
    for result in ([1], {"not": "a list"}, [2], [3]):
        session.start("f", {"result": result})
    report = session.work("f")
    assert counts(report) == {"completed": 3, "failed": 1}
    assert session.value("select count(*) from pgflow.runs where status = 'failed'") == 1


def test_a_lost_claim_does_not_take_the_others_with_it(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy("""
        import os, time
        flow = Flow("f")

        @flow.step
        def step(flow_input):
            while flow_input["last"] and not os.path.exists(flow_input["file"]):
                time.sleep(0.001)
    """)
    # The first one alone, so that the others are started together.
    for n in range(10):
        session.start("f", {"last": n == 9, "file": str(tmp_path / "go")})
    call = background(session.work, "f")
    other.until("select count(*) = 9 from pgflow.step_tasks where status = 'started'")
    other.run("""
        update pgflow.step_tasks set attempts_count = 9
        where message_id = (select max(message_id) - 1 from pgflow.step_tasks)
    """)
    (tmp_path / "go").touch()
    assert counts(call.result()) == {"completed": 9, "discarded": 1}


# Waiting


def test_a_waiting_worker_holds_no_snapshot_and_is_quick(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(WAITER)
    call = background(session.work, "waiter", mode="wait", max_duration="3 seconds")
    pid = session.connection.info.backend_pid
    other.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    idle = (
        "select backend_xmin is null and backend_xid is null from pg_stat_activity where pid = %s"
    )
    # A look at the queue has one for a moment: it is the rest that counts.
    looks = [other.value(idle, pid) for _ in range(200)]
    assert looks.count(True) > 150
    other.start("waiter")
    other.until("select status = 'completed' from pgflow.runs")
    assert other.value("select completed_at - started_at < interval '1 second' from pgflow.runs")
    assert counts(call.result()) == {"completed": 1}


def test_a_concurrent_handler_holds_no_snapshot(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(WAITER)
    session.start("waiter", {"file": str(tmp_path / "go")})
    call = background(session.work, "waiter", max_concurrent=1)
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    other.until(
        "select backend_xmin is null and backend_xid is null from pg_stat_activity where pid = %s",
        session.connection.info.backend_pid,
    )
    (tmp_path / "go").touch()
    assert counts(call.result()) == {"completed": 1}


def test_a_pause_stops_a_worker_with_concurrent_handlers(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(WAITER)
    for _ in range(6):
        session.start("waiter", {"file": str(tmp_path / "go")})
    call = background(session.work, "waiter", max_concurrent=2)
    other.until("select count(*) = 2 from pgflow.step_tasks where status = 'started'")
    other.run("select pgflow_worker.pause('waiter')")
    (tmp_path / "go").touch()
    report = call.result()
    assert (report["status"], counts(report)) == ("paused", {"completed": 2})
    other.run("select pgflow_worker.resume('waiter')")
    assert counts(session.work("waiter")) == {"completed": 4}


def test_an_error_loses_no_result(
    session: Session, other: Session, background: Background, tmp_path: Path
) -> None:
    session.deploy(WAITER.replace("max_attempts=1", "max_attempts=2"))
    session.start("waiter")
    slow = session.start("waiter", {"file": str(tmp_path / "never")})
    # The result of the first one is there when the start of the third one fails.
    session.run(f"""
        create function public.spoil() returns trigger language plpgsql as $$
        begin
            if new.task_index = 0 and (select count(*) from pgflow.runs) = 3 then
                raise exception using errcode = '53100', message = 'disk full';
            end if;
            return new;
        end $$;
        create trigger spoil before update on pgflow.step_tasks for each row
        when (new.status = 'started' and new.run_id <> '{slow}') execute function public.spoil();
    """)
    call = background(session.work, "waiter", max_concurrent=2, mode="drain")
    other.until("select count(*) = 1 from pgflow.runs where status = 'completed'")
    other.start("waiter")
    with pytest.raises(Exception, match="disk full"):
        call.result()
    assert other.rows(
        "select status, attempts_count from pgflow.step_tasks order by message_id"
    ) == [("completed", 1), ("queued", 0), ("queued", 0)]


CANCELED = "canceled: canceling statement due to user request"


@pytest.mark.parametrize("flow", ["waiter", "thread_waiter"])
def test_a_cancel_fails_the_attempts_that_run(
    session: Session,
    other: Session,
    connect: Callable[..., Connection],
    background: Background,
    tmp_path: Path,
    flow: str,
) -> None:
    # With a second attempt, and without the delay before it.
    session.deploy(WAITER.replace("max_attempts=1", "max_attempts=2, base_delay=1"))
    for _ in range(4):
        session.start(flow, {"file": str(tmp_path / "go")})
    call = background(session.work, flow, max_concurrent=2)
    other.until("select count(*) = 2 from pgflow.step_tasks where status = 'started'")
    other.run("select pg_cancel_backend(%s)", session.connection.info.backend_pid)
    with pytest.raises(Exception, match="canceling statement"):
        call.result()
    assert (
        other.rows(
            "select status, attempts_count, error_message from pgflow.step_tasks order by 2 desc"
        )
        == [("queued", 1, CANCELED)] * 2 + [("queued", 0, None)] * 2
    )
    (tmp_path / "go").touch()
    other.run(f"update pgmq.q_{flow} set vt = now()")
    assert counts(Session(connect()).work(flow)) == {"completed": 4}


@pytest.mark.parametrize(("attempts", "outcome"), [(1, ("failed", 1)), (2, ("queued", 0))])
def test_an_error_gives_back_what_may_run_again(
    session: Session,
    other: Session,
    background: Background,
    tmp_path: Path,
    attempts: int,
    outcome: tuple[str, int],
) -> None:
    session.deploy(WAITER.replace("max_attempts=1", f"max_attempts={attempts}"))
    session.start("waiter", {"file": str(tmp_path / "never")})
    call = background(session.work, "waiter", max_concurrent=2, mode="drain")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    other.run("alter function pgflow_worker._pause_reason(text) rename to gone")
    with pytest.raises(Exception, match="does not exist"):
        call.result()
    assert other.rows("select status, attempts_count from pgflow.step_tasks") == [outcome]


def test_tasks_with_one_attempt_are_started_when_they_begin(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute(
                "select count(*) as number from pgflow.step_tasks where status = 'started'"
            )
            return row["number"]
    """)
    for _ in range(5):
        session.start("f")
    assert counts(session.work("f")) == {"completed": 5}
    # What a worker that dies had started must not be started again.
    assert session.rows("select distinct output from pgflow.step_tasks") == [(1,)]

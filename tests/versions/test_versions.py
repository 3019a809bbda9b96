"""The same flows on every version of pgflow."""

from collections.abc import Callable

import psycopg
import pytest

from tests.conftest import Connection
from tests.database import doctor
from tests.database.conftest import Session, counts
from tests.versions.conftest import WITH_CONDITIONS

FLOW = """
    flow = Flow("bookShop", max_attempts=3, base_delay=1, timeout=30)

    @flow.step
    def stock(flow_input):
        return {"title": flow_input["title"], "copies": 3}

    @flow.step("saveIt", timeout=20)
    def save(stock, flow_input, tx: Transaction, ctx: Context):
        [row] = tx.execute("insert into public.sold values ($1) returning title", [stock["title"]])
        if ctx.attempt == 1:
            raise ValueError("not at once")
        return [row["title"], flow_input["title"], ctx.attempt]

    @flow.step(after=[stock])
    def quick(flow_input):
        return flow_input["title"]

    @flow.step
    def receipt(save, quick, stock):
        return {"saved": save, "quick": quick, "left": stock["copies"] - 1}
"""

MAPS = """
    flow = Flow("maps")

    @flow.array
    def numbers(flow_input):
        return list(range(flow_input["most"]))

    @flow.map(over=numbers)
    def double(number, flow_input):
        return [number, flow_input["most"]]

    @flow.map(over=double)
    def nothing(element):
        return None

    @flow.array(after=[nothing])
    def empty():
        return []

    @flow.map(over=empty)
    def never(element):
        return element

    @flow.step
    def total(double, nothing, never, flow_input):
        return [double, nothing, never, flow_input]
"""


def finish(session: Session, flow: str) -> None:
    """Work until nothing is left, without the delays between attempts."""
    while session.value(f"select count(*) > 0 from pgmq.q_{flow.lower()}"):
        session.run(f"update pgmq.q_{flow.lower()} set vt = now()")
        session.work(flow, mode="drain")


def test_a_flow_is_deployed_run_and_verified(session: Session) -> None:
    session.run("create table public.sold (title text)")
    assert session.deploy(FLOW)[0][1] == "compiled"
    run = session.start("bookShop", {"title": "Emma"})
    finish(session, "bookShop")
    assert session.rows("select status, output from pgflow.runs where run_id = %s", run) == [
        ("completed", {"receipt": {"saved": ["Emma", "Emma", 2], "quick": "Emma", "left": 2}})
    ]
    assert session.rows("select title from public.sold") == [("Emma",)]
    assert session.deploy(FLOW) == [("bookShop", "verified", [])]


def test_an_option_is_changed_in_place(session: Session) -> None:
    session.deploy(FLOW)
    [[_, status, changes]] = session.deploy(FLOW.replace("timeout=20", "timeout=25"))
    assert (status, changes) == ("updated", ["saveIt.timeout: 20 -> 25"])
    assert session.deploy(FLOW)[0][1] == "updated"


def test_a_task_without_attempts_fails_its_run(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step
        def broken(flow_input):
            raise ValueError("on purpose")

        @flow.step
        def other(flow_input):
            return 1
    """)
    run = session.start("f")
    finish(session, "f")
    assert session.value("select status from pgflow.runs where run_id = %s", run) == "failed"
    [[status, attempts, error]] = session.rows(
        "select status, attempts_count, error_message from pgflow.step_tasks "
        "where step_slug = 'broken'"
    )
    assert (status, attempts) == ("failed", 2)
    assert error.startswith("ValueError: on purpose")


def test_a_dead_workers_task_is_taken_back_by_the_next_call(
    session: Session, connect: Callable[..., Connection]
) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def fatal(ctx: Context, tx: Transaction):
            if ctx.attempt == 1 and not tx.execute("select from public.died"):
                tx.execute("select pg_terminate_backend(pg_backend_pid())")
            return ctx.attempt
    """)
    session.run("create table public.died ()")
    session.start("f")
    with pytest.raises(psycopg.OperationalError):
        Session(connect()).work("f")
    session.run("insert into public.died default values")
    assert counts(session.work("f", mode="drain")) == {"completed": 1, "rescued": 1}


def test_maps(session: Session, version: str) -> None:
    source = """
        flow = Flow("f")

        @flow.array
        def numbers(flow_input):
            return list(range(flow_input))

        @flow.map(over=numbers)
        def double(number, flow_input):
            return 2 * number + flow_input

        @flow.map(over=double)
        def half(number):
            return number / 2

        @flow.step
        def total(half):
            return sum(half)
    """
    if tuple(map(int, version.split("."))) < (0, 7):
        with pytest.raises(psycopg.Error) as error:
            session.deploy(source)
        assert error.value.sqlstate == "PW004"
        assert "a map step needs pgflow 0.7 or later" in str(error.value)
        return
    session.deploy(source)
    for length in (4, 0):
        run = session.start("f", length)
        finish(session, "f")
        assert session.rows("select status, output from pgflow.runs where run_id = %s", run) == [
            ("completed", {"total": 14.0 if length else 0})
        ]
    assert session.deploy(source) == [("f", "verified", [])]


def test_every_task_is_replayed_on_what_is_recorded(session: Session, version: str) -> None:
    session.run("create table public.sold (title text)")
    session.deploy(FLOW)
    flow_input: dict[str, object] = {"title": "Emma"}
    flow, tasks, last = "bookShop", 4, "receipt"
    if tuple(map(int, version.split("."))) >= (0, 7):
        session.deploy(MAPS)
        flow, flow_input, tasks, last = "maps", {"most": 3}, 9, "total"
    run = session.start(flow, flow_input)
    finish(session, flow)
    recorded = session.rows(
        "select step_slug, task_index, output from pgflow.step_tasks where run_id = %s", run
    )
    assert len(recorded) == tasks
    for step, index, output in recorded:
        assert session.rows(
            "select outcome, output from pgflow_worker.replay_task(%s, %s, %s)", run, step, index
        ) == [("completed", output)]
    assert session.value("select status from pgflow.runs where run_id = %s", run) == "completed"
    unfinished = session.start(flow, flow_input)
    with pytest.raises(
        psycopg.Error, match="has no input yet: there is no output of step"
    ) as caught:
        session.run("select pgflow_worker.replay_task(%s, %s)", unfinished, last)
    assert caught.value.sqlstate == "PW002"


def test_the_workers_row_is_written_and_marked(session: Session) -> None:
    session.deploy(FLOW)
    session.start("bookShop", {"title": "Emma"})
    session.work("bookShop")
    columns = [
        row[0]
        for row in session.rows(
            "select attname from pg_attribute where attrelid = 'pgflow.workers'::regclass "
            "and attname in ('stopped_at', 'deprecated_at')"
        )
    ]
    column = "stopped_at" if "stopped_at" in columns else "deprecated_at"
    assert session.rows(f"select queue_name, {column} is not null from pgflow.workers") == [
        ("bookShop", True)
    ]


def test_what_a_version_does_not_have_is_refused_with_the_one_that_has_it(
    session: Session, version: str
) -> None:
    number = tuple(map(int, version.split(".")))
    for option, since in (("start_delay=5", (0, 5, 3)), ("if_={'a': 1}", (0, 14))):
        source = f"""
            flow = Flow("f")

            @flow.step({option})
            def a(flow_input):
                return 1
        """
        if number >= since:
            assert session.deploy(source, allow_data_loss=True)[0][1] in ("compiled", "updated")
            assert session.deploy(source) == [("f", "verified", [])]
        else:
            with pytest.raises(psycopg.Error) as error:
                session.deploy(source)
            assert error.value.sqlstate == "PW004"
            assert f"needs pgflow {'.'.join(map(str, since))} or later" in str(error.value)


def test_flows_and_runs_are_drawn(session: Session) -> None:
    session.deploy(FLOW.replace("public.sold", "public.nowhere"))
    run = session.start("bookShop", {"title": "Emma"})
    flow = session.value("select pgflow_worker.flow_diagram('bookShop')")
    finish(session, "bookShop")
    diagram = session.value("select pgflow_worker.run_diagram(%s)", run)
    timeline = session.value("select pgflow_worker.run_timeline(%s)", run)

    assert 's1["saveIt"]' in flow
    assert "s0 --> s1" in flow
    states = {
        line.partition(":::")[0].split('"')[1].partition("<br>")[0]: line.partition(":::")[2]
        for line in diagram.splitlines()
        if ":::" in line
    }
    assert states == {
        "stock": "completed",
        "saveIt": "failed",
        "quick": "completed",
        "receipt": "cancelled",
    }
    notes = {line.split()[0]: line.split("|")[2] for line in timeline.splitlines()[4:]}
    assert list(notes) == ["stock", "saveIt", "quick", "receipt"]
    assert notes["saveIt"].endswith("failed, 3 attempts")
    assert notes["receipt"].strip() == "cancelled"


def test_the_doctor_makes_every_check(session: Session) -> None:
    session.run("create table public.sold (title text)")
    session.deploy(FLOW)
    session.start("bookShop", {"title": "Emma"})
    session.run("update pgmq.\"q_bookshop\" set vt = now() - interval '3 minutes'")
    found = [row for row in doctor.findings(session.connection) if "pg_cron" not in row.what]
    assert [row.severity for row in found] == ["error"]
    assert found[0].what.startswith('1 task of flow "bookShop" has been ready for up to 00:03:0')
    doctor.paste(session.connection, found[0].cure)
    # Its second attempt waits, and nothing is lost.
    found = [row for row in doctor.findings(session.connection) if "pg_cron" not in row.what]
    assert [row.severity for row in found if row.severity != "ok"] == []
    session.run("select pgmq.purge_queue('bookshop')")
    [found_lost] = [row for row in doctor.findings(session.connection) if "message" in row.what]
    doctor.paste(session.connection, found_lost.cure)
    finish(session, "bookShop")
    assert session.value("select status from pgflow.runs") == "completed"


def test_the_views(session: Session) -> None:
    session.run("create table public.sold (title text)")
    session.deploy(FLOW)
    session.start("bookShop", {"title": "Emma"})
    session.work("bookShop")
    session.work("bookShop")
    progress = "select status, progress, steps, tasks from pgflow_worker.run_progress"
    assert session.rows(progress) == [("started", "#####.....", "2/4", "2/4")]
    assert session.rows("select step_slug, status, failed from pgflow_worker.step_progress") == [
        ("stock", "completed", 0),
        ("saveIt", "started", 1),
        ("quick", "completed", 0),
        ("receipt", "created", 0),
    ]
    status = "select waiting, later, running, failed from pgflow_worker.flow_status"
    assert session.rows(status) == [(0, 1, 0, 0)]
    assert session.rows("select slot, state from pgflow_worker.worker_status") == [(1, "free")]
    failures = "select step_slug, attempt, task_is from pgflow_worker.recent_failures"
    assert session.rows(failures) == [("saveIt", "1/3", "queued")]
    assert session.value("select count(*) from pgflow_worker.recent_invocations") == 2


@pytest.mark.parametrize("version", WITH_CONDITIONS)
def test_a_skipped_step_is_done(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step(if_={"wanted": True})
        def wanted(flow_input): pass

        @flow.step
        def other(flow_input): pass
    """)
    session.start("f", {"wanted": False})
    progress = "select percent, steps from pgflow_worker.run_progress"
    assert session.rows(progress) == [(50, "1/2")]

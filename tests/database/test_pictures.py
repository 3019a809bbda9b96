"""flow_diagram(), run_diagram() and run_timeline()."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.database.conftest import WAITING, Session

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]

UNKNOWN_RUN = "00000000-0000-0000-0000-000000000000"
FLOW = """
    flow = Flow("greet", max_attempts=2, base_delay=1)

    @flow.array
    def names(flow_input):
        return flow_input

    @flow.map(over=names)
    def greeting(name):
        return f"Hello, {name}!"

    @flow.step
    def save(greeting, names, tx: Transaction):
        return len(greeting)
"""
# A run of one step, begun at noon. Its times are put in by hand, so that every character is known.
NOON = "2026-01-01 12:00:00+00"
ONE_STEP = """
    flow = Flow("f", max_attempts=3)

    @flow.step
    def step(flow_input):
        return 1
"""


def diagram(session: Session, run_id: str) -> str:
    text: str = session.value("select pgflow_worker.run_diagram(%s)", run_id)
    return text


def label(session: Session, run_id: str, step_slug: str) -> tuple[list[str], str]:
    """A step's lines and class in its run's diagram."""
    [line] = [line for line in diagram(session, run_id).splitlines() if f'"{step_slug}' in line]
    text, _, state = line.partition(":::")
    return text.split('"')[1].split("<br>")[1:], state


def timeline(session: Session, run_id: str, width: int = 100) -> list[str]:
    text: str = session.value("select pgflow_worker.run_timeline(%s, %s)", run_id, width)
    return text.splitlines()


def bars(session: Session, run_id: str, width: int = 100) -> dict[str, tuple[str, str]]:
    """What a timeline has in front of every bar; the bar, and what stands behind it."""
    parts = [line.split("|") for line in timeline(session, run_id, width)[4:]]
    return {name.strip(): (bar, note.strip()) for name, bar, note in parts}


def run_at_noon(session: Session, ended: str | None = None, **task: object) -> str:
    """A run of ONE_STEP that began at noon, with these columns of its task."""
    session.deploy(ONE_STEP)
    run_id = session.start("f")
    session.run("update pgflow.step_states set created_at = %s, started_at = %s", NOON, NOON)
    session.run("update pgflow.runs set started_at = %s", NOON)
    columns = {"queued_at": NOON} | task
    session.run(
        f"update pgflow.step_tasks set {', '.join(f'{name} = %s' for name in columns)}",
        *columns.values(),
    )
    if ended is not None:
        status = str(task["status"])
        session.run(
            "update pgflow.step_states set remaining_tasks = 0 where %s = 'completed'", status
        )
        for table in ("runs", "step_states"):
            session.run(f"update pgflow.{table} set status = %s, {status}_at = %s", status, ended)
    return run_id


def add_attempt(
    session: Session, run_id: str, attempt: int, outcome: str, finished: str, ms: float | None
) -> None:
    session.run(
        """insert into pgflow_worker.attempts
            (flow_slug, run_id, step_slug, task_index, attempt, outcome, finished_at, duration_ms)
        values ('f', %s, 'step', 0, %s, %s, %s, %s)""",
        *(run_id, attempt, outcome, finished, ms),
    )


# flow_diagram()


def test_a_flow_is_drawn_as_it_is_in_the_database(session: Session) -> None:
    session.deploy(FLOW)
    assert session.value("select pgflow_worker.flow_diagram('greet')").splitlines() == [
        "---",
        'title: "greet"',
        "---",
        "flowchart TD",
        '    s0["names"]',
        '    s1[["greeting"]]',
        '    s2["save"]',
        "    s0 --> s1",
        "    s0 --> s2",
        "    s1 --> s2",
    ]


def test_a_flow_that_is_not_deployed_is_drawn(session: Session) -> None:
    session.run("select pgflow.create_flow('elsewhere'), pgflow.add_step('elsewhere', 'only')")
    assert 's0["only"]' in session.value("select pgflow_worker.flow_diagram('elsewhere')")


def test_mermaid_does_not_take_a_slug_for_emphasis(session: Session) -> None:
    session.run("select pgflow.create_flow('f'), pgflow.add_step('f', '__init__')")
    assert 's0["#95;#95;init#95;#95;"]' in session.value("select pgflow_worker.flow_diagram('f')")


@pytest.mark.parametrize(
    ("flow_slug", "message"),
    [("gret", 'flow "gret" is not in this database'), (None, "flow_slug is null")],
)
def test_of_an_unknown_flow_the_known_ones_are_named(
    session: Session, flow_slug: str | None, message: str
) -> None:
    session.deploy(FLOW)
    with pytest.raises(psycopg.Error) as caught:
        session.value("select pgflow_worker.flow_diagram(%s)", flow_slug)
    assert caught.value.sqlstate == "PW001"
    assert caught.value.diag.message_primary == message
    assert "greet." in (caught.value.diag.message_hint or "")


# run_diagram()


def test_a_completed_run_is_drawn(session: Session) -> None:
    session.deploy(FLOW)
    run_id = session.start("greet", ["Ada", "Grace", "Alan"])
    session.work("greet", mode="drain")
    text = diagram(session, run_id)
    assert 'title: "greet: completed after ' in text
    assert "    s0 --> s1\n    s0 --> s2\n    s1 --> s2\n" in text
    assert [line.split()[1] for line in text.splitlines() if "classDef" in line] == ["completed"]
    [tasks, took], state = label(session, run_id, "greeting")
    assert (tasks, took[:5], state) == ("3 of 3 tasks", "took ", "completed")


def test_a_diagram_says_how_long_a_step_waits(session: Session) -> None:
    session.deploy(FLOW)
    run_id = session.start("greet", [])
    session.run("update pgflow.step_tasks set queued_at = now() - interval '2 hours 5 minutes'")
    assert 'title: "greet: running for ' in diagram(session, run_id)
    assert label(session, run_id, "names") == (["waiting for 2 h 5 min"], "queued")
    assert label(session, run_id, "greeting") == (["waits for 1 step"], "created")
    assert label(session, run_id, "save") == (["waits for 2 steps"], "created")


def test_a_diagram_says_how_long_a_step_waited_and_took(session: Session) -> None:
    run_id = run_at_noon(
        session,
        ended="2026-01-01 12:00:30+00",
        status="completed",
        attempts_count=2,
        started_at="2026-01-01 12:00:25+00",
        completed_at="2026-01-01 12:00:25+00",
    )
    add_attempt(session, run_id, 1, "failed", "2026-01-01 12:00:10+00", 4000)
    add_attempt(session, run_id, 2, "completed", "2026-01-01 12:00:30+00", 5000)
    assert label(session, run_id, "step") == (
        ["took 24.0 s", "waited 6.0 s", "2 attempts"],
        "completed",
    )


def test_a_diagram_says_that_a_step_waits_for_another_attempt(session: Session) -> None:
    run_id = run_at_noon(session, attempts_count=1)
    add_attempt(session, run_id, 1, "failed", "2026-01-01 12:00:10+00", 4000)
    [waiting, attempts], state = label(session, run_id, "step")
    assert (waiting[:12], attempts, state) == ("waiting for ", "after 1 attempt", "queued")


def test_steps_that_a_failed_run_has_overtaken_are_cancelled(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def bad(flow_input):
            raise ValueError("on purpose")

        @flow.step(start_delay=3600)
        def late(flow_input):
            return 1

        @flow.step
        def last(bad):
            return 1
    """)
    run_id = session.start("f")
    session.work("f")
    [failed], state = label(session, run_id, "bad")
    assert (failed[:13], state) == ("failed, took ", "failed")
    assert label(session, run_id, "late") == (["not run"], "cancelled")
    assert label(session, run_id, "last") == (["not run"], "cancelled")


# run_timeline()


def test_a_timeline_shows_waits_attempts_and_retries(session: Session) -> None:
    run_id = run_at_noon(
        session,
        ended="2026-01-01 12:00:35+00",
        status="completed",
        attempts_count=2,
        started_at="2026-01-01 12:00:30+00",
        completed_at="2026-01-01 12:00:30+00",
    )
    add_attempt(session, run_id, 1, "failed", "2026-01-01 12:00:10.5+00", 4500)
    add_attempt(session, run_id, 2, "completed", "2026-01-01 12:00:35+00", 5000)
    session.run("set timezone = 'UTC'")
    # The bar is 35 characters wide: one is a second.
    assert timeline(session, run_id, 60) == [
        f"run {run_id} of f",
        "completed after 35.0 s, started 2026-01-01 12:00:00+00",
        ". waits  # runs  x failed attempt  one character: 1.0 s",
        "     |0                            35.0 s|",
        "step |......####x...................#####| 9.5 s, 2 attempts",
    ]


def test_a_timeline_of_another_kind_of_worker_has_pgflows_times(session: Session) -> None:
    run_id = run_at_noon(
        session,
        ended="2026-01-01 12:00:40+00",
        status="failed",
        attempts_count=1,
        started_at="2026-01-01 12:00:20+00",
        failed_at="2026-01-01 12:00:40+00",
    )
    [(bar, note)] = bars(session, run_id).values()
    half = len(bar) // 2
    assert bar == "." * half + "#" * (len(bar) - half - 1) + "x"
    assert note == "20.0 s, failed"


def test_an_attempt_whose_worker_died_is_marked(session: Session) -> None:
    run_id = run_at_noon(
        session,
        ended="2026-01-01 12:00:40+00",
        status="completed",
        started_at="2026-01-01 12:00:30+00",
        completed_at="2026-01-01 12:00:40+00",
    )
    add_attempt(session, run_id, 1, "died", "2026-01-01 12:00:20+00", None)
    [(bar, note)] = bars(session, run_id).values()
    assert bar[len(bar) // 2] == "x"
    assert set(bar[: len(bar) // 2]) == {"."}
    assert bar.endswith("#")
    assert note == "10.0 s"


def test_a_running_task_runs_up_to_now(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def slow(flow_input, tx: Transaction):
            tx.execute("select pg_advisory_xact_lock(1)")
    """)
    run_id = session.start("f")
    session.run("select pg_advisory_lock(1)")
    call = background(other.work, "f")
    session.until(WAITING, 1)
    session.run("select pg_sleep(0.1)")
    [(bar, note)] = bars(session, run_id).values()
    [running], state = label(session, run_id, "slow")
    assert "running for" in timeline(session, run_id)[1]
    session.run("select pg_advisory_unlock(1)")
    call.result()
    assert bar.endswith("#")
    assert note.endswith(", running")
    assert (running[:12], state) == ("running for ", "started")


def test_a_handlers_whole_time_is_in_the_run(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def slow(flow_input, tx: Transaction):
            tx.execute("select pg_sleep(0.5)")
    """)
    run_id = session.start("f")
    session.work("f")
    # pgflow's time is when the handler's transaction began.
    assert session.value("""
        select run.completed_at < finished_at - interval '0.5 s'
            and (pgflow_worker._run_summary(run_id)).ended_at = finished_at
        from pgflow.runs as run join pgflow_worker.attempts using (run_id)
    """)
    [(bar, _)] = bars(session, run_id).values()
    assert bar.endswith("#")


def test_a_task_waits_from_the_end_of_its_dependencies_handlers(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def slow(flow_input, tx: Transaction):
            tx.execute("select pg_sleep(0.5)")

        @flow.step
        def then(slow):
            pass
    """)
    run_id = session.start("f")
    session.work("f", mode="drain")
    by_pgflow = (
        "select started_at - queued_at > '0.5 s' from pgflow.step_tasks where step_slug = %s"
    )
    assert session.value(by_pgflow, "then")
    first, second = (bar for bar, _ in bars(session, run_id).values())
    assert len(first.rstrip()) - 1 <= len(second) - len(second.lstrip())


def test_steps_without_tasks_have_a_line(session: Session) -> None:
    session.deploy(FLOW)
    run_id = session.start("greet", [])
    found = bars(session, run_id)
    assert {name: note for name, (_, note) in found.items()} == {
        "names": "waiting",
        "greeting": "not ready",
        "save": "not ready",
    }
    assert found["greeting"][0].strip() == ""
    session.work("greet", mode="drain")
    assert bars(session, run_id)["greeting"][1] == "no tasks"


def test_a_long_map_is_folded_and_what_matters_stays(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=2, base_delay=3600)

        @flow.map
        def each(number):
            if number == 17:
                raise ValueError("on purpose")
            return number
    """)
    run_id = session.start("f", list(range(25)))
    session.work("f", batch_size=25, mode="drain")
    found = bars(session, run_id)
    shown = [*range(9), 17]
    assert list(found) == [*(f"each[{number}]" for number in shown), "each +15 more"]
    assert "x" in found["each[17]"][0]
    assert found["each[17]"][1].endswith("waiting, 1 attempt")
    assert found["each +15 more"][1] == "15 completed"
    assert "#" in found["each +15 more"][0]


def test_twenty_tasks_have_a_line_each(session: Session) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(number): return number\n')
    run_id = session.start("f", list(range(20)))
    assert list(bars(session, run_id)) == [f"each[{number}]" for number in range(20)]


@pytest.mark.parametrize("width", [60, 61, 100, 333])
def test_a_timeline_fits_its_width(session: Session, width: int) -> None:
    flow_slug = "f" * 47
    session.run("select pgflow.create_flow(%s)", flow_slug)
    for slug in ("a", "x" * 127):
        session.run("select pgflow.add_step(%s, %s, step_type => 'map')", flow_slug, slug)
    run_id = session.start(flow_slug, list(range(30)))
    lines = timeline(session, run_id, width)
    assert len(lines) == 4 + 2 * 11
    assert max(map(len, lines)) <= width
    assert {len(line.rpartition("|")[0]) for line in lines[3:]} == {
        len(lines[3].rpartition("|")[0])  # the bars lie under each other
    }
    assert lines[-1].endswith("20 waiting")


@pytest.mark.parametrize("width", [59, 1001, None])
def test_a_width_out_of_range_is_refused(session: Session, width: int | None) -> None:
    session.deploy(ONE_STEP)
    run_id = session.start("f")
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.run_timeline(%s, %s)", run_id, width)
    assert caught.value.sqlstate == "PW002"
    assert caught.value.diag.message_primary == f"width is {'null' if width is None else width}"


# Both


@pytest.mark.parametrize("function", ["run_diagram", "run_timeline"])
@pytest.mark.parametrize(
    ("run_id", "message"),
    [(UNKNOWN_RUN, f"run {UNKNOWN_RUN} does not exist"), (None, "run_id is null")],
)
def test_an_unknown_run_is_an_error(
    session: Session, function: str, run_id: str | None, message: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        session.run(f"select pgflow_worker.{function}(%s)", run_id)
    assert caught.value.sqlstate == "PW002"
    assert caught.value.diag.message_primary == message
    statement = (caught.value.diag.message_hint or "").partition(": ")[2]
    session.run(statement)


def test_monitor_may_draw(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    run_id = session.start("greet", ["Ada"])
    session.work("greet", mode="drain")
    monitor = role("monitor")
    monitor.run("select pgflow_worker.flow_diagram('greet')")
    assert diagram(monitor, run_id) == diagram(session, run_id)
    assert timeline(monitor, run_id) == timeline(session, run_id)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.00042, "0.4 ms"),
        (0.04, "40 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (86399, "23 h 59 min"),
        (100000, "1 d 3 h"),
    ],
)
def test_durations_are_for_people(session: Session, seconds: float, text: str) -> None:
    assert session.value("select pgflow_worker._duration_text(%s)", seconds) == text

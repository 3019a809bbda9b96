"""`raise Retry(after=...)` and `raise Snooze(after=...)`."""

from typing import Any

import pytest

from tests.database.conftest import Session, counts

FLOW = """
    from pgflow_worker import Retry, Snooze
    flow = Flow("f", max_attempts={max_attempts}, base_delay=1)

    @flow.step
    {handler}:
        {before}
        if {attempt} < 3:
            raise {exception}
        return {attempt}
"""
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"handler": "def step(ctx: Context)", "before": "pass"},
    "async": {"handler": "async def step(ctx: Context)", "before": "pass"},
    "with tx": {
        "handler": "def step(ctx: Context, tx: Transaction)",
        "before": "tx.execute('insert into written values (1)')",
    },
}
DELAY = "select round(extract(epoch from vt - clock_timestamp())) from pgmq.q_f"


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def kind(session: Session, request: pytest.FixtureRequest) -> dict[str, Any]:
    session.run("create table written (id int)")
    found: dict[str, Any] = request.param
    return found


def test_retry_fails_the_attempt_and_says_when_the_next_begins(
    session: Session, kind: dict[str, Any]
) -> None:
    session.deploy(
        FLOW.format(
            max_attempts=3,
            attempt="ctx.attempt",
            exception="Retry('the service is busy', after=120.2)",
            **kind,
        )
    )
    session.start("f")
    assert counts(session.work("f")) == {"retried": 1}
    assert session.rows("select status, attempts_count, error_message from pgflow.step_tasks") == [
        ("queued", 1, "the service is busy (flows_of_test.py:10, in step)")
    ]
    assert 110 < session.value(DELAY) <= 121
    assert session.rows("select from written") == []
    for expected in ({"retried": 1}, {"completed": 1}):
        session.run("update pgmq.q_f set vt = now()")
        assert counts(session.work("f")) == expected
    assert session.value("select output from pgflow.step_tasks") == 3


def test_retry_of_the_last_attempt_fails_the_task(session: Session, kind: dict[str, Any]) -> None:
    session.deploy(
        FLOW.format(max_attempts=1, attempt="ctx.attempt", exception="Retry(after=60)", **kind)
    )
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1}
    assert session.value("select error_message from pgflow.step_tasks").startswith(
        "again after 60 s"
    )
    assert session.value("select count(*) from pgmq.q_f") == 0


@pytest.mark.parametrize("max_attempts", [1, 2])
def test_snooze_does_not_use_up_an_attempt(
    session: Session, kind: dict[str, Any], max_attempts: int
) -> None:
    session.deploy(
        FLOW.format(
            max_attempts=max_attempts,
            attempt="calls",
            exception="Snooze('not yet', after=60)",
            **kind | {"before": "global calls; calls += 1\n        " + kind["before"]},
        )
        + "\n    calls = 0\n"
    )
    session.start("f")
    for _ in range(2):
        session.run("update pgmq.q_f set vt = now()")
        report = session.work("f")
        if kind is not KINDS["async"]:
            assert counts(report) == {"snoozed": 1}
            assert session.rows("select status, attempts_count from pgflow.step_tasks") == [
                ("queued", 0)
            ]
            assert 50 < session.value(DELAY) <= 60
            assert session.rows("select from written") == []
    if kind is KINDS["async"]:
        return  # a call forgets the modules that an event loop has used, and the count with them
    session.run("update pgmq.q_f set vt = now()")
    assert counts(session.work("f")) == {"completed": 1}
    assert session.rows("select attempts_count, output from pgflow.step_tasks") == [(1, 3)]
    assert session.rows(
        "select outcome, attempt, error from pgflow_worker.attempts order by attempt_id"
    ) == [
        ("snoozed", 1, "not yet (flows_of_test.py:11, in step)"),
        ("snoozed", 1, "not yet (flows_of_test.py:11, in step)"),
        ("completed", 1, None),
    ]
    assert session.value("select count(*) from pgflow_worker.invocations") == 3


@pytest.mark.parametrize("after", ["-1", "float('nan')", "1e10", "'soon'"])
def test_a_wrong_delay_fails_the_attempt(session: Session, after: str) -> None:
    session.deploy(f"""
        from pgflow_worker import Snooze
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step():
            raise Snooze(after={after})
    """)
    session.start("f")
    assert counts(session.work("f")) == {"failed": 1}
    error = session.value("select error_message from pgflow.step_tasks")
    assert error.startswith("ValueError: after must be a number of seconds from 0 to 315,360,000")

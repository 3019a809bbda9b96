"""The schedule that the view flow_status shows."""

import pytest

from tests.conftest import Connection

FLOW = 'from pgflow_worker import Flow\nflow = Flow("scheduled")\n@flow.step\ndef step(): pass\n'
STATUS = "select schedule from pgflow_worker.flow_status where flow_slug = 'scheduled'"


@pytest.fixture
def scheduled(cron: Connection) -> Connection:
    cron.execute("select pgflow_worker.deploy('scheduled', %s)", [FLOW])
    return cron


def test_no_jobs_no_schedule(scheduled: Connection) -> None:
    assert scheduled.execute(STATUS).fetchall() == [(None,)]


@pytest.mark.parametrize(
    ("commands", "schedule"),
    [
        (["call pgflow_worker.work('scheduled', mode => 'drain')"], "0 5 1 1 *"),
        (["CALL pgflow_worker.work (flow_slug=>'scheduled')"] * 2, "0 5 1 1 * x2"),
        (["call pgflow_worker.work(mode => 'wait', flow_slug => 'scheduled')"], "0 5 1 1 *"),
        (["call pgflow_worker.work(mode => 'drain')"], "0 5 1 1 * (all)"),
        (["call pgflow_worker.work(null, mode => 'drain')"], "0 5 1 1 * (all)"),
        (
            ["call pgflow_worker.work('scheduled')", "call pgflow_worker.work(null)"],
            "0 5 1 1 *, 0 5 1 1 * (all)",
        ),
        (["call pgflow_worker.work('scheduled_too')"], None),
        (["select 'scheduled'"], None),
    ],
)
def test_jobs_are_recognised_by_their_command(
    scheduled: Connection, commands: list[str], schedule: str | None
) -> None:
    for number, command in enumerate(commands):
        scheduled.execute("select cron.schedule(%s, '0 5 1 1 *', %s)", [f"job {number}", command])
    assert scheduled.execute(STATUS).fetchall() == [(schedule,)]


def test_a_job_of_another_database_or_that_is_not_active_does_not_count(
    scheduled: Connection,
) -> None:
    call = "call pgflow_worker.work('scheduled')"
    scheduled.execute("select cron.schedule('here', '0 5 1 1 *', %s)", [call])
    scheduled.execute("update cron.job set active = false where jobname = 'here'")
    scheduled.execute("select cron.schedule('there', '0 5 1 1 *', %s)", [call])
    scheduled.execute("update cron.job set database = 'postgres' where jobname = 'there'")
    assert scheduled.execute(STATUS).fetchall() == [(None,)]


def test_who_may_not_read_the_jobs_sees_no_schedule(scheduled: Connection) -> None:
    scheduled.execute("select cron.schedule('job', '0 5 1 1 *', $$call pgflow_worker.work(null)$$)")
    scheduled.execute("create role watcher; select pgflow_worker.grant_usage('watcher', 'monitor')")
    try:
        scheduled.execute("set role watcher")
        assert scheduled.execute(STATUS).fetchall() == [(None,)]
    finally:
        scheduled.execute("reset role; drop owned by watcher; drop role watcher")

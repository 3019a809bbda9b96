"""What an operator does with runs, on every version of pgflow."""

import json
from pathlib import Path

import psycopg
import pytest

from tests.database.conftest import Session
from tests.database.random_runs import retry
from tests.versions.conftest import LATER, VERSIONS, WITH_CONDITIONS

FLOW = """
    flow = Flow("f", max_attempts=1)

    @flow.step
    def step(flow_input):
        if flow_input["fails"]:
            raise Fail("as told")
        return 1

    @flow.step
    def beside(flow_input): return 2

    @flow.step
    def last(step, beside): return step + beside
"""


def start(session: Session, *, fails: bool = False) -> str:
    run: str = session.value(
        "select pgflow_worker.start_flow('f', %s)::text", json.dumps({"fails": fails})
    )
    return run


def wait_for(session: Session, run: str) -> list[object]:
    [row] = session.rows("select * from pgflow_worker.wait_for_run(%s, '0 s')", run)
    return list(row)


def test_a_run_is_started_awaited_and_restarted(session: Session) -> None:
    session.deploy(FLOW)
    run = start(session)
    session.work("f", mode="drain")
    assert wait_for(session, run) == ["completed", {"last": 3}, None]
    again = session.value("select pgflow_worker.restart_run(%s)::text", run)
    session.work("f", mode="drain")
    assert wait_for(session, again) == ["completed", {"last": 3}, None]


def test_a_run_is_canceled(session: Session) -> None:
    session.deploy(FLOW)
    run = start(session)
    session.work("f", batch_size=1)
    assert session.rows("select * from pgflow_worker.cancel_run(%s, 'enough')", run) == [(1, [])]
    status, output, error = wait_for(session, run)
    assert (status, output) == ("failed", None)
    assert error in ('step "step": canceled: enough', 'step "beside": canceled: enough')
    assert session.value("select count(*) from pgmq.q_f") == 0
    assert session.rows(
        "select error_message from pgflow.step_tasks where status in ('failed', 'cancelled')"
    ) == [("canceled: enough",)]
    assert session.rows("select status from pgflow.step_states order by 1") == [
        ("completed",),
        ("created",),
        ("failed",),
    ]
    session.work("f", mode="drain")
    assert session.value("select count(*) from pgflow_worker.attempts") == 1


@pytest.mark.parametrize("seed", range(4))
def test_a_run_is_retried(session: Session, version: str, tmp_path: Path, seed: int) -> None:
    with_maps = [*VERSIONS, *LATER].index(version) >= [*VERSIONS].index("0.7.0")
    retry(session, seed, tmp_path / "failing", with_maps=with_maps)


@pytest.mark.parametrize("version", WITH_CONDITIONS)
def test_a_run_that_its_condition_has_failed_is_not_retried(session: Session) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step(if_={"wanted": True}, when_unmet="fail")
        def step(flow_input): pass

        @flow.step
        def beside(flow_input): pass
    """)
    run = start(session)
    assert wait_for(session, run) == ["failed", None, 'step "step": Condition not met']
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.retry_run(%s)", run)
    assert caught.value.sqlstate == "PW016"
    assert caught.value.diag.message_primary == (
        'step "step" failed because its condition was not met'
    )


def test_old_runs_are_removed(session: Session) -> None:
    session.deploy(FLOW)
    old, failed = start(session), start(session, fails=True)
    session.work("f", mode="drain")
    active = start(session)
    result = session.value("call pgflow_worker.prune_data_older_than('0 s')")
    assert (result["runs"], result["tasks"]) == (2, 5)
    assert session.rows("select run_id::text from pgflow.runs") == [(active,)]
    for run in (old, failed):
        with pytest.raises(psycopg.Error, match="does not exist"):
            wait_for(session, run)
    session.work("f", mode="drain")
    assert wait_for(session, active)[0] == "completed"

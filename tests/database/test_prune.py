"""prune_data_older_than()."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.database.conftest import Session, counts
from tests.database.runs import EACH, ECHO, error_of, prune, said, start

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]


AGE = """
    update pgflow.runs set started_at = started_at - interval '40 days',
        completed_at = completed_at - interval '40 days', failed_at = failed_at - interval '40 days'
        where run_id = any(%(runs)s);
    update pgflow_worker.attempts set finished_at = finished_at - interval '40 days'
        where run_id = any(%(runs)s);
    update pgmq.a_echo set archived_at = archived_at - interval '40 days'
        where (message ->> 'run_id')::uuid = any(%(runs)s);
"""


def age(session: Session, *runs: str) -> None:
    session.connection.execute(
        psycopg.ClientCursor(session.connection).mogrify(AGE, {"runs": list(runs)})
    )


def run_ids(session: Session, table: str = "pgflow.runs") -> set[str]:
    return {row[0] for row in session.rows(f"select distinct run_id::text from {table}")}


def test_what_ended_long_ago_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    old, old_failed, new = (start(session, "echo", text) for text in ("1", '"bad"', "2"))
    session.work("echo", mode="drain")
    old_active = start(session, "echo")
    age(session, old, old_failed, old_active)
    assert prune(session, "30 days") == {"runs": 2, "tasks": 2, "attempts": 2, "messages": 2}
    assert run_ids(session) == {new, old_active}
    assert run_ids(session, "pgflow.step_states") == {new, old_active}
    assert run_ids(session, "pgflow.step_tasks") == {new, old_active}
    assert run_ids(session, "pgflow_worker.attempts") == {new}
    assert counts(session.work("echo")) == {"completed": 1}


def test_an_active_runs_attempts_stay(session: Session) -> None:
    session.deploy("""
        flow = Flow("echo", max_attempts=2)

        @flow.step
        def step(flow_input):
            raise ValueError
    """)
    run = start(session, "echo")
    session.work("echo")
    age(session, run)
    assert prune(session, "30 days") == {}
    assert run_ids(session, "pgflow_worker.attempts") == {run}


def test_invocations_and_workers_are_removed_if_nobody_uses_them(session: Session) -> None:
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    session.run("""
        insert into pgflow.workers (worker_id, queue_name, function_name)
        select gen_random_uuid(), 'echo', 'another' from generate_series(1, 3);
        update pgflow.workers set last_heartbeat_at = now() - interval '40 days';
        update pgflow_worker.invocations set finished_at = now() - interval '40 days';
    """)
    assert prune(session, "30 days") == {"workers": 3, "invocations": 1}
    assert session.rows("select function_name from pgflow.workers") == [("pgflow_worker",)]


def test_what_versions_of_pgflow_have_left_in_the_queue_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    old, active = start(session, "echo"), start(session, "echo")
    session.run(
        "update pgflow.runs set status = 'failed', failed_at = now() where run_id = %s", old
    )
    age(session, old)
    assert prune(session, "30 days") == {"runs": 1, "tasks": 1}
    assert session.rows("select message ->> 'run_id' from pgmq.q_echo") == [(active,)]


def test_batches_are_committed_one_by_one(session: Session) -> None:
    session.deploy(EACH)
    for _ in range(5):
        start(session, "each", "[1, 2, 3]")
    session.work("each", mode="drain", batch_size=100)
    session.run("""
        create table public.removed (transaction xid8 default pg_current_xact_id(), run_id uuid);
        create function public.remember() returns trigger language plpgsql as $$
            begin insert into public.removed (run_id) values (old.run_id); return old; end
        $$;
        create trigger remember after delete on pgflow.runs
            for each row execute function public.remember();
    """)
    assert prune(session, "0 s", 8)["runs"] == 5
    # A run is four rows of runs and tasks: two fill a batch.
    assert session.rows(
        "select count(*)::int from public.removed group by transaction order by transaction"
    ) == [(2,), (2,), (1,)]


def test_a_run_that_somebody_has_locked_is_left_for_the_next_time(
    session: Session, other: Session
) -> None:
    session.deploy(ECHO)
    for text in ("1", "2"):
        run = start(session, "echo", text)
    session.work("echo", mode="drain")
    with other.connection.transaction():
        other.run("select from pgflow.runs where run_id = %s for update", run)
        assert prune(session, "0 s")["runs"] == 1
    assert run_ids(session) == {run}
    assert prune(session, "0 s")["runs"] == 1


def test_in_a_transaction_nothing_is_removed(session: Session) -> None:
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    with session.connection.transaction(force_rollback=True):
        error = error_of(session, "call pgflow_worker.prune_data_older_than('0 s')")
    assert said(error) == (
        "PW011",
        "prune_data_older_than() cannot run inside a transaction, because it commits every batch",
    )


@pytest.mark.parametrize("arguments", ["null", "'-1 day'", "'1 day', 0", "'1 day', null"])
def test_wrong_arguments_of_a_removal_are_refused(session: Session, arguments: str) -> None:
    error = error_of(session, f"call pgflow_worker.prune_data_older_than({arguments})")
    assert error.sqlstate == "PW002"


def test_deploy_removes_what_ended_also_of_later_flows(session: Session, role: Role) -> None:
    deployer = role("deploy")
    session.deploy(ECHO)
    start(session, "echo")
    session.work("echo")
    assert prune(deployer, "0 s") == {
        "runs": 1,
        "tasks": 1,
        "attempts": 1,
        "messages": 1,
        "invocations": 1,
    }

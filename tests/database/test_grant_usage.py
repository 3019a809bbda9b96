"""The levels of grant_usage(): who may do what."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts

Background = Callable[..., "Future[Any]"]
Role = Callable[[str | None], Session]

LEVELS = ("monitor", "operate", "deploy")
# The lowest level that may execute it; None: nobody but the owner.
ROUTINES = {
    "_analyze": "operate",
    "_archive_messages": "operate",
    "_cancel_worker": "operate",
    "_check_flow": "operate",
    "_check_pgflow": "monitor",
    "_check_queue": "operate",
    "_check_retry": "operate",
    "_check_run": "monitor",
    "_commit": "operate",
    "_complete_map_tasks": "operate",
    "_complete_task": "operate",
    "_complete_tasks": "operate",
    "_cron_database": "operate",
    "_cron_has_seconds": "monitor",
    "_cron_jobs": "monitor",
    "_cron_jobs_of_nobody": "monitor",
    "_cron_schedule": "operate",
    "_deploy": None,
    "_doctor_advice": "monitor",
    "_doctor_check": "monitor",
    "_doctor_code": "monitor",
    "_doctor_command": "monitor",
    "_doctor_cron": "monitor",
    "_doctor_deploy": "monitor",
    "_doctor_flows": "monitor",
    "_doctor_job_runs": "monitor",
    "_doctor_jobs": "monitor",
    "_doctor_may_read": "monitor",
    "_doctor_often": "monitor",
    "_doctor_owners": "monitor",
    "_doctor_pgflow": "monitor",
    "_doctor_python": "deploy",
    "_doctor_runs": "monitor",
    "_doctor_schedule": "monitor",
    "_doctor_slots": "monitor",
    "_doctor_tasks": "monitor",
    "_doctor_timeouts": "monitor",
    "_duration_text": "monitor",
    "_fail_run": "operate",
    "_flow_status": "monitor",
    "_flowchart": "monitor",
    "_gate": "operate",
    "_grant_queues": None,
    "_grants": None,
    "_is_own_transaction": "operate",
    "_job_prefix": "monitor",
    "_left_behind": "operate",
    "_load": "operate",
    "_load_secrets": "operate",
    "_lock_claims": "operate",
    "_may_see_jobs": "monitor",
    "_next_flow": "operate",
    "_notice_pause": "operate",
    "_pause_reason": "monitor",
    "_progress": "monitor",
    "_progress_of": "operate",
    "_prunable": "operate",
    "_prune": "operate",
    "_prune_runs": "operate",
    "_queue_table": "monitor",
    "_raise": "operate",
    "_recent_failures": "monitor",
    "_recorded_input": "operate",
    "_release_locks": "operate",
    "_replay_task": "operate",
    "_resume_statement": "operate",
    "_revision": "operate",
    "_run_spans": "monitor",
    "_run_summary": "monitor",
    "_schedule_jobs": "operate",
    "_send_again": "operate",
    "_send_missing": None,
    "_set_environment": None,
    "_set_executor": None,
    "_set_secrets": None,
    "_set_visibility": "operate",
    "_slots": "monitor",
    "_stalled_tasks": "monitor",
    "_start_map_tasks": "operate",
    "_task_of": "operate",
    "_unstarted_messages": "operate",
    "_work": "operate",
    "_work_batch": "operate",
    "_worker_status": "monitor",
    "cancel_run": "operate",
    "deploy": "deploy",
    "doctor": "monitor",
    "flow_diagram": "monitor",
    "grant_usage": None,
    "pause": "operate",
    "prune_data_older_than": "deploy",
    "replay_task": "operate",
    "restart_run": "operate",
    "resume": "operate",
    "retry_run": "operate",
    "revoke_usage": None,
    "rollback_deploy": "deploy",
    "run_diagram": "monitor",
    "run_timeline": "monitor",
    "schedule_worker": "operate",
    "set_environment": "deploy",
    "set_executor": "deploy",
    "set_secrets": "deploy",
    "start_flow": "operate",
    "undeploy": "deploy",
    "unschedule_worker": "operate",
    "wait_for_run": "operate",
    "work": "operate",
    "work_batch": "operate",
}
# What monitor may do with a table, and what operate and deploy may; * in some columns only.
TABLES = {
    "pgflow.deps": ("select", "select"),
    "pgflow.flows": ("select", "select"),
    "pgflow.runs": ("select", "select insert update"),
    "pgflow.step_states": ("select", "select insert update"),
    "pgflow.step_tasks": ("select", "select insert update"),
    "pgflow.steps": ("select", "select"),
    "pgflow.workers": ("select", "select insert update"),
    "pgflow_worker.attempts": ("select", "select insert delete"),
    "pgflow_worker.flow_status": ("select", "select"),
    "pgflow_worker.flows": ("select", "select update*"),
    "pgflow_worker.invocations": ("select", "select insert delete"),
    "pgflow_worker.living": ("select", "select insert"),
    "pgflow_worker.executors": ("select", "select"),
    "pgflow_worker.modules": ("", ""),
    "pgflow_worker.pauses": ("select", "select insert* update* delete"),
    "pgflow_worker.recent_failures": ("select", "select"),
    "pgflow_worker.recent_invocations": ("select", "select"),
    "pgflow_worker.run_progress": ("select", "select"),
    "pgflow_worker.settings": ("select", "select"),
    "pgflow_worker.step_progress": ("select", "select"),
    "pgflow_worker.worker_status": ("select", "select"),
    "pgmq.a_f": ("", "select insert"),
    "pgmq.meta": ("", ""),
    "pgmq.notify_insert_throttle": ("", ""),
    "pgmq.q_f": ("select", "select insert update delete"),
    "pgmq.topic_bindings": ("", ""),
}
# What deploy may also delete from.
PRUNED = (
    *(f"pgflow.{name}" for name in ("runs", "step_states", "step_tasks", "workers")),
    "pgmq.a_f",
)
COLUMNS = [
    ("flows", "workers", "UPDATE"),
    ("pauses", "flow_slug", "INSERT"),
    ("pauses", "reason", "INSERT"),
    ("pauses", "reason", "UPDATE"),
]
FLOW = 'flow = Flow("f")\n@flow.step\ndef step(): pass\n'


def may_execute(session: Session, role: str) -> dict[str, bool]:
    return dict(
        session.rows(
            """select proname, has_function_privilege(%s, oid, 'execute') from pg_proc
            where pronamespace = 'pgflow_worker'::regnamespace""",
            role,
        )
    )


def may_use(session: Session, role: str) -> dict[str, str]:
    return dict(
        session.rows(
            """select format('%%s.%%s', nspname, relname), concat_ws(' ', variadic array(
                select case
                    when has_table_privilege(%s, class.oid, privilege) then privilege
                    else privilege || '*'
                end
                from unnest(array['select', 'insert', 'update', 'delete', 'truncate', 'references',
                    'trigger']) with ordinality as possible (privilege, place)
                where has_table_privilege(%s, class.oid, privilege)
                    or privilege in ('insert', 'update')
                    and has_any_column_privilege(%s, class.oid, privilege)
                order by place
            ))
            from pg_class as class join pg_namespace on pg_namespace.oid = relnamespace
            where nspname in ('pgflow_worker', 'pgflow', 'pgmq') and relkind in ('r', 'p', 'v')""",
            *[role] * 3,
        )
    )


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_what_each_level_may_do(session: Session, role: Role, level: str | None) -> None:
    session.deploy(FLOW)
    name = role(level).connection.info.user
    reached = LEVELS[: LEVELS.index(level) + 1] if level else ()
    assert may_execute(session, name) == {
        routine: lowest in reached for routine, lowest in ROUTINES.items()
    }
    column = None if level is None else 0 if level == "monitor" else 1
    assert may_use(session, name) == {
        table: ("" if column is None else allowed[column])
        + (" delete" if level == "deploy" and table in PRUNED else "")
        for table, allowed in TABLES.items()
    }
    columns = session.rows(
        """select table_name, column_name, privilege_type from information_schema.column_privileges
        where grantee = %s and table_name in ('flows', 'pauses') and table_schema = 'pgflow_worker'
            and privilege_type in ('INSERT', 'UPDATE') order by 1, 2, 3""",
        name,
    )
    assert columns == (COLUMNS if "operate" in reached else [])
    schemas = session.rows(
        """select nspname from pg_namespace where nspname in ('pgflow_worker', 'pgflow', 'pgmq')
            and has_schema_privilege(%s, oid, 'usage') order by 1""",
        name,
    )
    expected = ["pgflow", "pgflow_worker", "pgmq"] if level else []
    assert [row[0] for row in schemas] == expected


def test_what_runs_as_the_owner(session: Session) -> None:
    """Whatever is added here runs as a superuser for roles that are none."""
    assert session.rows("""
        select proname::text from pg_proc
        where pronamespace = 'pgflow_worker'::regnamespace and prosecdef order by 1
    """) == [
        ("_analyze",),
        ("_load",),
        ("_load_secrets",),
        ("_revision",),
        ("deploy",),
        ("rollback_deploy",),
        ("set_environment",),
        ("set_executor",),
        ("set_secrets",),
        ("undeploy",),
    ]


@pytest.mark.parametrize(
    ("role_name", "level", "message"),
    [
        ("nobody of test", "operate", 'role "nobody of test" does not exist'),
        ("public", "monitor", 'role "public" does not exist'),
        (None, "monitor", "role is null"),
        ("pg_monitor", "admin", 'unknown level "admin"'),
        ("pg_monitor", None, "unknown level null"),
    ],
)
def test_an_unknown_role_or_level_is_refused(
    session: Session, role_name: str | None, level: str | None, message: str
) -> None:
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.grant_usage(%s, %s)", role_name, level)
    assert caught.value.sqlstate == "PW002"
    assert caught.value.diag.message_primary == message
    hint = caught.value.diag.message_hint or ""
    assert all(name in hint for name in LEVELS)


@pytest.mark.parametrize("level", LEVELS)
def test_what_was_granted_can_be_taken_back(session: Session, role: Role, level: str) -> None:
    session.deploy(FLOW)
    name = role(level).connection.info.user
    session.run("select pgflow_worker.revoke_usage(%s)", name)
    assert not any(may_execute(session, name).values())
    assert not any(may_use(session, name).values())
    left = "select count(*) from pg_shdepend where refobjid = to_regrole(%s)"
    assert session.value(left, name) == 0  # so that the role can be dropped


def test_only_a_role_can_lose_what_it_has(session: Session) -> None:
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.revoke_usage('nobody of test')")
    assert caught.value.sqlstate == "PW002"
    assert caught.value.diag.message_primary == 'role "nobody of test" does not exist'


def test_a_role_with_any_name_can_be_granted_to(session: Session) -> None:
    session.run('create role "A ""role"" of test"')
    try:
        session.run("""select pgflow_worker.grant_usage('A "role" of test', 'deploy')""")
        assert may_execute(session, 'A "role" of test')["deploy"]
        session.run("""select pgflow_worker.revoke_usage('A "role" of test')""")
    finally:
        session.run('drop role "A ""role"" of test"')


def test_what_pgflow_does_as_its_owner_is_no_longer_for_everybody(
    session: Session, role: Role
) -> None:
    notices: list[str] = []
    session.connection.add_notice_handler(lambda diag: notices.append(diag.message_primary or ""))
    monitor = role("monitor")
    assert sorted(notices) == [
        "not everybody may execute pgflow.get_run_with_states(uuid) any more",
        "not everybody may execute pgflow.start_flow_with_states(text,jsonb,uuid) any more",
    ]
    for call in ("get_run_with_states(null)", "start_flow_with_states('f', '{}')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            monitor.run(f"select pgflow.{call}")
    notices.clear()
    session.run("select pgflow_worker.grant_usage(%s, 'monitor')", monitor.connection.info.user)
    assert notices == []


# The levels at work

# Every kind of handler; names say how each runs.
KINDS = """
    flow = Flow("kinds", max_attempts=2)
    WHO = "select current_user::text as who"

    @flow.step
    def plain(flow_input):
        return [1, 2, 3]

    @flow.map(over=plain)
    def in_sets(n):
        return n

    @flow.map(over=plain)
    def one_by_one(n, tx: Transaction):
        return tx.execute(WHO)[0]["who"]

    @flow.step
    async def on_the_loop(plain):
        return "loop"

    @flow.step(thread=True)
    def in_a_thread(in_sets):
        return "thread"

    @flow.step(max_attempts=2)
    def flaky(ctx: Context, tx: Transaction):
        if ctx.attempt == 1:
            raise ValueError("once")
        return [row["who"] for row in tx.stream(WHO)]
"""


def run_all_kinds(worker: Session) -> None:
    name = worker.connection.info.user
    run_id = worker.start("kinds")
    report = worker.work("kinds", mode="drain")
    assert (counts(report), report["notes"]) == ({"completed": 9, "retried": 1}, [])
    report = worker.work_batch("kinds", ignore_delay=True)
    assert (counts(report), report["notes"]) == ({"completed": 1}, [])
    assert worker.value(
        "select output from pgflow.runs where run_id = %s and status = 'completed'", run_id
    ) == {
        "one_by_one": [name] * 3,
        "on_the_loop": "loop",
        "in_a_thread": "thread",
        "flaky": [name],
    }


def test_operate_runs_every_kind_of_handler(session: Session, role: Role) -> None:
    session.deploy(KINDS)
    run_all_kinds(role("operate"))


def test_operate_needs_nothing_that_everybody_has(session: Session, role: Role) -> None:
    session.deploy(KINDS)
    session.run(
        f"""
        revoke execute on all routines in schema pgflow, pgmq, realtime from public;
        revoke usage on schema realtime from public;
        revoke temporary on database {session.connection.info.dbname} from public;
    """
    )
    run_all_kinds(role("operate"))


def test_queues_made_later_can_be_used(session: Session, role: Role) -> None:
    operator = role("operate")
    session.deploy(KINDS)
    run_all_kinds(operator)


def test_queues_made_anew_can_be_used(session: Session, role: Role) -> None:
    operator = role("operate")
    session.deploy('flow = Flow("kinds")\n@flow.step\ndef other(): pass\n')
    assert session.deploy(KINDS, allow_data_loss=True)[0][1] == "recompiled"
    run_all_kinds(operator)


def test_a_deploy_at_the_same_time_sees_the_role_or_is_seen(
    session: Session, other: Session, role: Role, background: Background
) -> None:
    operator = role(None)
    with session.connection.transaction():
        session.deploy(KINDS)
        grant = background(
            other.run,
            "select pgflow_worker.grant_usage(%s, 'operate')",
            operator.connection.info.user,
        )
        session.until(WAITING, 1)
    grant.result()
    run_all_kinds(operator)


def test_a_dry_run_grants_nothing(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    session.run("revoke all on pgmq.q_f from " + operator.connection.info.user)
    session.deploy(FLOW, dry_run=True)
    assert may_use(session, operator.connection.info.user)["pgmq.q_f"] == ""
    session.deploy(FLOW)
    assert may_use(session, operator.connection.info.user)["pgmq.q_f"] != ""


def test_operate_fails_tasks_and_parks_messages(session: Session, role: Role) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=3)

        @flow.step
        def step(flow_input):
            raise Fail("no use")
    """)
    session.run("select pgflow.add_step('f', 'surplus')")
    operator = role("operate")
    operator.start("f")
    assert counts(operator.work("f")) == {"failed": 1, "parked": 1}
    assert operator.rows("select step_slug, error from pgflow_worker.attempts") == [
        ("step", "no use (flows_of_test.py:7, in step)")
    ]


def test_operate_takes_back_the_tasks_of_a_dead_worker(
    session: Session, role: Role, connect: Callable[..., Connection], background: Background
) -> None:
    session.deploy("""
        flow = Flow("f")

        @flow.step
        def step(flow_input, tx: Transaction):
            tx.execute("select pg_advisory_xact_lock(1)")
    """)
    operator = role("operate")
    operator.start("f")
    session.run("select pg_advisory_lock(1)")
    victim = Session(connect())
    call = background(victim.work, "f")
    session.until(WAITING, 1)
    session.run("select pg_terminate_backend(%s, 10000)", victim.connection.info.backend_pid)
    with pytest.raises(psycopg.OperationalError):
        call.result()
    session.run("select pg_advisory_unlock(1)")
    assert counts(operator.work("f")) == {"rescued": 1, "completed": 1}


def test_a_handlers_sql_may_do_what_its_role_may(session: Session, role: Role) -> None:
    session.run("create table secrets (secret text); create table notes (note text)")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def note(flow_input, tx: Transaction):
            tx.execute("insert into notes values ('noted')")

        @flow.step(after=[note])
        def pry(flow_input, tx: Transaction):
            return tx.execute("select * from secrets")
    """)
    operator = role("operate")
    session.run(f"grant insert on notes to {operator.connection.info.user}")
    operator.start("f")
    assert counts(operator.work("f", mode="drain")) == {"completed": 1, "failed": 1}
    assert session.rows("select note from notes") == [("noted",)]
    [error] = operator.rows("select error_message from pgflow.step_tasks where status = 'failed'")
    assert "permission denied for table secrets" in error[0]


def test_operate_pauses_resumes_and_sets_the_number_of_workers(
    session: Session, role: Role
) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    operator.run("update pgflow_worker.flows set workers = 2 where flow_slug = 'f'")
    for arguments in ("'f'", "'f', 'why'", ""):
        operator.run(f"select pgflow_worker.pause({arguments})")
    assert session.rows(
        "select flow_slug, reason, paused_by from pgflow_worker.pauses order by 1"
    ) == [("f", "why", operator.connection.info.user), (None, None, operator.connection.info.user)]
    operator.run("select pgflow_worker.resume(), pgflow_worker.resume('f')")
    assert session.value("select count(*) from pgflow_worker.pauses") == 0


def test_operate_deletes_old_rows(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    operator.start("f")
    operator.work("f")
    operator.run("delete from pgflow_worker.attempts where finished_at < now() + '1 day'")
    operator.run("delete from pgflow_worker.invocations where finished_at < now() + '1 day'")
    assert session.value("select count(*) from pgflow_worker.attempts") == 0
    assert session.value("select count(*) from pgflow_worker.invocations") == 0


def test_operate_renews_statistics_of_tables_it_does_not_own(session: Session, role: Role) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): return element\n')
    session.run("alter table pgflow.step_tasks set (autovacuum_enabled = off)")
    operator = role("operate")
    operator.start("f", list(range(3000)))
    report = operator.work("f", batch_size=50)
    assert report["notes"] == []
    rows = "select reltuples::int from pg_class where oid = 'pgflow.step_tasks'::regclass"
    assert session.value(rows) > 2500


def test_monitor_reads_and_does_nothing_else(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.work("f")
    monitor = role("monitor")
    for table in ("attempts", "invocations", "flows", "pauses", "settings"):
        monitor.run(f"table pgflow_worker.{table}")
    assert monitor.value("select status from pgflow.runs") == "completed"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        monitor.work("f")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        monitor.start("f")


def test_what_deploy_makes_belongs_to_the_owner_and_names_who_deployed(
    session: Session, role: Role
) -> None:
    deployer = role("deploy")
    deployer.deploy(FLOW)
    assert session.value("select deployed_by from pgflow_worker.modules") == (
        deployer.connection.info.user
    )
    owner = session.value(
        "select extowner::regrole::text from pg_extension where extname = %s", "pgflow_worker"
    )
    assert session.value("select tableowner from pg_tables where tablename = 'q_f'") == owner
    deployer.start("f")
    assert counts(deployer.work("f")) == {"completed": 1}
    deployer.deploy('flow = Flow("f")\n@flow.step\ndef other(): pass\n', allow_data_loss=True)
    deployer.run("select pgflow_worker.set_environment(null)")
    assert deployer.value("select pgflow_worker.undeploy('flows_of_test')") == 1

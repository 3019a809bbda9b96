"""What doctor() says about pg_cron and its jobs."""

import os
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from pytest_postgresql.executors import PostgreSQLExecutor

from tests.conftest import CRON_DATABASE, TEMPLATE, connect_to, new_database
from tests.database import doctor
from tests.database.conftest import Session
from tests.faults.servers import BINDIR, copy_of

FLOW = 'from pgflow_worker import Flow\nflow = Flow("f")\n@flow.step\ndef step(): pass\n'


@pytest.fixture
def session(libpq: PostgreSQLExecutor) -> Iterator[Session]:
    """A session in pg_cron's database, where the flow "f" is deployed."""
    with connect_to(libpq, CRON_DATABASE) as connection:
        session = Session(connection)
        session.run("select pgflow_worker.deploy('flows_of_doctor', %s)", FLOW)
        yield session
        session.run("select cron.unschedule(jobid) from cron.job")
        session.run("delete from cron.job_run_details")
        session.run("select pgflow_worker.undeploy('flows_of_doctor')")
        session.run("delete from pgflow.step_tasks where flow_slug = 'f'")
        session.run("select pgmq.purge_queue('f')")


@pytest.fixture
def role(session: Session) -> Iterator[str]:
    """The name of a role that is no superuser and may work."""
    name = "Doctor's worker"
    session.run(f'create role "{name}" login')
    session.run("select pgflow_worker.grant_usage(%s, 'operate')", name)
    yield name
    if session.value("select count(*) from pg_roles where rolname = %s", name):
        session.run(f'drop owned by "{name}"; drop role "{name}"')


def schedule(
    session: Session, command: str = "call pgflow_worker.work('f', mode => 'wait')"
) -> Any:
    """A job that does not run while the test looks, but once a year."""
    return session.value("select cron.schedule('doctor', '0 0 1 1 *', %s)", command)


def set_job(session: Session, **columns: str) -> None:
    """As a superuser may: neither schedule() nor alter_job() takes every mistake."""
    for column, value in columns.items():
        session.run(f"update cron.job set {column} = %s", value)


def the_finding(session: Session) -> doctor.Finding:
    [found] = doctor.findings(session.connection)
    return found


def assert_cured(session: Session, cure: str) -> None:
    doctor.paste(session.connection, cure)
    assert doctor.findings(session.connection) == doctor.OK


def test_a_job_that_is_as_it_should_be(session: Session) -> None:
    for command in (
        "call pgflow_worker.work('f', mode => 'wait')",
        "CALL pgflow_worker . work ( 'f' , 10, 5, 'wait' ) ;\n",
        "-- every task\ncall \"pgflow_worker\".work(flow_slug => 'f', mode=>'wait') /* yes; */",
        "call pgflow_worker.work('f', max_duration => interval '50 seconds', mode => 'wait')",
        "call pgflow_worker.work(null, mode => 'wait')",
        "select 'call pgflow_worker.worker()'",
    ):
        schedule(session, command)
        assert doctor.findings(session.connection) == doctor.OK, command


def test_a_job_that_is_not_active(session: Session) -> None:
    job = schedule(session)
    session.run("select cron.alter_job(%s, active => false)", job)
    found = the_finding(session)
    assert (found.severity, found.what) == ("warning", f'job {job} "doctor" is not active')
    assert_cured(session, found.cure)


@pytest.mark.parametrize(
    "command",
    [
        "set statement_timeout = 0; call pgflow_worker.work('f', mode => 'wait');",
        "call pgflow_worker.work('f', mode => 'wait'); select $$;$$",
    ],
)
def test_a_job_of_two_statements(session: Session, command: str) -> None:
    job = schedule(session, command)
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" has more than one statement',
    )
    assert "PW011" in found.why
    assert_cured(session, found.cure)
    assert session.value("select command from cron.job") == (
        "call pgflow_worker.work('f', mode => 'wait')"
    )


def test_a_job_that_is_no_bare_call(session: Session) -> None:
    job = schedule(session, "do $$ begin call pgflow_worker.work('f', mode => 'wait'); end $$")
    found = the_finding(session)
    assert (found.severity, found.what) == ("warning", f'job {job} "doctor" is more than a CALL')
    assert_cured(session, found.cure)


def test_a_schedule_that_looks_like_seconds(session: Session) -> None:
    job = schedule(session)
    set_job(session, schedule="*/5 * * * * *")
    found = the_finding(session)
    assert found.severity == "warning"
    assert found.what == f'job {job} "doctor" has the schedule "*/5 * * * * *" of six fields'
    assert_cured(session, found.cure)


def test_a_job_that_comes_once_a_minute(session: Session) -> None:
    job = schedule(session, "call pgflow_worker.work('f', mode => 'drain')")
    assert doctor.findings(session.connection) == doctor.OK
    set_job(session, schedule="* * * * *")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "note",
        f'job {job} "doctor" runs once a minute with the mode drain',
    )
    assert_cured(session, found.cure)


def test_a_job_for_a_database_that_does_not_exist(session: Session) -> None:
    job = schedule(session)
    set_job(session, database="No's where")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" is for database "No\'s where", which does not exist',
    )
    assert_cured(session, found.cure)


def test_a_job_of_a_role_that_does_not_exist(session: Session, role: str) -> None:
    job = schedule(session)
    session.run(f'drop owned by "{role}"; drop role "{role}"')
    set_job(session, username=role)
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" runs as role "{role}", which does not exist',
    )
    assert "no job runs at all" in found.why
    assert_cured(session, found.cure)


def test_another_job_of_a_role_that_does_not_exist(session: Session) -> None:
    job = schedule(session, "select 1")
    assert doctor.findings(session.connection) == doctor.OK
    set_job(session, username="nobody")
    assert the_finding(session).what == (
        f'job {job} "doctor" runs as role "nobody", which does not exist'
    )
    assert_cured(session, the_finding(session).cure)
    assert session.value("select count(*) from cron.job") == 0


def test_a_job_of_a_role_that_may_not_log_in(session: Session, role: str) -> None:
    job = schedule(session)
    set_job(session, username=role)
    assert doctor.findings(session.connection) == doctor.OK
    session.run(f'alter role "{role}" nologin')
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" runs as role "{role}", which may not log in',
    )
    assert_cured(session, found.cure)


def test_a_job_of_a_role_that_may_not_work(session: Session, role: str) -> None:
    job = schedule(session)
    set_job(session, username=role)
    session.run("select pgflow_worker.revoke_usage(%s)", role)
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" runs as role "{role}", which may not call the worker',
    )
    assert_cured(session, found.cure)


def test_a_job_for_a_flow_that_is_not_deployed(session: Session) -> None:
    job = schedule(session, "call pgflow_worker.work('gone', mode => 'wait')")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        f'job {job} "doctor" works for flow "gone", which is not deployed',
    )
    assert_cured(session, found.cure)


def test_more_jobs_than_slots(session: Session) -> None:
    schedule(session)
    session.run("select cron.schedule('another', schedule, command) from cron.job")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "note",
        '2 jobs call the worker of flow "f", which has 1 slot',
    )
    assert_cured(session, found.cure)


def test_a_job_whose_last_run_failed(session: Session) -> None:
    job = schedule(session)
    record = (
        "insert into cron.job_run_details (jobid, runid, status, return_message, command, end_time)"
        " values (%s, nextval('cron.runid_seq'), %s, %s, 'c', '2026-01-02 03:04:05.6+00')"
    )
    session.run("set timezone = 'UTC'")
    session.run(record, job, "failed", "ERROR:  too bad\nHINT:  100% bad")
    found = the_finding(session)
    assert found.severity == "error"
    assert found.what == f'job {job} "doctor" failed at 2026-01-02 03:04:05+00: too bad'
    assert "HINT:  100% bad" in doctor.paste(session.connection, found.cure)
    session.run(record, job, "failed", "connection failed")
    assert the_finding(session).cure.startswith(
        "alter system set cron.use_background_workers = on;"
    )
    session.run(record, job, "succeeded", "CALL")
    assert doctor.findings(session.connection) == doctor.OK


def timeouts_of(session: Session) -> list[str]:
    return [found.what for found in doctor.findings(session.connection) if "timeout" in found.what]


def test_a_statement_timeout_of_the_jobs_role(session: Session, role: str) -> None:
    job = schedule(session)
    set_job(session, username=role)
    session.run(f"alter role \"{role}\" set statement_timeout = '56s'")
    assert doctor.findings(session.connection) == doctor.OK
    session.run(f"alter role \"{role}\" set statement_timeout = '55000'")
    found = the_finding(session)
    assert found.severity == "warning"
    assert found.what == (
        f'statement_timeout of role "{role}", as which job {job} "doctor" runs, is 55000'
    )
    assert_cured(session, found.cure)


def test_a_statement_timeout_of_the_database(session: Session) -> None:
    schedule(session, "call pgflow_worker.work('f', mode=>'wait', max_duration => '2 minutes')")
    session.run(f"alter database {CRON_DATABASE} set statement_timeout = '1min'")
    try:
        assert len(timeouts_of(session)) == 1
        assert_cured(session, the_finding(session).cure)
    finally:
        session.run(f"alter database {CRON_DATABASE} reset statement_timeout")
        session.run(f"alter role current_user in database {CRON_DATABASE} reset statement_timeout")


def test_a_statement_timeout_of_the_server(session: Session) -> None:
    schedule(session)
    session.run("alter system set statement_timeout = '30s'")
    try:
        session.run("select pg_reload_conf()")
        session.until("select setting = '30000' from pg_settings where name = 'statement_timeout'")
        assert len(timeouts_of(session)) == 1
        # What a session was given says nothing about the job's.
        session.run("set statement_timeout = '31s'")
        assert doctor.findings(session.connection) == doctor.OK
    finally:
        session.run("alter system reset statement_timeout")
        session.run("select pg_reload_conf()")


def test_a_transaction_timeout(session: Session, role: str) -> None:
    if session.connection.info.server_version < 170000:
        pytest.skip("PostgreSQL before 17 has no transaction_timeout")
    schedule(session)
    set_job(session, username=role)
    session.run(f"alter role \"{role}\" set transaction_timeout = '61s'")
    assert doctor.findings(session.connection) == doctor.OK
    session.run(f"alter role \"{role}\" set transaction_timeout = '60s'")
    assert_cured(session, the_finding(session).cure)


def test_tasks_that_wait_and_no_job(session: Session) -> None:
    session.start("f")
    session.run("update pgmq.q_f set vt = now() - interval '3 minutes'")
    found = the_finding(session)
    assert (found.severity, found.why) == ("error", "no active job calls the worker")
    doctor.paste(session.connection, found.cure)
    [[name, command]] = session.rows("select jobname, command from cron.job")
    assert name == f"pgflow-worker--{CRON_DATABASE}--f--1"
    assert command.startswith("call pgflow_worker.work('f', mode => ")
    # It may have run by now.
    assert [row.why for row in doctor.findings(session.connection) if row.severity == "error"] in (
        [f"job {session.value('select jobid from cron.job')} is to call the worker, and does not"],
        [],
    )


def test_a_superusers_job_and_functions_of_others(session: Session, role: str) -> None:
    job = schedule(session)
    user = session.connection.info.user
    session.run(f'alter function realtime.send owner to "{role}"')
    found = the_finding(session)
    assert found.why.startswith(f'job {job} "doctor" runs as superuser "{user}"')
    assert_cured(session, found.cure)


def test_what_a_role_may_not_see_of_jobs(
    session: Session, role: str, libpq: PostgreSQLExecutor
) -> None:
    schedule(session, "call pgflow_worker.work('gone')")
    with connect_to(libpq, CRON_DATABASE, user=role) as connection:
        seen = [found.what for found in doctor.findings(connection)]
        assert f'role "{role}" may not see pg_cron\'s jobs' in seen
        session.run(f'grant usage on schema cron to "{role}"')
        seen = [found.what for found in doctor.findings(connection)]
        assert f'role "{role}" sees its own jobs of pg_cron only' in seen
        assert not [what for what in seen if "gone" in what or "could not be made" in what]
        set_job(session, username=role)
        assert [found for found in doctor.findings(connection) if '"gone"' in found.what]


def test_the_extension_is_missing(session: Session) -> None:
    session.run("drop extension pg_cron")
    found = the_finding(session)
    assert found.what == "pg_cron is loaded for this database, but its extension is missing"
    assert_cured(session, found.cure)


def test_pg_cron_is_in_another_database(session: Session, libpq: PostgreSQLExecutor) -> None:
    with new_database(libpq, TEMPLATE) as name, connect_to(libpq, name) as connection:
        there = Session(connection)
        assert the_finding(there).cure == f"\\connect {CRON_DATABASE}"
        there.run("select pgflow_worker.deploy('flows_of_doctor', %s)", FLOW)
        found = the_finding(there)
        assert (found.severity, found.what) == (
            "note",
            f'pg_cron keeps its jobs in database "{CRON_DATABASE}"',
        )
        doctor.paste(connection, found.cure)
        assert session.rows("select jobname, database from cron.job") == [
            (f"pgflow-worker--{name}--f--1", name)
        ]
        session.run("select cron.unschedule(jobid) from cron.job")


# Servers on which pg_cron does not run. (That it is not installed cannot be had here.)

FROM_FILES = "select setting from pg_file_settings where name = %s"


def test_pg_cron_is_not_loaded(libpq: PostgreSQLExecutor) -> None:
    with (
        copy_of(libpq, options="-c shared_preload_libraries=auto_explain,passwordcheck") as copy,
        copy.connect(TEMPLATE) as connection,
    ):
        there = Session(connection)
        found = the_finding(there)
        assert found.severity == "warning"
        assert found.what == "pg_cron is not loaded: shared_preload_libraries does not name it"
        doctor.paste(connection, found.cure)
        assert there.value(FROM_FILES, "shared_preload_libraries") == (
            "auto_explain, passwordcheck, pg_cron"
        )


def test_a_job_cannot_be_made_where_pg_cron_is_not_loaded_any_more(
    libpq: PostgreSQLExecutor,
) -> None:
    with (
        copy_of(libpq, options="-c shared_preload_libraries=") as copy,
        copy.connect(CRON_DATABASE) as connection,
        pytest.raises(psycopg.Error) as caught,
    ):
        connection.execute("select * from pgflow_worker.schedule_worker()")
    assert caught.value.sqlstate == "PW013"
    assert caught.value.diag.message_primary == "pg_cron is not loaded"


def test_pg_crons_database_does_not_exist(libpq: PostgreSQLExecutor) -> None:
    options = "-c shared_preload_libraries=pg_cron -c cron.database_name=nowhere"
    with copy_of(libpq, options=options) as copy, copy.connect(CRON_DATABASE) as connection:
        there = Session(connection)
        found = the_finding(there)
        assert (found.severity, found.what) == (
            "error",
            'pg_cron\'s database "nowhere" does not exist',
        )
        doctor.paste(connection, found.cure)
        assert there.value(FROM_FILES, "cron.database_name") == CRON_DATABASE


def test_pg_crons_launcher_is_dead(libpq: PostgreSQLExecutor) -> None:
    options = f"-c shared_preload_libraries=pg_cron -c cron.database_name={CRON_DATABASE}"
    launcher = "select pid from pg_stat_activity where application_name = 'pg_cron scheduler'"
    with copy_of(libpq, options=options) as copy:
        with copy.connect(CRON_DATABASE) as connection:
            there = Session(connection)
            pid = there.until(launcher)
            assert doctor.findings(connection) == doctor.OK
            there.run("select pg_terminate_backend(%s, 10000)", pid)
            time.sleep(2)  # some versions of pg_cron start it again after a second
            if there.rows(launcher):
                pytest.skip("this pg_cron starts its launcher again")
            found = the_finding(there)
            assert (found.severity, found.what) == ("error", "pg_cron's launcher is not running")
        subprocess.run(
            found.cure,
            shell=True,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PATH": f"{BINDIR}:{os.environ['PATH']}"},
        )
        with copy.connect(CRON_DATABASE) as connection:
            Session(connection).until(launcher)
            assert doctor.findings(connection) == doctor.OK


def test_a_standby(libpq: PostgreSQLExecutor) -> None:
    with copy_of(libpq, standby=True) as copy, copy.connect(CRON_DATABASE) as connection:
        found = the_finding(Session(connection))
        assert (found.severity, found.what) == ("note", "this server is a standby")
        doctor.paste(connection, found.cure)

"""doctor(): every finding, provoked, and its cure. Those about pg_cron are in tests/cron."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests.conftest import Connection
from tests.database import doctor
from tests.database.conftest import Session

FLOW = 'flow = Flow("f")\n@flow.step\ndef step(): pass\n'
Role = Callable[[str | None], Session]


def findings(session: Session) -> list[doctor.Finding]:
    """What was found, but for pg_cron: its database is another one."""
    return [
        row for row in doctor.findings(session.connection) if not row.what.startswith("pg_cron")
    ]


def the_finding(session: Session) -> doctor.Finding:
    [found] = findings(session)
    return found


def assert_cured(session: Session, cure: str) -> None:
    doctor.paste(session.connection, cure)
    assert [found for found in findings(session) if found.severity != "ok"] == []


def let_wait(session: Session, minutes: int = 3) -> None:
    session.run(f"update pgmq.q_f set vt = now() - interval '{minutes} minutes'")


@pytest.fixture
def stranger(session: Session) -> Iterator[str]:
    """The name of a role that is no superuser."""
    name = f"Stranger's {session.connection.info.dbname}"
    session.run(f'create role "{name}"')
    yield name
    session.run(
        f'reassign owned by "{name}" to current_user; drop owned by "{name}"; drop role "{name}"'
    )


# Flows and tasks


def test_tasks_that_wait_without_a_worker(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    assert findings(session) == []
    let_wait(session)
    found = the_finding(session)
    assert (found.severity, found.why) == ("error", "nothing calls the worker")
    assert found.what.startswith('1 task of flow "f" has been ready for up to 00:03:0')
    assert_cured(session, found.cure)
    assert session.value("select status from pgflow.runs") == "completed"


def test_tasks_that_wait_for_a_worker_that_runs(
    session: Session, other: Session, connect: Callable[..., Connection]
) -> None:
    session.deploy(FLOW)
    session.start("f")
    let_wait(session)
    # A slot is held, and not for a minute by a session that does nothing.
    other.run("select pg_advisory_lock(hashtextextended('pgflow_worker/f/1', 0))")
    assert findings(session) == []


@pytest.mark.parametrize("flow", ["'f'", "null"])
def test_a_pause_that_tasks_wait_for(session: Session, flow: str) -> None:
    session.deploy(FLOW)
    session.run(f"select pgflow_worker.pause({flow}, 'new disks')")
    assert findings(session) == []
    session.start("f")
    session.run("update pgflow_worker.pauses set paused_at = now() - interval '6 minutes'")
    found = the_finding(session)
    assert found.what.startswith('1 task waits: flow "f" was paused 00:06:0')
    assert found.what.endswith(f" ago by {session.connection.info.user}: new disks")
    assert (found.severity, found.why) == (
        "note",
        "every flow is paused" if flow == "null" else "no worker takes them",
    )
    assert_cured(session, found.cure)
    assert session.work("f")["completed"] == 1


def test_a_queue_that_is_gone(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgmq.drop_queue('f')")
    found = the_finding(session)
    assert (found.severity, found.what) == ("error", 'the queue of flow "f" does not exist')
    assert_cured(session, found.cure)


def test_tasks_without_messages(session: Session) -> None:
    session.deploy(FLOW)
    for _ in range(2):
        session.start("f")
    session.run("select pgmq.purge_queue('f')")
    found = the_finding(session)
    assert (found.severity, found.what) == ("error", '2 tasks of flow "f" have no message')
    assert_cured(session, found.cure)
    assert session.work("f")["completed"] == 2


def test_messages_without_tasks(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.work("f")
    session.run("select pgmq.send('f', '{}'), pgmq.send('f', '{}')")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "note",
        '2 messages in the queue of flow "f" belong to no unfinished task',
    )
    assert_cured(session, found.cure)


@pytest.mark.parametrize("whose", ["another worker's", "our own"])
def test_tasks_of_a_worker_that_is_gone(session: Session, whose: str) -> None:
    session.deploy(FLOW)
    session.start("f")
    worker = str(uuid4())
    if whose == "our own":
        worker = session.value("select worker_id from pgflow_worker._slots('f') where slot = 1")
    session.run(
        "insert into pgflow.workers (worker_id, queue_name, function_name, last_heartbeat_at)"
        " values (%s, 'f', 'other', now() - interval '5 minutes')",
        worker,
    )
    session.run(
        "select pgflow.start_tasks('f', array(select msg_id from pgmq.read('f', 60, 1)), %s)",
        worker,
    )
    assert findings(session) == []
    session.run(
        "update pgflow.step_tasks set queued_at = now() - interval '5 minutes',"
        " started_at = now() - interval '5 minutes'"
    )
    found = the_finding(session)
    assert (found.severity, found.why) == ("warning", "the next call takes them back")
    assert found.what.startswith('1 task of flow "f" was left started, since 00:05:0')
    assert found.what.endswith('by a worker that is gone: step "step"')
    assert_cured(session, found.cure)


def test_a_slot_of_a_session_that_does_nothing(session: Session, other: Session) -> None:
    session.deploy(FLOW)
    other.run("select pg_advisory_lock(hashtextextended('pgflow_worker/f/1', 0))")
    pid = other.connection.info.backend_pid
    [row] = session.rows("select * from pgflow_worker._doctor_slots('0')")
    found = doctor.Finding(*row)
    user = session.connection.info.user
    assert found.severity == "error"
    assert found.what.startswith(
        f'slot 1 of flow "f" is held by pid {pid} of role "{user}", idle for 0'
    )
    doctor.paste(session.connection, found.cure)
    session.until("select not exists (select from pg_stat_activity where pid = %s)", pid)
    assert session.rows("select * from pgflow_worker._doctor_slots('0')") == []


def test_a_step_whose_tasks_ran_one_after_another(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")
        @flow.map
        def slow(element):
            time.sleep(0.6)
    """)
    session.start("f", [1, 2])
    session.work("f", mode="drain")
    found = the_finding(session)
    assert found.severity == "note"
    assert found.what == 'flow "f": step "slow" ran 2 tasks one after another, 0.6 s each'
    assert found.cure == "@flow.map(thread=True)  # or async def; then deploy"
    session.run("update pgflow_worker.invocations set finished_at = now() - interval '2 days'")
    assert findings(session) == []


def test_concurrent_handlers_that_stood_still(session: Session) -> None:
    session.deploy("""
        import time
        flow = Flow("f")
        @flow.step(thread=True)
        def concurrent(): time.sleep(0.5)
        @flow.step
        def busy(tx: Transaction): tx.execute("select pg_sleep(1.5)")
    """)
    session.start("f")
    session.work("f")
    found = the_finding(session)
    assert found.what.startswith('flow "f": concurrent handlers stood still for 1.')
    doctor.paste(session.connection, found.cure)
    assert session.value("select workers from pgflow_worker.flows") == 2


# pgflow, pgmq, realtime


def test_a_database_without_pgflow(session: Session) -> None:
    session.deploy(FLOW)
    session.run("drop schema pgflow cascade")
    found = the_finding(session)
    assert (found.severity, found.what) == ("error", "pgflow is not installed in this database")
    assert found.cure == f"PGDATABASE='{session.connection.info.dbname}' make install-pgflow"


def test_a_version_of_pgflow_that_is_not_supported(session: Session) -> None:
    session.run("drop function pgflow.start_tasks(text, bigint[], uuid)")
    found = the_finding(session)
    assert (found.severity, found.what) == ("error", "this version of pgflow is not supported")
    assert found.cure.startswith("-- Use pgflow 0.3 to ")


def test_a_function_of_pgmq_that_is_missing(session: Session) -> None:
    session.run("""do $$ declare read regprocedure; begin
        for read in
            select oid from pg_proc where starts_with(oid::regprocedure::text, 'pgmq.read(')
        loop
            execute 'alter extension pgmq drop function ' || read;
            execute 'drop function ' || read || ' cascade';
        end loop;
    end $$""")
    found = the_finding(session)
    assert (found.severity, found.what, found.cure) == (
        "error",
        "pgmq is missing or of a version that is not supported",
        "alter extension pgmq update;",
    )


def test_realtime_send_is_missing(session: Session) -> None:
    session.run("drop schema realtime cascade")
    found = the_finding(session)
    assert found.severity == "error"
    assert found.what == "function realtime.send(jsonb, text, text, boolean) is missing"
    assert_cured(session, found.cure)
    session.deploy(FLOW)
    session.start("f")


def test_a_schema_of_an_ordinary_role(session: Session, stranger: str) -> None:
    session.run(f'alter schema realtime owner to "{stranger}"')
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "warning",
        f'schema "realtime" belongs to role "{stranger}"',
    )
    assert "the owner could do anything" in found.why
    assert_cured(session, found.cure)


def test_a_function_of_an_ordinary_role(session: Session, stranger: str) -> None:
    session.run(f'alter function realtime.send owner to "{stranger}"')
    found = the_finding(session)
    assert found.what == f'1 function of schema "realtime" belongs to role "{stranger}"'
    assert_cured(session, found.cure)


def test_functions_and_tables_of_an_ordinary_role(session: Session, stranger: str) -> None:
    session.run(f"""
        alter function pgflow.fail_task owner to "{stranger}";
        alter function pgflow.complete_task owner to "{stranger}";
        alter table pgflow.runs owner to "{stranger}";
        alter table pgflow.deps owner to "{stranger}";
        alter function pgflow_worker._gate owner to "{stranger}";
    """)
    found = findings(session)
    assert [row.what for row in found] == [
        "code, flows, tasks and timeouts were not looked at",
        f'2 functions of schema "pgflow" belong to role "{stranger}"',
        f'2 tables of schema "pgflow" belong to role "{stranger}"',
        f'1 function of schema "pgflow_worker" belongs to role "{stranger}"',
    ]
    for row in found:
        doctor.paste(session.connection, row.cure)
    assert findings(session) == []


def test_a_superuser_does_not_run_what_others_put_in_a_tables_place(
    session: Session, stranger: str
) -> None:
    session.deploy(FLOW)
    session.run(f"""
        create table seen (by text);
        grant insert on seen to "{stranger}";
        create schema cron authorization "{stranger}";
        create function cron.pry() returns int language sql as
            'insert into public.seen values (current_user) returning 1';
        create view cron.job as
            select 1::bigint as jobid, 'x' as username, 'call pgflow_worker.work()' as command
            where cron.pry() = 1;
        create view cron.job_run_details as select * from cron.job;
        drop table pgmq.q_f;
        create view pgmq.q_f as select 1::bigint as msg_id, now() as vt where cron.pry() = 1;
        alter view cron.job owner to "{stranger}";
        alter view pgmq.q_f owner to "{stranger}";
    """)
    found = findings(session)
    assert session.value("select count(*) from seen") == 0
    assert not [row for row in found if "could not be made" in row.what]
    # It would have been read:
    assert session.value("select count(*) from pgmq.q_f") == 1
    assert session.value("select count(*) from seen") == 1


def test_a_pgflow_whose_functions_are_not_known(session: Session) -> None:
    session.deploy('flow = Flow("f")\n@flow.map\ndef each(element): pass\n')
    assert findings(session) == []
    body = session.value("select pg_get_functiondef('pgflow.fail_task'::regproc)")
    session.run(body.replace("begin", "begin  -- changed", 1).replace("BEGIN", "BEGIN  --", 1))
    found = the_finding(session)
    assert found.severity == "note"
    assert found.what == "this pgflow's start_tasks, complete_task and fail_task are not known here"
    assert found.why == "large maps are slow, their tasks are handled singly; flows: f"


# Code


def test_steps_that_differ_from_the_database(session: Session) -> None:
    session.deploy('flow = Flow("f")\n@flow.step\ndef a(): pass\n@flow.step\ndef b(a): pass\n')
    session.run("delete from pgflow.deps")
    found = the_finding(session)
    assert found.severity == "error"
    assert found.what == 'flow "f": step "b" depends on [a] in the code, on [] in the database'
    assert "PW003" in found.why
    assert "mismatch" in doctor.paste(session.connection, found.cure)


def test_a_step_that_the_code_does_not_have(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgflow.add_step('f', 'surplus')")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "warning",
        'flow "f": step "surplus" is in the database, not in the code',
    )
    assert "mismatch" in doctor.paste(session.connection, found.cure)


def test_options_that_differ_from_the_database(session: Session) -> None:
    session.deploy(FLOW)
    session.run("update pgflow.steps set opt_timeout = 99")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "note",
        'flow "f": options in database and code differ: step.timeout: 99 -> the flow\'s',
    )
    assert_cured(session, found.cure)


PACKAGE = "import sortedcontainers\n" + FLOW


def test_a_package_without_an_environment(
    session: Session, connect: Callable[..., Connection]
) -> None:
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    session.deploy(PACKAGE)
    session.run("select pgflow_worker.set_environment(null)")
    found = the_finding(Session(connect()))
    assert found.severity == "error"
    assert found.what.startswith(
        'module "flows_of_test" cannot be imported: ModuleNotFoundError: No module named'
    )
    assert found.why == 'every call fails with PW005; flows: "f"'
    doctor.paste(session.connection, found.cure.replace("/path/of/a/venv", sys.prefix))
    assert findings(Session(connect())) == []


def test_a_secret_that_is_missing(session: Session, tmp_path: Path) -> None:
    directory = tmp_path / "secrets"
    directory.mkdir(0o700)
    key = directory / "key"
    key.write_text("value")
    key.chmod(0o600)
    session.run("select pgflow_worker.set_secrets(%s)", str(directory))
    session.deploy(FLOW.replace('Flow("f"', 'Flow("f", secrets=["key"]'))
    assert "key" not in str(findings(session))
    key.unlink()
    [found] = [row for row in findings(session) if "secret" in row.what]
    assert (found.severity, found.why) == ("error", "every call fails with PW014")
    assert f"{directory}/key" in found.cure


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    path = tmp_path / "an environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    return path


def test_a_package_that_was_removed(
    session: Session, connect: Callable[..., Connection], environment: Path
) -> None:
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    session.deploy(PACKAGE)
    session.run("select pgflow_worker.set_environment(%s)", str(environment))
    found = the_finding(Session(connect()))
    assert found.what.endswith("No module named 'sortedcontainers'")
    assert found.cure == f"'{environment}/bin/python' -m pip install sortedcontainers"


def test_a_module_that_fails_when_it_is_imported(session: Session, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text("7")
    session.deploy(f"DATA = open({str(file)!r}).read()\n" + FLOW)
    file.unlink()
    found = the_finding(session)
    assert "FileNotFoundError" in found.what
    assert found.cure == (
        "\\set source `cat flows_of_test.py` \\\\ "
        "select * from pgflow_worker.deploy('flows_of_test', :'source');"
    )
    (tmp_path / "flows_of_test.py").write_text("from pgflow_worker import Flow\n" + FLOW)
    assert_cured(session, found.cure.replace("cat ", f"cat {tmp_path}/"))


def test_an_environment_of_another_python(session: Session, environment: Path) -> None:
    session.run("select pgflow_worker.set_environment(%s)", str(environment))
    session.deploy(FLOW)
    assert findings(session) == []
    [packages] = (environment / "lib").iterdir()
    packages.rename(packages.with_name("python3.1"))
    found = the_finding(session)
    assert found.severity == "error"
    assert f'environment "{environment}" is not for Python' in found.what
    assert found.why == "every call fails with PW008. It has packages for: python3.1."
    subprocess.run(found.cure.replace("--clear", "--clear --without-pip"), shell=True, check=True)
    assert findings(session) == []


def test_an_environment_that_is_gone(session: Session, environment: Path) -> None:
    session.run("select pgflow_worker.set_environment(%s)", str(environment))
    environment.rename(environment.with_name("elsewhere"))
    found = the_finding(session)
    assert found.what == f'"{environment}" is not a virtual environment that the server can read'
    subprocess.run(found.cure + " --without-pip", shell=True, check=True)
    assert findings(session) == []


def test_an_environment_that_others_may_write(session: Session, environment: Path) -> None:
    session.run("select pgflow_worker.set_environment(%s)", str(environment))
    (environment / "lib").chmod(0o777)
    found = the_finding(session)
    assert found.severity == "warning"
    assert found.what.startswith(f'"{environment}/lib" can be written by others')
    subprocess.run(found.cure, shell=True, check=True)
    assert findings(session) == []


def test_python_files_of_another_version(session: Session) -> None:
    session.run("update pg_extension set extversion = '9.9' where extname = 'pgflow_worker'")
    found = the_finding(session)
    assert (found.severity, found.what) == (
        "error",
        "the Python files of pgflow_worker 9.9 are missing",
    )
    assert "PW010" in found.why
    assert found.cure == "alter extension pgflow_worker update;"


# Roles, and the doctor itself


def test_the_most_severe_comes_first(session: Session, stranger: str) -> None:
    session.run(f'alter schema realtime owner to "{stranger}"')
    session.deploy(FLOW)
    session.run("select pgmq.send('f', '{}')")
    session.start("f")
    let_wait(session)
    assert [row[0] for row in findings(session)] == ["error", "warning", "note"]


def test_a_check_that_fails_leaves_the_others(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    let_wait(session)
    session.run("alter table pgflow.step_tasks rename column last_worker_id to worker")
    found = findings(session)
    assert [row[0] for row in found] == ["error", "note"]
    assert found[1][1] == (
        'check "tasks" could not be made: column task.last_worker_id does not exist'
    )


def test_what_monitor_may_not_look_at_is_a_note(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    session.start("f")
    let_wait(session)
    monitor = role("monitor")
    name = monitor.connection.info.user
    seen = [found.what for found in findings(monitor) if found.severity == "note"]
    assert seen[:1] == [f'role "{name}" may not deploy, so that no module was imported']
    # Where pg_cron's launcher runs, everybody sees in which database.
    assert seen[1:] in ([], [f'role "{name}" cannot see whether pg_cron is loaded'])


@pytest.mark.parametrize("level", ["monitor", "operate", "deploy"])
def test_only_who_may_deploy_imports_modules(
    session: Session, role: Role, tmp_path: Path, level: str
) -> None:
    trace = tmp_path / "trace"
    session.deploy(f"open({str(trace)!r}, 'w').close()\n" + FLOW)
    trace.unlink()
    found = findings(role(level))
    assert trace.exists() == (level == "deploy")
    assert not [row for row in found if "could not be made" in row[1]]


def test_a_slot_whose_session_a_role_may_not_see(
    session: Session, other: Session, role: Role
) -> None:
    session.deploy(FLOW)
    other.run("select pg_advisory_lock(hashtextextended('pgflow_worker/f/1', 0))")
    monitor = role("monitor")
    name, pid = monitor.connection.info.user, other.connection.info.backend_pid
    [found] = [row for row in findings(monitor) if "slot" in row[1]]
    assert found[1] == f'role "{name}" may not see what pid {pid} does, which holds a slot'
    assert found[3] == f"grant pg_read_all_stats to {name};"


def test_a_flow_that_paused_itself(session: Session) -> None:
    session.deploy(FLOW)
    reason = 'the server crashed 2 times while step "step" ran (run 1); paused by the worker'
    session.run("select pgflow_worker.pause('f', %s)", reason)
    [found] = findings(session)
    assert (found.severity, found.what) == ("error", f'flow "f" paused itself: {reason}')
    assert "recent_failures where flow_slug = 'f'" in found.cure


def test_runs_of_a_flow_that_is_not_deployed_any_more(session: Session) -> None:
    session.deploy(FLOW)
    for _ in range(2):
        session.start("f")
    session.work("f", batch_size=1)
    notices: list[str | None] = []
    session.connection.add_notice_handler(lambda diag: notices.append(diag.message_primary))
    session.run("select pgflow_worker.undeploy('flows_of_test')")
    assert notices == ['unfinished runs of flow "f", on which nothing will work: 1']
    [found] = findings(session)
    assert (found.severity, found.what) == (
        *("error", '1 run of flow "f" is not finished, and the flow is not deployed'),
    )
    doctor.paste(session.connection, found.cure)
    assert findings(session) == []


def test_tasks_that_failed_for_good(session: Session) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input):
            return 1 / 0
    """)
    for _ in range(2):
        session.start("f")
    session.work("f")
    [found] = findings(session)
    assert (found.severity, found.what) == (
        *("note", '2 tasks of flow "f" failed for good in the last hour'),
    )
    doctor.paste(session.connection, found.cure)

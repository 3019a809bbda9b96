"""What a role below the level deploy tries in order to get more than its level gives."""

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from tests.database.conftest import Session, counts

Role = Callable[[str | None], Session]

FLOW = """
    flow = Flow("f", max_attempts=1)

    @flow.step
    def step(flow_input, tx: Transaction):
        return tx.execute(flow_input["sql"])
"""
# Of every kind; the last one runs SQL of its own, under the caller's search_path.
KINDS = """
    flow = Flow("kinds", max_attempts=1)

    @flow.array
    def items(flow_input):
        return [1, 2, 3]

    @flow.map(over=items)
    def in_sets(n):
        return n

    @flow.map(over=items)
    def one_by_one(n, tx: Transaction):
        return n

    @flow.array
    def none(flow_input):
        return []

    @flow.map(over=none)
    def nothing(n):
        return n

    @flow.step
    async def on_the_loop(in_sets, nothing):
        return 1

    @flow.step
    def last(one_by_one, on_the_loop, tx: Transaction):
        return tx.execute("select $1::pg_catalog.text as text", ["text"])
"""

TRAPS = (Path(__file__).parent / "traps.sql").read_text()
TEMPORARY_TRAPS = (Path(__file__).parent / "temporary_traps.sql").read_text()


class Traps:
    """What the traps have told in a session."""

    def __init__(self, session: Session) -> None:
        self._notices: list[str] = []
        session.connection.add_notice_handler(
            lambda diag: self._notices.append(diag.message_primary or "")
        )

    def sprung_by(self) -> set[str]:
        """The roles that have run one since the last call of this."""
        told = [notice.partition("sprung by ") for notice in self._notices]
        self._notices.clear()
        return {name for before, _, name in told if not before}


# What is simply not allowed

FORBIDDEN = {
    "deploy": """
        select pgflow_worker.deploy('m', '')
        select pgflow_worker._deploy('m', '', false, true)
        select pgflow_worker.undeploy('flows_of_test')
        insert into pgflow_worker.modules (module, version, source) values ('m', 1, '')
        update pgflow_worker.modules set source = ''
        delete from pgflow_worker.modules
        select pgflow.create_flow('own')
        select pgflow.add_step('f', 'own')
        update pgflow.steps set opt_timeout = 1
    """,
    "choose a module": """
        update pgflow_worker.flows set module = 'other'
        update pgflow_worker.flows set version = 1
        insert into pgflow_worker.flows values ('g', 'flows_of_test', 1, 1)
        delete from pgflow_worker.flows
    """,
    "choose where packages come from": """
        select pgflow_worker.set_environment('/tmp')
        select pgflow_worker._set_environment('/tmp')
        insert into pgflow_worker.settings values ('environment', '/tmp')
    """,
    "choose where handlers run": """
        select pgflow_worker.set_executor('f', 'tcp://10.0.0.7:8786')
        select pgflow_worker._set_executor('f', 'tcp://10.0.0.7:8786', null, true)
        insert into pgflow_worker.executors values ('f', null, 'tcp://10.0.0.7:8786', true)
        update pgflow_worker.executors set send_secrets = true
        delete from pgflow_worker.executors
    """,
    "choose where secrets come from": """
        select pgflow_worker.set_secrets('/tmp')
        select pgflow_worker._set_secrets('/tmp')
        insert into pgflow_worker.settings values ('secrets', '/tmp')
    """,
    "read the stored sources": """
        table pgflow_worker.modules
        select count(*) from pgflow_worker.modules
        copy pgflow_worker.modules to stdout
    """,
    "become somebody else": """
        select pgflow_worker.grant_usage(current_user, 'deploy')
        select pgflow_worker._grant_queues()
        set role postgres
        set session authorization postgres
    """,
    "leave code that others would run": """
        create trigger t before update on pgflow.step_tasks execute function own.f()
        create trigger t before insert on pgflow_worker.attempts execute function own.f()
        create trigger t before update on pgmq.q_f execute function own.f()
        create rule r as on insert to pgflow_worker.attempts do also select 1
        create index on pgflow.runs (run_id)
        alter table pgmq.q_f add check (true)
        create policy p on pgflow.runs using (true)
        create table own.r (run_id uuid references pgflow.runs)
        create table pgmq.q_g (id int)
        create function pgflow_worker._load() returns jsonb language sql as 'select null::jsonb'
        create function pgflow.start_flow(int) returns int language sql as 'select 1'
        create function realtime.send(text) returns int language sql as 'select 1'
        alter function pgflow_worker._load(boolean) set search_path = own
        create function own.python() returns int language plpython3u as 'return 1'
        do language plpython3u 'pass'
        create cast (uuid as jsonb) with inout as implicit
        create operator pg_catalog.|| (leftarg = text, rightarg = integer, function = own.f)
        create operator class c default for type text using btree as storage text
        create event trigger t on ddl_command_start execute function own.e()
        create extension plpgsql_check
        load 'auto_explain'
        alter role postgres set search_path = own
    """,
    "make or drop queues": """
        select pgmq.create('own')
        select pgmq.drop_queue('f')
        select pgmq.purge_queue('f')
        truncate pgmq.q_f
    """,
    "change what has been": """
        update pgflow_worker.attempts set outcome = 'completed'
        update pgflow_worker.invocations set report = '{}'
        truncate pgflow_worker.attempts
        delete from pgflow.runs
        insert into pgflow_worker.pauses values ('f', 'why', now(), 'somebody else')
        update pgflow_worker.pauses set paused_by = 'somebody else'
    """,
    "have other tables analyzed": """
        select pgflow_worker._analyze('pgflow_worker.modules')
        select pgflow_worker._analyze('own.t')
    """,
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_operate_may_not(session: Session, role: Role, what: str) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    session.run(f"create schema own authorization {operator.connection.info.user}")
    operator.run("""
        create table own.t (id int);
        create function own.f() returns trigger language plpgsql as 'begin return new; end';
        create function own.e() returns event_trigger language plpgsql as 'begin end';
    """)
    for statement in FORBIDDEN[what].strip().splitlines():
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            operator.run(statement)


# Code of its own, in the place of what our SQL means


def attack(operator: Session) -> None:
    """Call everything that operate may, some of it as nobody should."""
    operator.run("select pgflow_worker._load(), pgflow_worker._load(false)")
    operator.run("select pgflow_worker._revision()")
    operator.run("select pgflow_worker._analyze('pgflow.runs')")
    operator.run("select pgflow_worker.pause('kinds'), pgflow_worker.resume('kinds')")
    for call in (operator.work, operator.work_batch):
        operator.start("kinds")
        call("kinds")
    assert operator.work("kinds", mode="drain")["failed"] == 0


@pytest.mark.parametrize(
    "path", ["own, pg_catalog", "own, pg_temp, pg_catalog", "pg_temp, own, pg_catalog"]
)
def test_objects_in_the_callers_search_path_run_as_the_caller(
    session: Session, role: Role, path: str
) -> None:
    session.deploy(KINDS)
    operator = role("operate")
    name = operator.connection.info.user
    session.run(f"create schema own authorization {name}")
    operator.connection.execute(TRAPS.replace("@schema@", "own"))
    traps = Traps(operator)
    operator.run(f"set search_path = {path}")
    operator.run("select 1 = 1")
    assert traps.sprung_by() == {name}
    attack(operator)
    assert traps.sprung_by() <= {name}
    assert session.value("select count(*) from pgflow.runs where status = 'completed'") == 2


@pytest.mark.parametrize("path", ['"$user", public', "''", "pg_temp, pg_catalog"])
def test_temporary_objects_run_as_the_caller(session: Session, role: Role, path: str) -> None:
    session.deploy(KINDS)
    operator = role("operate")
    name = operator.connection.info.user
    operator.connection.execute(TEMPORARY_TRAPS)
    traps = Traps(operator)
    operator.run(f"set search_path = {path}")
    operator.run("""select '{}'::jsonb from modules""")
    assert traps.sprung_by() == {name}
    attack(operator)
    assert traps.sprung_by() <= {name}
    assert session.value("select count(*) from pgflow.runs where status = 'completed'") == 2


def test_a_cast_to_a_parameters_type_runs_as_the_caller(session: Session, role: Role) -> None:
    session.deploy(KINDS)
    operator = role("operate")
    name = operator.connection.info.user
    session.run(f"create schema own authorization {name}")
    operator.run("""
        create type own.sly as (slug text);
        create function own.spring(own.sly) returns text language plpgsql as $$
        begin
            raise notice 'sprung by %%', current_user;
            return 'kinds';
        end $$;
        create cast (own.sly as text) with function own.spring(own.sly) as implicit;
    """)
    traps = Traps(operator)
    for call in ("select pgflow_worker.pause(%s)", "call pgflow_worker.work(%s)"):
        operator.run(call % "row('kinds')::own.sly")
    assert traps.sprung_by() == {name}


@pytest.mark.parametrize("path", ['"$user", public', "public, pg_catalog"])
def test_objects_in_public_stay_untouched_by_a_superuser(session: Session, path: str) -> None:
    """Where everybody may create in public, as before PostgreSQL 15."""
    session.connection.execute(TRAPS.replace("@schema@", "public"))
    session.run(f"set search_path = {path}")
    traps = Traps(session)
    session.run("select 'text'::text || 1")
    assert traps.sprung_by() == {session.connection.info.user}
    session.deploy(KINDS)
    attack(session)
    session.deploy(KINDS.replace("max_attempts=1", "max_attempts=2"))
    session.run("select pgflow_worker.grant_usage('pg_monitor', 'deploy')")
    session.run("select pgflow_worker.revoke_usage('pg_monitor')")
    session.run("select pgflow_worker.set_environment(null)")
    session.run("select pgflow_worker.undeploy('flows_of_test')")
    assert traps.sprung_by() == set()


def test_settings_of_the_callers_change_nothing(session: Session, role: Role) -> None:
    session.deploy(KINDS)
    operator = role("operate")
    for name, value in {
        "pgflow_worker.environment": "/tmp",
        "pgflow_worker.version": "9.9",
        "pgflow_worker.module": "other",
        "check_function_bodies": "off",
        "datestyle": "German, DMY",
        "default_transaction_isolation": "serializable",
        "intervalstyle": "sql_standard",
        "lock_timeout": "1s",
        "quote_all_identifiers": "on",
        "row_security": "off",
        "transform_null_equals": "on",
        "xmloption": "document",
    }.items():
        operator.run("select set_config(%s, %s, false)", name, value)
    attack(operator)
    assert session.value("select count(*) from pgflow.runs where status = 'completed'") == 2


# The helper functions called directly


def test_without_its_first_half_a_call_has_nothing_to_run(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    operator.start("f", {"sql": "select 1"})
    for call in (
        "call pgflow_worker._work('f', 1, 1, 'batch', 1, null)",
        "select pgflow_worker._work_batch('f', 1, 1, false)",
    ):
        with pytest.raises(psycopg.Error, match="No module named 'pgflow_worker'"):
            operator.run(call)
    assert operator.value("select status from pgflow.step_tasks") == "queued"


@pytest.mark.parametrize("slug", ["g", 'f"; select 1 --'])
def test_the_second_half_of_a_call_runs_deployed_flows_only(
    session: Session, role: Role, slug: str
) -> None:
    session.deploy(FLOW)
    operator = role("operate")
    operator.run("select pgflow_worker._load()")
    answer = operator.value("call pgflow_worker._work(%s, 1, 1, 'batch', 1, null)", slug)
    assert answer["raise"]["sqlstate"] == "PW001"


# What can be read


def test_of_the_sources_only_lines_in_tracebacks_can_be_read(session: Session, role: Role) -> None:
    session.deploy("""
        flow = Flow("f", max_attempts=1)
        PASSWORD = "hidden" + " in the source"

        @flow.step
        def step(flow_input):
            return 1 / 0  # shown

        @flow.step
        async def waiting(flow_input):
            raise LookupError  # shown
    """)
    operator, monitor = role("operate"), role("monitor")
    operator.start("f")
    operator.work("f", mode="drain")
    for statement in (
        "call pgflow_worker._work('f', null, null, null, null, null)",
        "call pgflow_worker._work(null, null, null, null, null, null)",
        "select pgflow_worker._work_batch('f', -1, -1, null)",
    ):
        try:
            learnt = str(operator.rows(statement))
        except psycopg.Error as error:
            learnt = f"{error}{error.diag.message_detail}{error.diag.context}"
        assert "hidden" not in learnt
    learnt = str(operator.rows("select pgflow_worker._load(), pgflow_worker._revision()"))
    for table in ("pgflow_worker.attempts", "pgflow_worker.invocations", "pgflow.step_tasks"):
        learnt += str(monitor.rows(f"table {table}"))
    assert "hidden" not in learnt
    assert "return 1 / 0  # shown" in learnt


# What SQL users can do to each other


def test_any_user_can_keep_a_slot_taken_and_is_named(session: Session, role: Role) -> None:
    session.deploy(FLOW)
    session.start("f", {"sql": "select 1"})
    nobody = role(None)
    key = "hashtextextended('pgflow_worker/f/1', 0)"
    nobody.run(f"select pg_advisory_lock({key})")
    report = session.work("f")
    assert report["status"] == "skipped"
    assert report["notes"] == [f"slot 1 is held by pid {nobody.connection.info.backend_pid}"]
    nobody.run(f"select pg_advisory_unlock({key})")
    assert counts(session.work("f")) == {"completed": 1}


def test_a_handler_can_leave_a_role_that_was_only_set(session: Session, role: Role) -> None:
    """As docs/security.md warns: the role must be the one that has logged in."""
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input, tx: Transaction):
            tx.execute("reset role")
            return tx.execute("select current_user::text as who")[0]["who"]
    """)
    operator = role("operate")
    who = "select output from pgflow.step_tasks order by queued_at desc limit 1"
    operator.start("f")
    operator.work("f")
    assert session.value(who) == operator.connection.info.user
    session.run(f"set role {operator.connection.info.user}")
    session.start("f")
    session.work("f")
    session.run("reset role")
    assert session.value(who) == session.connection.info.user


# Before there is an extension


def test_a_schema_of_somebody_elses_is_refused(session: Session, role: Role) -> None:
    somebody = role(None).connection.info.user
    session.run("drop extension pgflow_worker")
    session.run("drop schema pgflow_worker")
    session.run(f"create schema pgflow_worker authorization {somebody}")
    with pytest.raises(psycopg.Error, match="does not belong to a superuser"):
        session.run("create extension pgflow_worker")
    session.run("alter schema pgflow_worker owner to current_user")
    session.run("create extension pgflow_worker")

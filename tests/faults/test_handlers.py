"""What a handler may do to the process and the session: the next task is not affected."""

import textwrap
import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.conftest import Connection
from tests.database.conftest import Session, counts

ENDED = "the call ended, and the next one has a new process"
FLOW = """
import os, signal, sys, threading, time

flow = Flow("f", max_attempts=2, base_delay=1)

@flow.step
def step(flow_input{parameters}):
    if flow_input["bad"]:
{body}
    return 1
"""
TX = ", tx: Transaction"

# The handler fails, the next task of the same call succeeds: what it does, and what the user reads.
FAILURES = {
    "raises SystemExit": ("raise SystemExit(1)", "SystemExit: 1"),
    "raises KeyboardInterrupt": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    "raises GeneratorExit": ("raise GeneratorExit", "GeneratorExit"),
    "quits": ("sys.exit('done')", "SystemExit: done"),
    "raises an error of plpy's": ("sys.modules['plpy'].error('no')", "Error: no"),
    "imports plpy": ("import plpy", "ImportError: handlers run SQL through tx: Transaction, not"),
    "recurses without end": ("def f(): f()\nf()", "RecursionError: maximum recursion depth"),
    "cannot be traced": ("sys.settrace(lambda *_: 1 / 0)\nlen([])", ""),
}
FAILURES_WITH_TX = {
    "commits": ("sys.modules['plpy'].commit()", "cannot commit while a subtransaction is active"),
    "rolls back": ("sys.modules['plpy'].rollback()", "cannot roll back while a subtransaction"),
    "commits through tx": ("tx.execute('commit')", "a handler cannot commit or roll back"),
    "locks against itself": ("tx.execute('select 1/0')", "division by zero"),
}

# The handler succeeds, and so does the next task of the same call; what the report notes.
HARMLESS = {
    "changes directory": ("os.chdir('/')", "changed the working directory: it was changed back"),
    "changes the umask": ("os.umask(0o777)", "changed the umask: it was changed back"),
    "changes the locale": (
        "import locale\nlocale.setlocale(locale.LC_ALL, 'C')",
        "changed the locale: it was changed back",
    ),
    "raises the recursion limit": ("sys.setrecursionlimit(10**6)", "recursion limit: it was"),
    "leaves a thread": (
        "threading.Thread(target=time.sleep, args=(1,), daemon=True).start()",
        "left a thread running",
    ),
    "forks": ("os.fork()", None),
    "forks a child that exits": ("if os.fork() == 0: sys.exit(3)", None),
    "forks a child that raises": ("if os.fork() == 0: raise ValueError", None),
    "starts a process": ("import subprocess\nsubprocess.Popen(['sleep', '1'])", None),
    "uses multiprocessing": (
        "import multiprocessing\n"
        "p = multiprocessing.get_context('fork').Process(target=print)\np.start()\np.join()",
        None,
    ),
    "blocks signals": ("signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())", None),
    "sets an alarm": ("signal.alarm(1)", None),
    "patches json": (
        "import json, json.encoder\njson.dumps = json.loads = json.JSONEncoder = None\n"
        "json.JSONDecoder = json.encoder.encode_basestring_ascii = None",
        None,
    ),
    "clears sys.modules": ("sys.modules.clear()", None),
    "clears sys.path": ("sys.path.clear()", None),
    "clears the environment": ("os.environ.clear()", None),
    "closes stdout": ("sys.stdout.close()\nsys.stderr.close()", None),
    "disables logging": ("import logging\nlogging.disable()", None),
}
HARMLESS_WITHOUT_TX = {
    "commits nothing": ("sys.modules['plpy'].commit()", None),
    "rolls nothing back": ("sys.modules['plpy'].rollback()", None),
}
HARMLESS_WITH_TX = {
    "leaves a temporary table": (
        "tx.execute('create temporary table written (id int)')",
        "left temporary objects behind: they were dropped",
    ),
    "leaves a temporary function": (
        "tx.execute('create function pg_temp.f() returns int return 1')",
        "left temporary objects behind: they were dropped",
    ),
    "leaves advisory locks": (
        "tx.execute('select pg_advisory_lock(7), pg_advisory_lock(7), pg_advisory_lock(-7), "
        "pg_advisory_lock_shared(8), pg_advisory_lock(-1, 2), pg_advisory_lock_shared(1, -2)')",
        "left advisory locks behind: they were released",
    ),
    "changes the role": ("tx.execute('set role pg_monitor')", None),
    "changes the session's user": ("tx.execute('set session authorization pg_monitor')", None),
    "changes the search_path": ("tx.execute('set search_path = nowhere')", None),
    "changes settings": (
        "tx.execute('set work_mem = 64')\ntx.execute(\"set timezone = 'Asia/Tokyo'\")\n"
        "tx.execute('set bytea_output = escape')\ntx.execute('set row_security = off')\n"
        "tx.execute('set session_replication_role = replica')\n"
        "tx.execute(\"select set_config('my.own', 'x', false)\")",
        None,
    ),
    "becomes read-only": ("tx.execute('set default_transaction_read_only = on')", None),
    "defers constraints": ("tx.execute('set constraints all deferred')", None),
    "leaves a cursor": ("tx.stream('select 1').__next__()", None),
    "leaves a prepared statement": ("tx.execute('prepare mine as select 1')", None),
    "listens": ("tx.execute('listen something')", None),
}
# The call ends after the handler, and the next one goes on.
UNTRUSTED = {
    "ignores SIGINT": ("signal.signal(signal.SIGINT, signal.SIG_IGN)", "handlers of the server's"),
    "takes the server's signals": (
        "for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGALRM, signal.SIGURG):\n"
        "    signal.signal(s, signal.SIG_DFL)",
        "replaced signal handlers of the server's",
    ),
    "takes the worker's signal": (
        "signal.signal(signal.SIGRTMIN, signal.SIG_DFL)",
        "replaced a signal handler of the worker's",
    ),
}

Cases = dict[str, tuple[str, Any]]


def run_both(session: Session, body: str, parameters: str) -> Any:
    """The report of a call that has two tasks: one that misbehaves, then one that does not."""
    session.deploy(FLOW.format(parameters=parameters, body=textwrap.indent(body, "        ")))
    session.start("f", {"bad": True})
    session.start("f", {"bad": False})
    return session.work("f")


def both(cases: Cases, cases_with_tx: Cases, cases_without: Cases | None = None) -> list[Any]:
    return [
        *(pytest.param(*case, "", id=name) for name, case in (cases_without or {}).items()),
        *(pytest.param(*case, "", id=name) for name, case in cases.items()),
        *(pytest.param(*case, TX, id=f"{name} with tx") for name, case in cases.items()),
        *(pytest.param(*case, TX, id=name) for name, case in cases_with_tx.items()),
    ]


def state(session: Session) -> list[tuple[Any, ...]]:
    """What a handler could have changed in the session."""
    return session.rows("""
        select current_user, session_user, current_setting('role'),
            exists (select from pg_class where relnamespace = pg_my_temp_schema())
        union all
        select name, setting, null, null from pg_settings
        union all
        select 'lock', classid || ' ' || objid, mode, null from pg_locks
        where locktype = 'advisory' and pid = pg_backend_pid()
    """)


@pytest.mark.parametrize(("body", "error", "parameters"), both(FAILURES, FAILURES_WITH_TX))
def test_fails_only_its_task(session: Session, body: str, error: str, parameters: str) -> None:
    assert counts(run_both(session, body, parameters)) == {"retried": 1, "completed": 1}
    message = session.value("select error_message from pgflow.step_tasks where status = 'queued'")
    assert error in message


@pytest.mark.parametrize(
    ("body", "note", "parameters"), both(HARMLESS, HARMLESS_WITH_TX, HARMLESS_WITHOUT_TX)
)
def test_harms_no_other_task(
    session: Session, body: str, note: str | None, parameters: str
) -> None:
    session.run("do 'begin end'")  # loads PL/pgSQL, which brings settings of its own
    before = state(session)
    report = run_both(session, body, parameters)
    assert counts(report) == {"completed": 2}
    assert [note in text for text in report["notes"]] == ([True] if note else [])
    if "plpy" not in body:
        assert state(session) == before


@pytest.mark.parametrize(("body", "note", "parameters"), both(UNTRUSTED, {}))
def test_ends_the_call_where_the_process_cannot_be_trusted(
    session: Session, other: Session, body: str, note: str, parameters: str
) -> None:
    report = run_both(session, body, parameters)
    assert counts(report) == {"completed": 1}
    [text] = report["notes"]
    assert note in text
    assert text.endswith(ENDED)
    assert counts(session.work("f")) == {"completed": 1}
    # The server's own handlers are there again.
    pid = session.connection.info.backend_pid
    assert other.value("select pg_log_backend_memory_contexts(%s)", pid)
    assert other.value("select pg_terminate_backend(%s, 10000)", pid)


@pytest.mark.parametrize("parameters", ["", TX], ids=["plain", "with tx"])
@pytest.mark.parametrize(
    "body",
    [
        "big = bytearray(2_000_000_000)",
        "big = []\nwhile True: big.append('x' * 1000)",
    ],
    ids=["at once", "bit by bit"],
)
def test_memory_is_limited(session: Session, body: str, parameters: str) -> None:
    session.run("insert into pgflow_worker.settings values ('memory_mb', '100')")
    report = run_both(session, body, parameters)
    assert counts(report) == {"retried": 1}
    [note] = report["notes"]
    assert note == (
        "handlers ran out of memory, of which a call gives them 100 MB (memory_mb in "
        f"pgflow_worker.settings): {ENDED}"
    )
    assert session.value(
        "select error_message like 'MemoryError (flows_of_test.py:%%' "
        "from pgflow.step_tasks where attempts_count = 1"
    )
    assert counts(session.work("f")) == {"completed": 1}


def test_memory_of_sql_is_not_limited(session: Session) -> None:
    session.run("insert into pgflow_worker.settings values ('memory_mb', '30')")
    body = "tx.execute(\"select length(repeat('x', 200000000))\")"
    assert counts(run_both(session, body, TX)) == {"completed": 2}


@pytest.mark.parametrize("kind", ["async def", "def"])
def test_memory_is_limited_for_concurrent_handlers(session: Session, kind: str) -> None:
    session.run("insert into pgflow_worker.settings values ('memory_mb', '200')")
    session.deploy(f"""
        flow = Flow("f", max_attempts=2, base_delay=1)

        @flow.step{"(thread=True)" if kind == "def" else ""}
        {kind} step(flow_input):
            return len(bytearray(2_000_000_000)) * 0
    """)
    session.start("f")
    report = session.work("f")
    assert counts(report) == {"retried": 1}
    assert "ran out of memory" in report["notes"][0]


@pytest.mark.parametrize("parameters", ["", TX], ids=["plain", "with tx"])
@pytest.mark.parametrize(
    "body",
    [
        "os.closerange(3, 1000)",
        "for d in os.listdir('/proc/self/fd'):\n"
        "    path = '/proc/self/fd/' + d\n"
        "    if os.path.exists(path) and 'socket' in os.readlink(path): os.close(int(d))",
    ],
    ids=["all", "sockets"],
)
def test_closed_descriptors_end_the_process_and_not_the_server(
    session: Session, connect: Callable[..., Connection], body: str, parameters: str
) -> None:
    victim = Session(connect())
    with pytest.raises(psycopg.OperationalError):
        run_both(victim, body, parameters)
    # Whoever was connected before still is: the server has not restarted.
    session.until("select count(*) = 0 from pg_locks where locktype = 'advisory'")
    session.deploy(FLOW.format(parameters=parameters, body="        pass"))
    assert counts(session.work("f")) == {"rescued": 1, "completed": 2}


def test_an_open_subtransaction_ends_the_call(session: Session) -> None:
    with pytest.raises(psycopg.Error, match="a handler has left a subtransaction open") as raised:
        run_both(session, "sys.modules['plpy'].subtransaction().__enter__()", "")
    assert raised.value.diag.message_hint
    session.deploy(FLOW.format(parameters="", body="        pass"))
    assert counts(session.work("f")) == {"rescued": 1, "completed": 2}


def test_plpy_fatal_ends_the_session_and_the_next_call_rescues(
    session: Session, connect: Callable[..., Connection]
) -> None:
    with pytest.raises(psycopg.Error, match="the end"):
        run_both(Session(connect()), "sys.modules['plpy'].fatal('the end')", "")
    session.deploy(FLOW.format(parameters="", body="        pass"))
    assert counts(session.work("f")) == {"rescued": 1, "completed": 2}


def test_a_large_result_is_stored(session: Session) -> None:
    report = run_both(session, "return 'x' * 50_000_000", "")
    assert counts(report) == {"completed": 2}
    assert session.value("select max(length(output #>> '{}')) from pgflow.step_tasks") == 50_000_000


def test_a_handler_is_not_ended_by_harmless_interrupts(
    session: Session, other: Session, background: Callable[..., Any]
) -> None:
    session.deploy("""
        import time
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(flow_input):
            time.sleep(1)
    """)
    session.start("f")
    call = background(session.work, "f")
    other.until("select count(*) = 1 from pgflow.step_tasks where status = 'started'")
    other.run("create database elsewhere template template0")
    pid = session.connection.info.backend_pid
    for _ in range(5):
        other.run("select pg_log_backend_memory_contexts(%s)", pid)
        other.run("select pg_reload_conf()")
        time.sleep(0.1)
    # Waits for every backend, and so for the handler; it does not end it.
    other.run("drop database elsewhere")
    assert counts(call.result()) == {"completed": 1}


# What belongs to the caller


def test_the_callers_own_settings_stay(session: Session) -> None:
    session.run("set app.tenant = '42'; set work_mem = '9MB'; set statement_timeout = '50 s'")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            found = tx.execute(
                "select current_setting('app.tenant') || current_setting('work_mem')"
            )
            tx.execute("set work_mem = '77MB'")
            tx.execute("set enable_seqscan = off")
            tx.execute("select set_config('statement_timeout', '40s', false)")
            return found
    """)
    session.start("f")
    session.start("f")
    assert counts(session.work("f")) == {"completed": 2}
    assert (
        session.rows("select output #>> '{0,?column?}' from pgflow.step_tasks") == [("429MB",)] * 2
    )
    assert session.rows("""
        select current_setting(name) from unnest(array[
            'app.tenant', 'work_mem', 'enable_seqscan', 'statement_timeout'
        ]) with ordinality as setting (name, place) order by place
    """) == [("42",), ("9MB",), ("on",), ("50s",)]


def test_settings_that_the_worker_could_not_set_are_left_alone(
    session: Session, role: Callable[[str | None], Session]
) -> None:
    name = role("operate").connection.info.user
    session.deploy(FLOW.format(parameters=TX, body="        tx.execute('set work_mem = 64')"))
    session.start("f", {"bad": True})
    session.run(f"set log_min_duration_statement = 60000; set role {name}")
    try:
        assert counts(session.work("f")) == {"completed": 1}
        assert session.value("select current_user") == name
    finally:
        session.run("reset role")


def test_who_has_given_up_being_a_superuser_stays_so(
    session: Session, role: Callable[[str | None], Session]
) -> None:
    name = role("operate").connection.info.user
    session.run(f"grant pg_monitor to {name}")
    session.deploy("""
        flow = Flow("f", max_attempts=1)

        @flow.step
        def step(tx: Transaction):
            [row] = tx.execute("select session_user || ' ' || current_user as who")
            tx.execute("set role pg_monitor")
            return row["who"]
    """)
    session.start("f")
    session.start("f")
    session.run(f"set session authorization {name}")
    try:
        assert counts(session.work("f")) == {"completed": 2}
        assert session.value("select session_user || ' ' || current_user") == f"{name} {name}"
    finally:
        session.run("set session authorization default")
    assert session.rows("select distinct output #>> '{}' from pgflow.step_tasks") == [
        (f"{name} {name}",)
    ]


def test_sockets_of_an_earlier_call_may_be_closed(session: Session) -> None:
    session.deploy("""
        import socket
        flow = Flow("f", max_attempts=1)
        pair = list(socket.socketpair())

        @flow.step
        def step():
            if len(pair) == 2:
                pair.append(None)
            else:
                pair[0].close()
                pair[1].close()
    """)
    for _ in range(2):
        session.start("f")
        assert counts(session.work("f")) == {"completed": 1}


def test_signal_handlers_are_the_servers_again_every_time(session: Session, other: Session) -> None:
    session.deploy("""
        import signal
        flow = Flow("f", max_attempts=1)

        def nothing(*_): pass

        @flow.step
        def step():
            signal.signal(signal.SIGTERM, nothing)
    """)
    for _ in range(2):
        session.start("f")
        [note] = session.work("f")["notes"]
        assert "signal handlers of the server's" in note
    pid = session.connection.info.backend_pid
    assert other.value("select pg_terminate_backend(%s, 10000)", pid)


@pytest.mark.parametrize("parameters", ["", TX], ids=["plain", "with tx"])
def test_memory_that_stays_taken_ends_the_call_and_not_the_session(
    session: Session, parameters: str
) -> None:
    session.run("insert into pgflow_worker.settings values ('memory_mb', '100')")
    body = "global kept\nkept = None\nwhile True: kept = (kept, 1)"
    assert counts(run_both(session, body, parameters)) == {"retried": 1}
    [error] = session.rows("select error_message from pgflow.step_tasks where attempts_count = 1")
    assert error[0].startswith("MemoryError")
    # SQL that needs more than the handlers may have.
    assert session.value("select length(repeat('x', 200000000))") == 200_000_000


def test_a_stream_that_is_left_open_is_closed(session: Session) -> None:
    body = "global kept\nkept = tx.stream('select generate_series(1, 100000)')\nnext(kept)"
    assert counts(run_both(session, body, TX)) == {"completed": 2}
    assert session.rows("select name from pg_cursors where name <> ''") == []


def test_a_handler_after_one_with_tx_holds_no_snapshot(
    session: Session, other: Session, background: Callable[..., Any]
) -> None:
    session.deploy("""
        import time
        flow = Flow("f", max_attempts=1)

        @flow.step
        def first(tx: Transaction):
            tx.execute("select 1")

        @flow.step
        def second():
            time.sleep(2)
    """)
    session.start("f")
    call = background(session.work, "f", max_concurrent=1)
    other.until(
        "select count(*) = 1 from pgflow.step_tasks "
        "where step_slug = 'second' and status = 'started'"
    )
    other.run("select pg_sleep(0.3)")
    pid = session.connection.info.backend_pid
    assert other.rows("select backend_xmin from pg_stat_activity where pid = %s", pid) == [(None,)]
    assert counts(call.result()) == {"completed": 2}


def test_a_canceled_handlers_locks_are_released(
    session: Session, other: Session, background: Callable[..., Any]
) -> None:
    body = "tx.execute('select pg_advisory_lock(77)')\ntx.execute('select pg_sleep(60)')"
    session.deploy(FLOW.format(parameters=TX, body=textwrap.indent(body, "        ")))
    session.start("f", {"bad": True})
    call = background(session.work, "f")
    other.until("select count(*) = 1 from pg_locks where locktype = 'advisory' and objid = 77")
    other.until("select count(*) = 1 from pg_stat_activity where wait_event = 'PgSleep'")
    other.run("select pg_cancel_backend(%s)", session.connection.info.backend_pid)
    with pytest.raises(psycopg.errors.QueryCanceled):
        call.result()
    assert session.rows("select from pg_locks where locktype = 'advisory'") == []


def test_the_callers_deferred_constraints_are_left_to_it(session: Session) -> None:
    session.run("""
        create table parent (id int primary key);
        create table child (id int references parent deferrable initially deferred)
    """)
    session.deploy(FLOW.format(parameters=TX, body="        tx.execute('select 1')"))
    session.start("f", {"bad": True})
    with session.connection.transaction():
        session.run("insert into child values (1)")
        assert counts(session.work_batch("f")) == {"completed": 1}
        session.run("insert into parent values (1)")

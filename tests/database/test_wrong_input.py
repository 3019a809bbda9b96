"""What the user reads after a mistake: SQLSTATE, message and hint."""

from typing import Any

import psycopg
import pytest

from tests.database.conftest import Session

FLOW = 'flow = Flow("f")\n@flow.step\ndef step(): pass\n'


def error_of(session: Session, statement: str) -> tuple[str | None, str | None, str | None]:
    with pytest.raises(psycopg.Error) as caught:
        session.run(statement)
    diag: Any = caught.value.diag
    return diag.sqlstate, diag.message_primary, diag.message_hint


@pytest.mark.parametrize(
    ("arguments", "state", "message", "hint"),
    [
        (
            "'g'",
            "PW001",
            'flow "g" is not deployed',
            "Deployed flows: f. Deploy a module with: "
            "select * from pgflow_worker.deploy('my_module', source);",
        ),
        (
            "batch_size => 0",
            "PW002",
            "batch_size must be at least 1, not 0",
            "batch_size is the number of tasks that are taken at a time; the default is 10.",
        ),
        (
            "'f', batch_size => 0",
            "PW002",
            "batch_size must be at least 1, not 0",
            "batch_size is the number of tasks that are taken at a time; the default is 10.",
        ),
        (
            "'f', max_concurrent => null",
            "PW002",
            "max_concurrent must be at least 1, not null",
            "max_concurrent is the number of handlers that may run at a time; the default is 5.",
        ),
        (
            "'f', mode => 'forever'",
            "PW002",
            'unknown mode "forever"',
            "Modes: batch (one batch), drain (until nothing is ready), wait (keep waiting for "
            "tasks).",
        ),
        (
            "'f', max_duration => '-1 s'",
            "PW002",
            "max_duration must be more than 0, not -00:00:01",
            "max_duration ends the modes drain and wait; the default is 55 seconds.",
        ),
    ],
)
def test_arguments_of_work(
    session: Session, arguments: str, state: str, message: str, hint: str
) -> None:
    session.deploy(FLOW)
    assert error_of(session, f"call pgflow_worker.work({arguments})") == (state, message, hint)


def test_work_batch_checks_its_arguments_too(session: Session) -> None:
    session.deploy(FLOW)
    state, message, _ = error_of(session, "select pgflow_worker.work_batch('f', 0)")
    assert (state, message) == ("PW002", "batch_size must be at least 1, not 0")
    state, message, hint = error_of(session, "select pgflow_worker.work_batch(null)")
    assert (state, message) == ("PW001", "flow_slug is null")
    assert hint is not None
    assert hint.startswith("Deployed flows: f. ")


def test_code_that_differs_from_the_database(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.run("select pgflow.add_step('f', 'other')")
    session.run("insert into pgflow.deps values ('f', 'other', 'step')")
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    diag = caught.value.diag
    assert diag.sqlstate == "PW003"
    assert diag.message_primary == 'flow "f" differs from the database'
    assert diag.message_detail == (
        'step "step" depends on [] in the code, on [other] in the database; '
        'step "other" is in the database, not in the code.'
    )
    assert (diag.message_hint or "").startswith(
        'Give the changed flow a slug of its own, such as "f_v2"; or, if only a function was '
    )


def test_pgflow_is_missing(session: Session) -> None:
    session.deploy(FLOW)
    session.run("drop schema pgflow cascade")
    expected = (
        "PW004",
        "pgflow is not installed in this database",
        "Apply pgflow's migrations, which the npm package @pgflow/core carries, for example with "
        '"make install-pgflow" from the sources of pgflow_worker.',
    )
    assert error_of(session, "call pgflow_worker.work('f')") == expected
    assert error_of(session, "select pgflow_worker.deploy('m', '#')") == expected


def test_pgflow_is_too_old(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.run("drop function pgflow.start_tasks")
    assert error_of(session, "call pgflow_worker.work('f')") == (
        "PW004",
        "this version of pgflow is not supported",
        "Use pgflow 0.3 to 0.17: apply the migrations of the npm package @pgflow/core.",
    )


def test_pgmq_is_too_old(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.run("alter function pgmq.read rename to read_of_old")
    assert error_of(session, "call pgflow_worker.work('f')") == (
        "PW004",
        "pgmq is missing or of a version that is not supported",
        "Install pgmq 1.4 or later, then: alter extension pgmq update;",
    )


def test_the_queue_is_missing(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgmq.drop_queue('f')")
    assert error_of(session, "call pgflow_worker.work('f')") == (
        "PW004",
        'the queue of flow "f" does not exist',
        "Deploy the flow's module again: that creates the queue.",
    )
    session.deploy(FLOW)
    session.run("call pgflow_worker.work('f')")


def test_the_flow_was_deleted_from_pgflow(session: Session) -> None:
    session.deploy(FLOW)
    session.start("f")
    session.run("""
        delete from pgflow.step_tasks; delete from pgflow.step_states; delete from pgflow.runs;
        delete from pgflow.steps; delete from pgflow.flows;
    """)
    with pytest.raises(psycopg.Error) as caught:
        session.work("f")
    assert caught.value.sqlstate == "PW003"
    assert caught.value.diag.message_detail == 'flow "f" is in the code, not in the database.'


def test_a_module_that_no_longer_imports(session: Session) -> None:
    session.deploy("RATE = 1", "rates")
    session.deploy("import rates\n" + FLOW)
    session.start("f")
    session.run("select pgflow_worker.undeploy('rates')")
    state, message, hint = error_of(session, "call pgflow_worker.work('f')")
    assert (state, message) == (
        "PW005",
        "module \"flows_of_test\" cannot be imported: ModuleNotFoundError: No module named 'rates'",
    )
    assert hint is not None
    assert hint.startswith('Deploy "rates" first if it is a module of yours')
    # Nothing was lost: no attempt was made, and the task is there once the module is.
    assert session.rows("select status, attempts_count from pgflow.step_tasks") == [("queued", 0)]
    session.deploy("RATE = 1", "rates")
    assert session.work("f")["completed"] == 1


@pytest.mark.parametrize("call", ["pause", "resume"])
def test_pausing_an_unknown_flow(session: Session, call: str) -> None:
    state, message, _ = error_of(session, f"select pgflow_worker.{call}('g')")
    assert (state, message) == ("PW001", 'flow "g" is not deployed')


def test_undeploying_an_unknown_module(session: Session) -> None:
    session.deploy(FLOW)
    assert error_of(session, "select pgflow_worker.undeploy('g')") == (
        "PW007",
        'module "g" is not deployed',
        "Deployed modules: flows_of_test.",
    )


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("relative", 'environment "relative" is not an absolute path'),
        ("/nowhere", '"/nowhere" is not a virtual environment that the server can read'),
    ],
)
def test_environments_that_are_none(session: Session, path: str, message: str) -> None:
    state, found, hint = error_of(session, f"select pgflow_worker.set_environment('{path}')")
    assert (state, found) == ("PW008", message)
    assert hint


def test_a_setting_that_there_is_not(session: Session) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        session.run("insert into pgflow_worker.settings values ('max_death', '3')")
    with pytest.raises(psycopg.errors.CheckViolation):
        session.run("insert into pgflow_worker.settings values ('max_deaths', 'many')")

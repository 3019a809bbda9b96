"""Where an administrator sends handlers; what then happens there is in tests/dask."""

from typing import Any

import psycopg
import pytest

from tests.database.conftest import Session

ADDRESS = "tcp://10.0.0.7:8786"
FLOW = """
    flow = Flow("flow")

    @flow.step(thread=True)
    def far(flow_input): pass

    @flow.step
    async def also_far(flow_input): pass

    @flow.step
    def near(far, tx: Transaction): pass
"""


def rows(session: Session) -> list[tuple[Any, ...]]:
    return session.rows(
        "select flow_slug, step_slug, address, send_secrets from pgflow_worker.executors "
        "order by step_slug nulls first"
    )


def test_a_flow_and_a_step(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgflow_worker.set_executor('flow', %s)", ADDRESS)
    session.run("select pgflow_worker.set_executor('flow', 'tls://b:1', 'far')")
    session.run(
        "select pgflow_worker.set_executor('flow', 'tls://b:2', 'far', send_secrets => true)"
    )
    assert rows(session) == [
        ("flow", None, ADDRESS, False),
        ("flow", "far", "tls://b:2", True),
    ]
    session.run("select pgflow_worker.set_executor('flow', null, 'far')")
    assert rows(session) == [
        ("flow", None, ADDRESS, False),
        ("flow", "far", None, False),  # stays in the server, whatever the flow's others do
    ]
    session.run("select pgflow_worker.set_executor('flow', null)")
    assert rows(session) == []


def test_it_stays_with_the_next_version_and_goes_with_the_flow(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgflow_worker.set_executor('flow', %s)", ADDRESS)
    session.deploy(FLOW + "\n")
    assert len(rows(session)) == 1
    session.run("select pgflow_worker.undeploy('flows_of_test')")
    assert rows(session) == []


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "message"),
    [
        (("other", ADDRESS), "PW001", 'flow "other" is not deployed'),
        (("other", None), "PW001", 'flow "other" is not deployed'),
        ((None, ADDRESS), "PW002", "flow_slug is null"),
        (("flow", "10.0.0.7"), "PW002", '"10.0.0.7" is no address of a Dask scheduler'),
        (("flow", "tcp://10.0.0.7"), "PW002", '"tcp://10.0.0.7" is no address of a Dask scheduler'),
        (
            ("flow", "http://10.0.0.7:1"),
            "PW002",
            '"http://10.0.0.7:1" is no address of a Dask scheduler',
        ),
        (("flow", None, "none"), "PW002", 'flow "flow" has no step "none"'),
        (("flow", ADDRESS, "none"), "PW002", 'flow "flow" has no step "none"'),
        (("flow", ADDRESS, "near"), "PW002", 'step "near" of flow "flow" runs in the server'),
        (("local", ADDRESS), "PW002", 'flow "local" has no step that could run on a cluster'),
    ],
)
def test_what_is_refused(
    session: Session, arguments: tuple[str | None, ...], sqlstate: str, message: str
) -> None:
    session.deploy(FLOW)
    session.deploy('flow = Flow("local")\n@flow.step\ndef only(): pass\n', "local")
    places = ", ".join(["%s"] * len(arguments))
    with pytest.raises(psycopg.Error) as caught:
        session.run(f"select pgflow_worker.set_executor({places})", *arguments)
    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_primary == message
    assert rows(session) == []


def test_doctor_names_what_is_sent_there_in_vain(session: Session) -> None:
    session.deploy(FLOW)
    session.run("select pgflow_worker.set_executor('flow', %s, 'far')", ADDRESS)
    session.deploy(FLOW.replace("(thread=True)", ""))
    query = "select severity, what, why, cure from pgflow_worker.doctor() where what !~ 'pg_cron'"
    assert session.rows(query) == [
        (
            "warning",
            'step "far" of flow "flow" runs in the server',
            f"a row of pgflow_worker.executors sends it to {ADDRESS} in vain",
            "select pgflow_worker.set_executor('flow', null, 'far');",
        )
    ]
    session.run("select pgflow_worker.set_executor('flow', null, 'far')")
    assert session.rows(query) == []

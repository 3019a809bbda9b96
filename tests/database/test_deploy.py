"""deploy(), undeploy() and what they refuse."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import psycopg
import pytest

from pgflow_worker.__main__ import compile_modules
from tests.conftest import Connection
from tests.database.conftest import WAITING, Session, counts
from tests.database.test_work import CHAIN

Background = Callable[..., "Future[Any]"]

SHOP = """
    flow = Flow("shop", max_attempts=4, timeout=30)

    @flow.step(timeout=5)
    def order(flow_input): return 1

    @flow.map(over=order)
    def ship(element): return 2
"""

SHAPE = """select step_slug, step_type, deps_count, opt_timeout
    from pgflow.steps where flow_slug = 'shop' order by step_index"""


def refusal(session: Session, source: str, module: str = "flows_of_test", **options: bool) -> Any:
    with pytest.raises(psycopg.Error) as caught:
        session.deploy(source, module, **options)
    return caught.value.diag


def test_a_new_flow_is_compiled(session: Session) -> None:
    assert session.deploy(SHOP) == [("shop", "compiled", ['step "order"', 'step "ship"'])]
    assert session.rows(SHAPE) == [("order", "single", 0, 5), ("ship", "map", 1, None)]
    assert session.rows(
        "select opt_max_attempts, opt_base_delay, opt_timeout from pgflow.flows"
    ) == [(4, 5, 30)]
    assert session.value("select count(*) from pgmq.list_queues() where queue_name = 'shop'") == 1


def test_the_same_again_is_verified(session: Session) -> None:
    session.deploy(SHOP)
    assert session.deploy(SHOP) == [("shop", "verified", [])]
    assert session.rows("select version, current from pgflow_worker.modules") == [(1, True)]


def test_a_flow_that_pgflow_has_already_is_verified(session: Session) -> None:
    session.run("select pgflow.create_flow('shop', 4, 5, 30)")
    session.run("select pgflow.add_step('shop', 'order', timeout => 5)")
    session.run("select pgflow.add_step('shop', 'ship', array['order'], step_type => 'map')")
    assert session.deploy(SHOP) == [("shop", "verified", [])]


def test_changed_options_are_updated_in_place_and_listed(session: Session) -> None:
    session.deploy(SHOP)
    run = session.start("shop")
    changed = SHOP.replace("max_attempts=4", "max_attempts=2").replace(
        "@flow.step(timeout=5)", "@flow.step(start_delay=3)"
    )
    changes = [
        "max_attempts: 4 -> 2",
        "order.timeout: 5 -> the flow's",
        "order.start_delay: 0 -> 3",
    ]
    assert session.deploy(changed, dry_run=True) == [("shop", "updated", changes)]
    assert session.deploy(changed) == [("shop", "updated", changes)]
    assert session.deploy(changed) == [("shop", "verified", [])]
    assert session.value("select status from pgflow.runs where run_id = %s", run) == "started"


def test_another_structure_is_refused_with_the_ways_out(session: Session) -> None:
    session.deploy(SHOP)
    session.start("shop")
    changed = SHOP.replace("def order", "def purchase").replace("over=order", "over=purchase")
    diag = refusal(session, changed)
    assert diag.sqlstate == "PW003"
    assert diag.message_primary == 'flow "shop" differs from the database'
    assert diag.message_detail == (
        'step "purchase" is in the code, not in the database; '
        'step "ship" depends on [purchase] in the code, on [order] in the database; '
        'step "order" is in the database, not in the code.'
    )
    assert diag.message_hint == (
        'Give the changed flow a slug of its own, such as "shop_v2"; or, if only a function was '
        'renamed, keep the step\'s slug with @flow.step("old_name"); or deploy with '
        "allow_data_loss => true, which deletes the flow and its runs (1)."
    )
    # Nothing has changed: the old code still runs.
    assert session.value("select count(*) from pgflow_worker.modules") == 1
    assert session.deploy(SHOP) == [("shop", "verified", [])]


def test_dry_run_shows_a_mismatch_and_writes_nothing(session: Session) -> None:
    session.deploy(SHOP)
    changed = SHOP.replace("flow.map(over=order)", "flow.step(after=[order])").replace(
        "def ship(element)", "def ship()"
    )
    assert session.deploy(changed, dry_run=True) == [
        (
            "shop",
            "mismatch",
            ['step "ship" is a single step in the code, a map step in the database'],
        )
    ]
    assert session.deploy(
        'flow = Flow("new")\n@flow.step\ndef a(): pass\n', "new", dry_run=True
    ) == [("new", "compiled", ['step "a"'])]
    assert session.value("select count(*) from pgflow_worker.modules") == 1
    assert session.value("select count(*) from pgflow.flows") == 1


def test_data_loss_must_be_allowed(session: Session) -> None:
    session.deploy(SHOP)
    session.start("shop")
    session.work("shop")
    changed = SHOP + "\n    @flow.step\n    def extra(): pass\n"
    assert session.deploy(changed, allow_data_loss=True) == [
        (
            "shop",
            "recompiled",
            ['step "extra" is in the code, not in the database', "runs deleted: 1"],
        )
    ]
    assert session.value("select count(*) from pgflow.runs") == 0
    assert session.value("select count(*) from pgflow_worker.attempts") == 0
    session.start("shop")
    assert counts(session.work("shop"))["completed"] == 1


def test_data_loss_waits_for_no_worker(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(SHOP)
    call = background(other.work, "shop", mode="wait", max_duration="1 second")
    session.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    changed = SHOP + "\n    @flow.step\n    def extra(): pass\n"
    diag = refusal(session, changed, allow_data_loss=True)
    pid = other.connection.info.backend_pid
    assert (diag.sqlstate, diag.message_primary) == (
        "PW009",
        f'flow "shop" has a running worker, pid {pid}',
    )
    call.result()


def test_a_flow_that_left_its_module_is_removed(session: Session) -> None:
    session.deploy(SHOP + '\n    second = Flow("second")\n    @second.step\n    def a(): pass\n')
    assert session.deploy(SHOP) == [("shop", "verified", []), ("second", "removed", [])]
    assert session.rows("select flow_slug from pgflow_worker.flows") == [("shop",)]
    assert session.value("select count(*) from pgflow.flows where flow_slug = 'second'") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", 'the source of module "shop" is empty'),
        (" \n", 'the source of module "shop" is empty'),
        ("# nothing", 'module "shop" has no flow any more'),
    ],
)
def test_a_source_that_was_lost_removes_nothing(
    session: Session, source: str, message: str
) -> None:
    session.deploy(SHOP, "shop")
    with pytest.raises(psycopg.Error) as caught:
        session.run("select pgflow_worker.deploy('shop', %s)", source)
    diag = caught.value.diag
    assert (diag.sqlstate, diag.message_primary) == ("PW002", message)
    assert diag.message_hint == (
        "Has \\set source found the file? To take a module away: "
        "select pgflow_worker.undeploy('shop');"
    )
    assert session.rows("select flow_slug from pgflow_worker.flows") == [("shop",)]


def test_the_name_of_a_file_is_no_modules_name(session: Session) -> None:
    diag = refusal(session, SHOP, "shop.py")
    assert (diag.sqlstate, diag.message_primary) == ("PW007", '"shop.py" is the name of a file')
    assert diag.message_hint == 'A module\'s name is without .py: "shop".'


def test_former_versions_are_kept(session: Session) -> None:
    session.deploy(SHOP)
    session.deploy(SHOP + "    # changed\n")
    assert session.rows("select version, current from pgflow_worker.modules order by 1") == [
        (1, False),
        (2, True),
    ]
    assert session.value("select version from pgflow_worker.flows") == 2


def rollback(session: Session, arguments: str) -> list[Any]:
    return session.rows(f"select * from pgflow_worker.rollback_deploy({arguments})")


def test_a_rollback_deploys_the_former_version_as_a_new_one(session: Session) -> None:
    source = """
        flow = Flow("f", max_attempts={number})

        @flow.step
        def step(flow_input): return {number}
    """
    for number in (1, 2, 3):
        session.deploy(source.format(number=number))
    changed = ["max_attempts: 3 -> 2"]
    assert rollback(session, "'flows_of_test', dry_run => true") == [("f", "updated", changed)]
    assert rollback(session, "'flows_of_test'") == [("f", "updated", changed)]
    session.start("f")
    session.work("f")
    assert session.value("select output ->> 'step' from pgflow.runs") == "2"
    assert session.value("select version from pgflow_worker.flows") == 4
    # Once more takes the rollback back; and there is every other version.
    assert rollback(session, "'flows_of_test'") == [("f", "updated", ["max_attempts: 2 -> 3"])]
    assert rollback(session, "'flows_of_test', 1") == [("f", "updated", ["max_attempts: 3 -> 1"])]


def test_a_rollback_brings_an_undeployed_module_back(session: Session) -> None:
    session.deploy(SHOP)
    session.run("select pgflow_worker.undeploy('flows_of_test')")
    assert rollback(session, "'flows_of_test'") == [("shop", "verified", [])]


def test_a_rollback_over_other_steps_is_refused_as_a_deploy_is(session: Session) -> None:
    session.deploy(SHOP)
    session.deploy(SHOP + "    @flow.step\n    def more(ship): pass\n", allow_data_loss=True)
    with pytest.raises(psycopg.Error) as caught:
        rollback(session, "'flows_of_test'")
    assert caught.value.sqlstate == "PW003"
    assert session.value("select version from pgflow_worker.flows") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("'flows_of_test'", 'module "flows_of_test" has no former version'),
        ("'flows_of_test', 7", 'module "flows_of_test" has no version 7'),
        ("'unknown'", 'module "unknown" has no former version'),
    ],
)
def test_a_rollback_to_nowhere(session: Session, arguments: str, message: str) -> None:
    session.deploy(SHOP)
    with pytest.raises(psycopg.Error) as caught:
        rollback(session, arguments)
    assert (caught.value.sqlstate, caught.value.diag.message_primary) == ("PW007", message)


def test_a_module_that_was_stored_without_its_source_is_rolled_back_too(session: Session) -> None:
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    session.rows("select pgflow_worker.deploy('typing_extensions')")
    session.rows("select pgflow_worker.deploy('typing_extensions', 'TEXT = 1')")
    assert rollback(session, "'typing_extensions'") == [(None, "stored", [])]
    assert session.rows(
        "select length(source) > 1000 from pgflow_worker.modules order by version"
    ) == [(True,), (False,), (True,)]


def test_stored_modules_import_each_other(session: Session) -> None:
    assert session.deploy("RATE = 2", "rates") == [(None, "stored", [])]
    session.deploy("""
        from rates import RATE
        import rates
        flow = Flow("f")

        @flow.step
        def step():
            import rates as again
            return [RATE, rates.RATE, again.RATE]
    """)
    session.start("f")
    session.work("f")
    session.deploy("RATE = 3", "rates")
    session.start("f")
    session.work("f")
    assert session.rows("select output from pgflow.step_tasks order by message_id") == [
        ([2, 2, 2],),
        ([3, 3, 3],),
    ]


def test_a_module_that_breaks_another_is_refused(session: Session) -> None:
    session.deploy("RATE = 2", "rates")
    session.deploy(
        'import rates\nflow = Flow("f", timeout=rates.RATE + 1)\n@flow.step\ndef a(): pass\n'
    )
    diag = refusal(session, "RATES = 2", "rates")
    assert diag.sqlstate == "PW005"
    assert diag.message_primary is not None
    assert diag.message_primary.startswith(
        'module "flows_of_test" cannot be imported: AttributeError: '
    )
    # Its flows follow a change that does not break them.
    assert session.deploy("RATE = 5", "rates") == [("f", "updated", ["timeout: 3 -> 6"])]


def test_a_module_that_fails_leaves_everything_as_it_was(session: Session) -> None:
    session.deploy(SHOP)
    for broken in (SHOP + "\n    raise ValueError('broken')\n", "def", "raise SystemExit(3)"):
        diag = refusal(session, broken)
        assert diag.sqlstate == "PW005"
        assert diag.message_primary is not None
        assert diag.message_primary.startswith('module "flows_of_test" cannot be imported: ')
        assert diag.message_hint == "Mend the module and deploy it again."
        assert session.deploy(SHOP) == [("shop", "verified", [])]
    assert session.value("select count(*) from pgflow_worker.modules") == 1


def test_the_traceback_shows_the_line(session: Session) -> None:
    diag = refusal(session, "def rate():\n    return 1 / 0\nrate()\n")
    assert diag.message_detail is not None
    assert 'File "flows_of_test.py", line 3, in rate\n    return 1 / 0' in diag.message_detail
    assert "pgflow_worker/modules.py" not in diag.message_detail


def test_a_missing_package_says_where_it_could_come_from(session: Session) -> None:
    diag = refusal(session, "import no_such_package")
    assert diag.message_primary == (
        'module "flows_of_test" cannot be imported: '
        "ModuleNotFoundError: No module named 'no_such_package'"
    )
    assert "set_environment" in (diag.message_hint or "")


def test_a_wrong_flow_is_named(session: Session) -> None:
    diag = refusal(
        session,
        'flow = Flow("f")\n@flow.step\ndef a(websit): pass\n@flow.step\ndef website(): pass\n',
    )
    assert diag.sqlstate == "PW006"
    assert (
        diag.message_primary == 'flow "f", step "a": parameter "websit" names no step of this flow'
    )
    assert diag.message_hint == 'Did you mean "website"?'


@pytest.mark.parametrize("name", ["json", "email.mime", "os", "pgflow_worker"])
def test_names_that_python_has_already_are_refused(session: Session, name: str) -> None:
    diag = refusal(session, SHOP, name)
    assert diag.sqlstate == "PW007"
    problem = (
        "exists already in this server's Python" if name == "pgflow_worker" else "is part of Python"
    )
    assert diag.message_primary == f'module "{name}" {problem}'


@pytest.mark.parametrize("name", ["", "a-b", "../a", "a.py b", "1a", "a'; drop table x; --"])
def test_names_that_are_none_are_refused(session: Session, name: str) -> None:
    diag = refusal(session, SHOP, name)
    assert diag.sqlstate == "PW007"
    assert diag.message_primary == f'"{name}" is not a name for a module'


def test_another_modules_flow_is_refused(session: Session) -> None:
    session.deploy(SHOP)
    diag = refusal(session, SHOP, "second")
    assert diag.sqlstate == "PW007"
    assert diag.message_primary == (
        'flow "shop" of module "second" belongs to module "flows_of_test"'
    )


@pytest.mark.parametrize("where", ["the same module", "another module"])
def test_flows_that_differ_by_case_are_refused(session: Session, where: str) -> None:
    twin = '\n    twin = Flow("Shop")\n    @twin.step\n    def a(): pass\n'
    if where == "the same module":
        diag = refusal(session, SHOP + twin)
    else:
        session.deploy(SHOP)
        diag = refusal(session, twin, "second")
    assert diag.sqlstate == "PW007"
    assert diag.message_primary == 'flow "Shop" and flow "shop" differ by case only'


def test_two_flows_with_one_slug_are_refused(session: Session) -> None:
    diag = refusal(session, SHOP + '\n    twin = Flow("shop")\n    @twin.step\n    def a(): pass\n')
    assert diag.sqlstate == "PW007"
    assert diag.message_primary == 'flow "shop" is defined twice'


def test_an_importable_module_is_stored_without_its_source(session: Session) -> None:
    # site-packages of this very environment, and a module of it that has no flows.
    session.run("select pgflow_worker.set_environment(%s)", sys.prefix)
    assert session.rows(
        "select flow_slug, status from pgflow_worker.deploy('typing_extensions')"
    ) == [(None, "stored")]
    with pytest.raises(psycopg.Error) as caught:
        session.rows("select * from pgflow_worker.deploy('json')")
    assert caught.value.sqlstate == "PW007"
    with pytest.raises(psycopg.Error) as caught:
        session.rows("select * from pgflow_worker.deploy('nowhere')")
    assert caught.value.sqlstate == "PW002"
    assert caught.value.diag.message_primary == 'no module "nowhere" can be imported here'


def test_only_the_extensions_owner_may_deploy(
    session: Session, connect: Callable[..., Connection]
) -> None:
    session.run("drop role if exists stranger")
    session.run("create role stranger login")
    try:
        session.run("grant usage on schema pgflow_worker to stranger")
        stranger = Session(connect(user="stranger"))
        for statement in (
            "select * from pgflow_worker.deploy('m', '')",
            "select pgflow_worker._deploy('m', '', false, false)",
            "select pgflow_worker.undeploy('m')",
            "select pgflow_worker.set_environment('/')",
            "select pgflow_worker._set_environment('/')",
            "select pgflow_worker._load()",
            "select pgflow_worker._load_secrets()",
            "select pgflow_worker.set_executor('f', 'tcp://10.0.0.7:8786')",
            "select pgflow_worker._set_executor('f', 'tcp://10.0.0.7:8786', null, true)",
            "select pgflow_worker.set_secrets('/')",
            "select pgflow_worker._set_secrets('/')",
            "select source from pgflow_worker.modules",
            "insert into pgflow_worker.modules values ('m', 1, '')",
            "call pgflow_worker._work('f', 1, 1, 'batch', 1, null)",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                stranger.run(statement)
        stranger.connection.close()
    finally:
        session.run("drop owned by stranger; drop role stranger")


def test_undeploy_forgets_the_module_and_keeps_the_runs(session: Session) -> None:
    session.deploy(SHOP)
    session.start("shop")
    assert session.value("select pgflow_worker.undeploy('flows_of_test')") == 1
    with pytest.raises(psycopg.Error, match='flow "shop" is not deployed'):
        session.work("shop")
    assert session.value("select count(*) from pgflow.runs") == 1
    with pytest.raises(psycopg.Error) as caught:
        session.value("select pgflow_worker.undeploy('flows_of_test')")
    assert caught.value.sqlstate == "PW007"
    assert caught.value.diag.message_hint == "Deployed modules: none."
    assert session.deploy(SHOP) == [("shop", "verified", [])]
    assert session.value("select max(version) from pgflow_worker.modules") == 2


def test_undeploy_waits_for_no_worker(
    session: Session, other: Session, background: Background
) -> None:
    session.deploy(SHOP)
    call = background(other.work, "shop", mode="wait", max_duration="1 second")
    session.until("select count(*) = 1 from pg_locks where locktype = 'advisory'")
    with pytest.raises(psycopg.Error, match='flow "shop" has a running worker') as caught:
        session.value("select pgflow_worker.undeploy('flows_of_test')")
    assert caught.value.sqlstate == "PW009"
    call.result()


def test_a_deploy_that_is_rolled_back_has_not_been(session: Session) -> None:
    session.deploy(SHOP)
    with session.connection.transaction(force_rollback=True):
        session.deploy(SHOP.replace("return 1", "return [1, 2]"))
    session.start("shop")
    session.work("shop")
    assert "not a list" in session.value("select error_message from pgflow.step_tasks")


def test_the_compiled_sql_deploys(session: Session, tmp_path: Path) -> None:
    (tmp_path / "a_shop.py").write_text(
        'from z_rates import RATE\nfrom pgflow_worker import Flow\nflow = Flow("shop")\n'
        '@flow.step\ndef a():\n    """$python$"""\n    return RATE\n'
    )
    (tmp_path / "z_rates.py").write_text("RATE = 7\n")
    statements = compile_modules(sorted(tmp_path.glob("*.py")))
    session.connection.execute(statements.encode())
    session.start("shop")
    session.work("shop")
    assert session.value("select output from pgflow.step_tasks") == 7


def test_deploys_wait_for_each_other(
    session: Session, other: Session, connect: Callable[..., Connection], background: Background
) -> None:
    with session.connection.transaction():
        session.deploy(SHOP)
        call = background(other.deploy, SHOP)
        Session(connect()).until(WAITING, 1)
    assert call.result() == [("shop", "verified", [])]


def test_deploying_again_after_work_in_the_same_session(session: Session) -> None:
    for status in ("compiled", "verified"):
        assert session.deploy(CHAIN)[0][1] == status
        session.start("chain", {"n": 1})
        assert counts(session.work("chain", mode="drain")) == {"completed": 3}


def test_a_deploy_leaves_no_modules_in_the_session(session: Session) -> None:
    session.run("""
        create function modules() returns text[] language plpython3u as $$
            import sys
            return sorted(name for name in sys.modules if name.startswith("_pgflow_worker_"))
        $$
    """)
    session.deploy(CHAIN)
    session.start("chain", {"n": 1})
    session.work("chain")
    before = session.value("select modules()")
    assert len(before) == 1
    session.deploy(CHAIN + "    # changed\n", dry_run=True)
    with pytest.raises(psycopg.Error):
        session.deploy("import flows_of_test; raise ValueError", "broken")
    assert session.value("select modules()") == before

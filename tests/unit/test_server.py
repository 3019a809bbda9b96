"""What the SQL functions call: answers and errors as JSON."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pgflow_worker
from pgflow_worker import environment, server
from pgflow_worker.errors import DatabaseError
from pgflow_worker.modules import StoredModules
from tests.unit.fakes import SESSION, Answer, FakeFlags, FakePlpy, SPIError

FLOW = """
from pgflow_worker import Flow
flow = Flow("greet")
@flow.step
def hello(flow_input):
    return "Hello"
"""

# What the extension's tables hold.
EMPTY: dict[str, Answer] = {"as revision": [{"revision": ""}]}
GREETINGS: dict[str, Answer] = {
    "as revision": [{"revision": "greetings 1"}],
    "select module, source from": [{"module": "greetings", "source": FLOW}],
    "select flow_slug, module from": [{"flow_slug": "greet", "module": "greetings"}],
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A session that has loaded nothing."""
    modules, path = set(sys.modules), list(sys.path)
    monkeypatch.setattr(server, "_modules", StoredModules({}))
    monkeypatch.setattr(server, "_flow_modules", {})
    monkeypatch.setattr(server, "_settings", {})
    # A backend's variables are not in this program.
    monkeypatch.setattr("pgflow_worker.process.ServerFlags", FakeFlags)
    yield
    server._modules.forget()
    environment.activate(None)
    assert sys.path == path
    assert not [n for n in set(sys.modules) - modules if n.startswith("_pgflow_worker_")]


def load(plpy: FakePlpy, version: str = pgflow_worker.__version__) -> Any:
    return json.loads(server.load(plpy, version, True))


def raised(answer: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer)["raise"]
    assert set(error) <= {"sqlstate", "message", "detail", "hint"}
    return error


def work_batch(plpy: FakePlpy, flow_slug: str) -> str:
    return server.work_batch(plpy, flow_slug, 10, 5, False)


def recorded(plpy: FakePlpy) -> list[dict[str, Any]]:
    """The reports that were stored."""
    return [
        json.loads(str(args[1]))
        for sql, args in plpy.executed
        if sql.startswith("insert into pgflow_worker.invocations")
    ]


# load()


def test_files_of_another_version_are_refused() -> None:
    plpy = FakePlpy()
    assert load(plpy, "99.0")["raise"] == {
        "sqlstate": "PW010",
        "message": f"the extension's version is 99.0, that of its Python files "
        f"{pgflow_worker.__version__}",
        "detail": None,
        "hint": "Run make install again.",
    }
    assert plpy.events == []


def test_loading_makes_the_stored_flows_known() -> None:
    assert load(FakePlpy(GREETINGS)) == {}
    assert server._flow("greet").slug == "greet"


def test_unchanged_modules_stay_loaded_and_changed_ones_do_not() -> None:
    load(FakePlpy(GREETINGS))
    first = server._flow("greet")
    load(FakePlpy(GREETINGS))
    assert server._flow("greet") is first
    changed = [{"module": "greetings", "source": FLOW + "\n"}]
    load(FakePlpy(GREETINGS | {"select module, source from": changed}))
    assert server._flow("greet") is not first


def test_loading_activates_the_environment(tmp_path: Path) -> None:
    packages = tmp_path / "lib" / f"python{environment.VERSION}" / "site-packages"
    packages.mkdir(parents=True)
    (tmp_path / "pyvenv.cfg").touch()
    setting = {"from pgflow_worker.settings": [{"name": "environment", "value": str(tmp_path)}]}
    load(FakePlpy(EMPTY | setting))
    assert str(packages) in sys.path
    load(FakePlpy(EMPTY))
    assert str(packages) not in sys.path


def test_an_environment_that_is_gone_is_an_error() -> None:
    setting = {"from pgflow_worker.settings": [{"name": "environment", "value": "/missing"}]}
    error = load(FakePlpy(EMPTY | setting))["raise"]
    assert error["sqlstate"] == "PW008"


# work() and work_batch()


def test_a_flow_that_is_not_deployed() -> None:
    plpy = FakePlpy(GREETINGS)
    load(plpy)
    error = raised(work_batch(plpy, "great"))
    assert error["sqlstate"] == "PW001"
    assert error["message"] == 'flow "great" is not deployed'


def test_a_call_that_fails_leaves_a_row() -> None:
    plpy = FakePlpy(GREETINGS)
    load(plpy)
    server.work(plpy, "great", 10, 5, "drain", 55.0)
    [report] = recorded(plpy)
    assert (report["status"], report["flow_slug"], report["mode"]) == ("error", "great", "drain")
    assert (report["error"], report["sqlstate"]) == ('flow "great" is not deployed', "PW001")
    assert plpy.events.index("[commit]") >= 0
    assert plpy.events[-1] == "[commit]"


def test_a_module_that_cannot_be_imported_any_more() -> None:
    source = [{"module": "greetings", "source": "import no_such_package"}]
    plpy = FakePlpy(GREETINGS | {"select module, source from": source})
    load(plpy)
    error = raised(work_batch(plpy, "greet"))
    assert error["sqlstate"] == "PW005"
    assert error["message"].startswith('module "greetings" cannot be imported: ModuleNotFoundError')
    assert 'File "greetings.py", line 1' in error["detail"]
    assert "set_environment()" in error["hint"]


def test_a_module_that_no_longer_defines_the_flow() -> None:
    source = [{"module": "greetings", "source": ""}]
    plpy = FakePlpy(GREETINGS | {"select module, source from": source})
    load(plpy)
    assert raised(work_batch(plpy, "greet")) == {
        "sqlstate": "PW001",
        "message": 'module "greetings" no longer defines flow "greet"',
        "detail": None,
        "hint": "Deploy the module again.",
    }


def test_an_error_that_cannot_be_recorded_is_told_nevertheless() -> None:
    plpy = FakePlpy({**GREETINGS, "pgflow_worker.invocations": SPIError("denied", "42501")})
    load(plpy)
    assert raised(work_batch(plpy, "great"))["sqlstate"] == "PW001"


@pytest.mark.parametrize("text", ["nul \\0", "surrogate \\ud800"])
def test_an_error_with_a_text_that_postgresql_cannot_store(text: str) -> None:
    source = [{"module": "greetings", "source": f"raise ValueError('{text}')"}]
    plpy = FakePlpy(GREETINGS | {"select module, source from": source})
    load(plpy)
    answer = work_batch(plpy, "greet")
    assert raised(answer)["sqlstate"] == "PW005"
    assert "\\u0000" not in answer
    assert len(recorded(plpy)) == 1


def test_a_wrong_flow_with_a_text_that_postgresql_cannot_store() -> None:
    source = "from pgflow_worker import Flow\nFlow('\\ud800')"
    error = raised(server.deploy(FakePlpy(EMPTY), "my_flows", source, False, False))
    assert error["sqlstate"] == "PW006"
    assert error["message"].startswith('flow "\\ud800": a slug has letters')


def test_a_cancel_keeps_its_sqlstate() -> None:
    plpy = FakePlpy(GREETINGS | {"_slots($1)": SPIError("canceling statement", "57014")})
    load(plpy)
    error = raised(work_batch(plpy, "greet"))
    assert (error["sqlstate"], error["message"]) == ("57014", "canceling statement")


def test_a_database_error_keeps_its_fields() -> None:
    plpy = FakePlpy(GREETINGS | {"_slots($1)": SPIError("denied", "42501", "Detail.", "Hint.")})
    load(plpy)
    assert raised(work_batch(plpy, "greet")) == {
        "sqlstate": "42501",
        "message": "denied",
        "detail": "Detail.",
        "hint": "Hint.",
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("used", [False, True])
def test_after_an_event_loop_the_modules_that_may_keep_it_are_loaded_anew(
    used: bool, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StubWorker:
        has_used_event_loop = used

        def __init__(self, *args: object, **options: object) -> None: ...

        def run(self) -> None:
            if fails:
                raise DatabaseError("trouble", "53100")

    monkeypatch.setattr(server, "Worker", StubWorker)
    plpy = FakePlpy(GREETINGS)
    load(plpy)
    first = server._flow("greet")
    assert ("raise" in json.loads(work_batch(plpy, "greet"))) is fails
    load(plpy)
    assert (server._flow("greet") is first) is not used


@pytest.mark.parametrize("flow_slug", ["greet", "great"])
def test_a_session_gets_its_settings_back_after_a_call_that_fails(flow_slug: str) -> None:
    plpy = FakePlpy(GREETINGS | {"_slots($1)": SPIError("denied", "42501")})
    load(plpy)
    assert "raise" in json.loads(server.work(plpy, flow_slug, 10, 5, "drain", 55.0))
    assert plpy.settings == SESSION


def test_work_inside_a_transaction_is_told_what_to_do_and_leaves_no_row() -> None:
    plpy = FakePlpy(GREETINGS)
    load(plpy)
    plpy.answers["[commit]"] = SPIError("invalid transaction termination", "2D000")
    error = raised(server.work(plpy, "greet", 10, 5, "drain", 55.0))
    assert error["sqlstate"] == "PW011"
    assert "work_batch" in error["hint"]
    assert recorded(plpy) == []


def test_the_import_of_a_module_that_hangs_can_be_canceled(canceled: None) -> None:
    plpy = FakePlpy(GREETINGS | {"select module, source from": HANGING})
    load(plpy)
    error = raised(work_batch(plpy, "greet"))
    assert (error["sqlstate"], error["message"]) == CANCELED
    [report] = recorded(plpy)
    assert (report["error"], report["sqlstate"]) == CANCELED[::-1]


def test_handlers_have_the_memory_that_is_set() -> None:
    source = [{"module": "greetings", "source": FLOW + "kept = bytearray(2 ** 30)"}]
    settings = {"from pgflow_worker.settings": [{"name": "memory_mb", "value": "64"}]}
    plpy = FakePlpy(GREETINGS | {"select module, source from": source} | settings)
    load(plpy)
    assert raised(work_batch(plpy, "greet"))["message"] == (
        'module "greetings" cannot be imported: MemoryError'
    )


def test_another_operating_system_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plpy = FakePlpy(GREETINGS)
    load(plpy)
    monkeypatch.setattr(sys, "platform", "darwin")
    error = raised(work_batch(plpy, "greet"))
    assert error["sqlstate"] == "PW012"
    assert error["message"] == "pgflow_worker needs a server on Linux"


def test_the_process_is_as_it_was_after_a_call() -> None:
    now = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    plpy = FakePlpy(GREETINGS | {"_slots($1)": SPIError("denied", "42501")})
    load(plpy)
    server.work(plpy, "greet", 10, 5, "drain", 55.0)
    work_batch(plpy, "greet")
    server.deploy(plpy, "my_helpers", "answer = 42", False, False)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == now


# deploy() and set_environment()


HANGING = [{"module": "greetings", "source": "while True: pass"}]
CANCELED = "57014", "canceling statement due to user request"


@pytest.fixture
def canceled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is canceled when it has begun."""
    flags = FakeFlags()
    flags.cancel = True
    monkeypatch.setattr("pgflow_worker.process.ServerFlags", lambda: flags)


def test_the_deploy_of_a_module_that_hangs_can_be_canceled(canceled: None) -> None:
    error = raised(server.deploy(FakePlpy(EMPTY), "my_flows", "while True: pass", False, False))
    assert (error["sqlstate"], error["message"]) == CANCELED


def test_deploying_a_module_without_flows() -> None:
    plpy = FakePlpy(EMPTY)
    answer = json.loads(server.deploy(plpy, "my_helpers", "answer = 42", False, False))
    assert answer == {"deployed": [{"flow_slug": None, "status": "stored", "changes": []}]}


def test_deploying_a_wrong_module() -> None:
    error = raised(server.deploy(FakePlpy(EMPTY), "my-helpers", "answer = 42", False, False))
    assert error["sqlstate"] == "PW007"


def test_an_environment_is_checked_before_it_is_noted() -> None:
    plpy = FakePlpy(EMPTY)
    error = raised(server.set_environment(plpy, "relative/path"))
    assert error["sqlstate"] == "PW008"
    assert plpy.events == []


def test_no_environment_takes_the_setting_away() -> None:
    plpy = FakePlpy(EMPTY)
    assert server.set_environment(plpy, None) == "{}"
    assert ("delete from pgflow_worker.settings where name = $1", ["environment"]) in plpy.executed

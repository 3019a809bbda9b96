"""Code that is sent by value: imported under names of its own."""

import importlib
import json
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pgflow_worker import boot
from pgflow_worker.modules import imported
from pgflow_worker.offload import Code

FLOW = """
from pgflow_worker import Context, Fail, Flow
import pgflow_worker.errors
flow = Flow("flow")
@flow.step(thread=True)
def step(flow_input, ctx: Context):
    if flow_input is None:
        raise Fail("nothing")
    return [VALUE, flow_input, pgflow_worker.errors.__name__, Flow.__module__]
"""


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    modules, finders = dict(sys.modules), list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in sys.modules.keys() - modules.keys():
        if "_pgflow_worker_" in name:
            del sys.modules[name]


class Worker:
    """Stands for the Dask worker, which needs one."""

    address = "tcp://10.0.0.8:1"

    def __init__(self, topic: str) -> None:
        pass

    def tell_begun(self) -> None: ...
    def is_first(self) -> bool:
        return True

    def is_wanted(self) -> bool:
        return True


def code_of(**modules: str) -> Code:
    return Code("flow", "flow_module", modules)


def load(code: Code) -> ModuleType:
    expression, names = code.to_load_and_run("")
    assert expression.startswith("exec(compile(boot")
    space: dict[str, Any] = dict(names)
    exec(space["boot"], space)
    remote: ModuleType = space["load"](space["name"], space["code"])
    remote._Worker = Worker  # type: ignore[attr-defined]
    return remote


def run(remote: ModuleType, run_input: object, max_bytes: int = 1000) -> tuple[Any, str]:
    request = {
        "topic": "topic",
        "step_slug": "step",
        "input": "{}",
        "run_input": json.dumps(run_input),
        "context": {
            "run_id": "12345678-1234-5678-1234-567812345678",
            "task_index": 0,
            "attempt": 1,
            "max_attempts": 3,
            "timeout": 3,
        },
        "secrets": {},
        "max_bytes": max_bytes,
    }
    known, output = remote.run(json.dumps(request))
    return json.loads(known), output


def test_the_package_has_another_name_there() -> None:
    code = code_of(flow_module=FLOW.replace("VALUE", "1"))
    remote = load(code)
    assert remote.__name__ == f"{code.name}.remote"
    known, output = run(remote, "input")
    assert json.loads(output) == [1, "input", f"{code.name}.errors", f"{code.name}.flow"]
    assert known["log"] == ""
    assert known["duration_ms"] >= 0
    assert importlib.import_module("pgflow_worker.flow").__name__ == "pgflow_worker.flow"


def test_failures_are_told_as_in_the_server() -> None:
    known, output = run(load(code_of(flow_module=FLOW.replace("VALUE", "1"))), None)
    assert output == ""
    assert known["failure"]["error"] == "nothing (flow_module.py:8, in step)"
    assert known["failure"]["final"] is True
    assert f"File {'flow_module.py'!r}".replace("'", '"') in known["failure"]["traceback"]
    assert "attempt.py" not in known["failure"]["traceback"]


def test_a_result_that_is_too_long() -> None:
    known, output = run(load(code_of(flow_module=FLOW.replace("VALUE", "1"))), "input", max_bytes=5)
    assert output == ""
    assert known["failure"]["error"].startswith('result of step "step" takes ')


def test_two_versions_do_not_meet() -> None:
    codes = [code_of(flow_module=FLOW.replace("VALUE", value)) for value in "12"]
    remotes = [load(code) for code in codes]
    assert [json.loads(run(remote, None or 0)[1])[0] for remote in remotes] == [1, 2]


def test_two_flows_of_one_module_do_not_meet() -> None:
    modules = {"flow_module": FLOW}
    assert Code("a", "flow_module", modules).name != Code("b", "flow_module", modules).name
    assert Code("a", "flow_module", modules).name == Code("a", "flow_module", modules).name


def test_who_has_not_got_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distributed.get_worker", lambda: Worker("topic"))
    code = code_of(flow_module=FLOW.replace("VALUE", "1"))
    expression, names = code.to_run("{}")
    assert eval(expression, dict(names)) == "tcp://10.0.0.8:1"
    load(code).run = lambda request: f"ran {request}"  # type: ignore[attr-defined]
    assert eval(expression, dict(names)) == "ran {}"


def test_old_versions_are_forgotten() -> None:
    codes = [code_of(flow_module=FLOW.replace("VALUE", str(n))) for n in range(boot.KEPT + 2)]
    for code in codes:
        run(load(code), "input")
    there = [any(code.name in name for name in sys.modules) for code in codes]
    assert there == [False, False] + [True] * boot.KEPT


def test_what_runs_is_not_forgotten() -> None:
    codes = [code_of(flow_module=FLOW.replace("VALUE", str(n))) for n in range(boot.KEPT + 2)]
    first = load(codes[0])
    first.running = 1  # type: ignore[attr-defined]
    second = load(codes[1])
    run(second, "input")
    for code in codes[2:]:
        load(code)
        run(second, "input")  # which makes it the one used last
    there = [any(code.name in name for name in sys.modules) for code in codes]
    assert there == [True, True, False, False] + [True] * (boot.KEPT - 2)
    assert "_pgflow_worker_" in first._run.__module__


def test_an_examination_leaves_nothing_behind() -> None:
    code = code_of(flow_module=FLOW.replace("VALUE", "1"))
    expression, names = code.to_examine()
    space = dict(names)
    with pytest.MonkeyPatch.context() as patch:
        worker = SimpleNamespace(state=SimpleNamespace(total_resources={"GPU": 1}))
        patch.setattr("distributed.get_worker", lambda: worker)
        assert eval(expression, space) == (None, {"GPU": 1})
        assert not any(code.name in name for name in sys.modules)
        load(code)
        assert eval(expression, dict(names)) == (None, {"GPU": 1})
        assert any(code.name in name for name in sys.modules)


def test_only_what_the_flow_imports_goes_along() -> None:
    modules = {
        "flow_module": FLOW + "\ndef later():\n    from package import part\n    import direct\n",
        "package.part": "import direct",
        "direct": "import flow_module",
        "other": "VALUE = 1",
    }
    assert set(imported("flow_module", modules)) == {"flow_module", "package.part", "direct"}
    assert set(imported("direct", modules | {"flow_module": "("})) == {"direct", "flow_module"}
    names = [
        Code("flow", "flow_module", modules | {"other": text}).name for text in ("", "changed")
    ]
    assert names[0] == names[1]


def test_a_module_that_cannot_be_imported() -> None:
    known, _ = run(load(code_of(flow_module="import there_is_no_such_module")), "input")
    assert known["refused"] == (
        'module "flow_module" cannot be imported: ModuleNotFoundError: No module named '
        "'there_is_no_such_module' on Dask worker tcp://10.0.0.8:1: the cluster's machines need "
        "what the flow's modules import"
    )


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 2, "final", 0))
    with pytest.raises(RuntimeError, match=r"^Python 3\.9\.2 is too old: it takes 3\.11$"):
        boot.load("_pgflow_worker_x", zlib.compress(b"{}"))

"""The package as a whole: what it offers, and what its import costs."""

import subprocess
import sys
from pathlib import Path

import pgflow_worker


def test_what_it_offers() -> None:
    assert sorted(pgflow_worker.__all__) == [
        "Context",
        "DatabaseError",
        "Fail",
        "Flow",
        "Retry",
        "Snooze",
        "Transaction",
        "secret",
    ]
    for name in pgflow_worker.__all__:
        assert getattr(pgflow_worker, name).__doc__


def test_the_example_of_its_docstring() -> None:
    assert pgflow_worker.__doc__ is not None
    example = pgflow_worker.__doc__.split("\n\n", 1)[1]
    namespace: dict[str, object] = {"__name__": "example"}
    exec(compile(example, "example.py", "exec", dont_inherit=True), namespace)
    flow = namespace["flow"]
    assert isinstance(flow, pgflow_worker.Flow)
    assert flow.steps["hello"].call({}, {"name": "Ada"}, None, None) == "Hello, Ada"


def test_it_is_typed() -> None:
    assert Path(pgflow_worker.__file__).with_name("py.typed").is_file()


def test_a_worker_starts_without_what_it_may_not_need() -> None:
    # Every firing of pg_cron is a new interpreter, which pays for every import.
    unneeded = {"asyncio", "ctypes", "logging", "argparse", "difflib", "pgflow_worker.secrets"}
    script = (
        f"import sys; sys.path.insert(0, {str(Path(pgflow_worker.__file__).parents[1])!r})\n"
        "import pgflow_worker.server, pgflow_worker.worker\n"
        f"print(sorted({unneeded} & set(sys.modules)))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-c", script], check=True, capture_output=True, text=True
    )
    assert loaded.stdout == "[]\n"

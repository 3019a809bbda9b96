"""Contestants in processes of their own, so that they share nothing with the benchmark.

A module of bench/external implements `Job`. It is run as `python -m bench.child MODULE ACTION ...`.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, cast

from bench.cluster import Database

READY, GO, DONE = "ready", "go", "done"


class Job(Protocol):
    """What a module of bench/external has. `kind` and `number` are the contestant's arguments."""

    def install(self, url: str) -> None:
        """Create the schema."""

    def enqueue(self, url: str, kind: str, number: int) -> None:
        """Put the jobs into the database, without running any."""

    def work(self, url: str, kind: str, number: int, go: Callable[[], None]) -> None:
        """Get ready, call `go`, run all jobs, return. The clock runs from `go` to the return."""


class Child:
    """A module of bench/external and its arguments."""

    def __init__(self, module: str, database: Database, kind: str = "", number: int = 0) -> None:
        self._module = module
        self._arguments = [database.url, kind, str(number)]
        self._environment = database.environment

    def _command(self, action: str) -> list[str]:
        return [sys.executable, "-m", "bench.child", self._module, action, *self._arguments]

    def run(self, action: str) -> None:
        """Run `install` or `enqueue`."""
        subprocess.run(
            self._command(action), env=self._environment, stdout=subprocess.DEVNULL, check=True
        )

    @contextmanager
    def ready(self) -> Iterator[Callable[[], None]]:
        """Start `work`; what is yielded lets it go, and returns when it has finished."""
        with subprocess.Popen(
            self._command("work"),
            env=self._environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdin
            assert process.stdout
            requests, answers = process.stdin, process.stdout

            def expect(answer: str) -> None:
                line = answers.readline().strip()
                if line != answer:
                    raise ChildProcessError(f"{self._module} said {line!r} instead of {answer!r}")

            def go() -> None:
                requests.write(f"{GO}\n")
                requests.flush()
                expect(DONE)

            try:
                expect(READY)
                yield go
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise ChildProcessError(f"{self._module} ended with {process.returncode}")


def main(module: str, action: str, url: str, kind: str, number: str) -> None:
    # Only this conversation goes to standard output, whatever a library may print.
    answers, sys.stdout = sys.stdout, sys.stderr

    def say(answer: str) -> None:
        answers.write(f"{answer}\n")
        answers.flush()

    def go() -> None:
        say(READY)
        if sys.stdin.readline().strip() != GO:
            raise SystemExit("the benchmark has gone")

    job = cast(Job, importlib.import_module(f"bench.external.{module}"))
    if action == "install":
        job.install(url)
    elif action == "enqueue":
        job.enqueue(url, kind, int(number))
    else:
        job.work(url, kind, int(number), go)
        say(DONE)


if __name__ == "__main__":
    main(*sys.argv[1:])

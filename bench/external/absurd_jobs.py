"""Absurd: tasks that do nothing, a synchronous worker with the default concurrency of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from absurd_sdk import Absurd

QUEUE = "default"


def install(url: str) -> None:
    # libpq's environment says where.
    tool = Path(sys.executable).parent / "absurdctl"
    subprocess.run([tool, "init"], check=True)
    subprocess.run([tool, "create-queue", QUEUE], check=True)
    del url


def enqueue(url: str, kind: str, number: int) -> None:
    app = Absurd(url, queue_name=QUEUE)
    for _ in range(number):
        app.spawn(kind, {}, queue=QUEUE)
    app.close()


def work(url: str, kind: str, number: int, go: Callable[[], None]) -> None:
    app = Absurd(url, queue_name=QUEUE)
    left = number

    def finished() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            app.stop_worker()  # after this task

    def one_step(params: object, context: object) -> int:  # noqa: ARG001
        finished()
        return 1

    def chain(params: object, context: object) -> int:  # noqa: ARG001
        for name in ("first", "second", "third"):
            context.step(name, lambda: 1)  # type: ignore[attr-defined]
        finished()
        return 1

    app.register_task(kind)({"one_step": one_step, "chain": chain}[kind])
    go()
    app.start_worker()
    app.close()

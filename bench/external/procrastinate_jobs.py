"""Procrastinate: async tasks that do nothing, one worker with the default concurrency of one.

It has no workflows, so there is no chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import procrastinate


async def _nothing() -> int:
    return 1


def _app(url: str) -> tuple[procrastinate.App, procrastinate.tasks.Task]:
    app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url))
    return app, app.task(_nothing, name="nothing")


def install(url: str) -> None:
    async def apply() -> None:
        app, _ = _app(url)
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    asyncio.run(apply())


def enqueue(url: str, kind: str, number: int) -> None:  # noqa: ARG001
    async def defer() -> None:
        app, task = _app(url)
        async with app.open_async():
            await task.batch_defer_async(*({} for _ in range(number)))

    asyncio.run(defer())


def work(url: str, kind: str, number: int, go: Callable[[], None]) -> None:  # noqa: ARG001
    async def run() -> None:
        app, _ = _app(url)
        async with app.open_async():
            go()
            await app.run_worker_async(wait=False)

    asyncio.run(run())

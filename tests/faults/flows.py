"""Flows of the soak test: every way in which a handler can run, with failures at random.

A step with `tx` leaves a row in `effects`, which has no key, so that doubles can be seen.
"""

import asyncio
import os
import random
import time
from collections.abc import Sequence

from pgflow_worker import Context, Fail, Flow, Transaction


def dawdle(usual: float = 0.1) -> None:
    """Take a while, now and then a long one."""
    time.sleep(duration(usual))


def duration(usual: float) -> float:
    return random.uniform(1, 2) if random.random() < 0.005 else usual * random.random() ** 2


def try_luck(risk: float = 0.03) -> None:
    if random.random() < risk:
        raise RuntimeError("bad luck")


def leave_effect(tx: Transaction, ctx: Context) -> None:
    tx.execute(
        "insert into effects (run_id, step_slug, task_index, attempt) values ($1, $2, $3, $4)",
        [ctx.run_id, ctx.step_slug, ctx.task_index, ctx.attempt],
    )


def must_be(found: object, expected: object) -> None:
    if found != expected:
        raise Fail(f"wrong input: {found!r}, not {expected!r}")


orders = Flow("orders", max_attempts=4, base_delay=1, timeout=5)


@orders.step
def price(flow_input: dict[str, int]) -> int:
    dawdle()
    try_luck()
    return 3 * flow_input["n"]


@orders.step(timeout=3)
async def ask(price: int) -> int:
    await asyncio.sleep(4 if random.random() < 0.003 else duration(0.3))
    try_luck()
    return price + 1


@orders.step(thread=True)
def fetch(price: int) -> int:
    dawdle(0.3)
    try_luck()
    return price + 2


@orders.step
def book(price: int, tx: Transaction, ctx: Context) -> int:
    leave_effect(tx, ctx)
    dawdle()
    if random.random() < 0.01:
        raise Fail("out of stock")
    try_luck()
    return price + 3


@orders.step(max_attempts=3)
def pay(book: int, tx: Transaction, ctx: Context) -> int:
    dawdle()
    leave_effect(tx, ctx)
    try_luck(0.25)
    return book


@orders.step
def confirm(
    flow_input: dict[str, int], ask: int, fetch: int, pay: int, tx: Transaction, ctx: Context
) -> None:
    n = 3 * flow_input["n"]
    must_be([ask, fetch, pay], [n + 1, n + 2, n + 3])
    leave_effect(tx, ctx)


pages = Flow("pages", max_attempts=4, base_delay=1, timeout=5)


@pages.array
def links(flow_input: dict[str, int]) -> list[int]:
    return list(range(flow_input["n"]))


@pages.map(over=links)
def parse(link: int) -> int:
    dawdle(0.02)
    try_luck(0.01)
    return 2 * link


@pages.map(over=links)
def save(link: int, tx: Transaction, ctx: Context) -> int:
    leave_effect(tx, ctx)
    dawdle(0.02)
    try_luck(0.01)
    return link


@pages.map(over=parse)
async def probe(parsed: int) -> int:
    await asyncio.sleep(duration(0.1))
    try_luck(0.01)
    return parsed + 1


@pages.step
def index(
    flow_input: dict[str, int],
    save: Sequence[int],
    probe: Sequence[int],
    tx: Transaction,
    ctx: Context,
) -> None:
    n = flow_input["n"]
    must_be([save, probe], [list(range(n)), [2 * link + 1 for link in range(n)]])
    leave_effect(tx, ctx)


letters = Flow("letters", max_attempts=3, base_delay=1, timeout=5)


@letters.step(max_attempts=1)
def send(flow_input: dict[str, str], ctx: Context) -> None:
    """Must never run twice, so it is noted outside the database, where nothing is undone."""
    file = os.open(flow_input["file"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, f"{ctx.idempotency_key}\n".encode())
    os.close(file)
    dawdle()


@letters.step
def note(send: None, tx: Transaction, ctx: Context) -> None:
    leave_effect(tx, ctx)

"""Contestants outside the database. Each module is a `bench.child.Job`."""

from __future__ import annotations

import time
from typing import Any

import psycopg


def wait_until(connection: psycopg.Connection[tuple[Any, ...]], query: str) -> None:
    """Ask until the answer is true."""
    while True:
        row = connection.execute(query.encode()).fetchone()
        if row and row[0]:
            return
        time.sleep(0.005)

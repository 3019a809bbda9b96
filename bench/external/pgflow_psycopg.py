"""What a user of pgflow would write without this worker: psycopg, autocommit, prepared statements.

`kind` is the flow's slug, `number` the batch size. There is nothing to install or to enqueue.
"""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import psycopg


def work(url: str, kind: str, number: int, go: Callable[[], None]) -> None:
    with psycopg.connect(url, autocommit=True, prepare_threshold=0) as connection:
        go()
        worker_id = uuid4()
        connection.execute(
            "insert into pgflow.workers (worker_id, queue_name, function_name) values (%s, %s, %s)",
            [worker_id, kind, "external"],
        )
        while True:
            messages = connection.execute(
                "select msg_id from pgmq.read(%s, 600, %s)", [kind, number]
            ).fetchall()
            if not messages:
                return
            tasks = connection.execute(
                """select run_id, step_slug, task_index, input
                from pgflow.start_tasks(%s, %s::bigint[], %s)""",
                [kind, [message for (message,) in messages], worker_id],
            ).fetchall()
            for run_id, step_slug, task_index, _input in tasks:
                connection.execute(
                    "select from pgflow.complete_task(%s, %s, %s, %s)",
                    [run_id, step_slug, task_index, "1"],
                )

"""Computes for 100 ms in Python."""

import time

from pgflow_worker import Flow

flow = Flow("thread_cpu")


@flow.step(thread=True)
def compute(flow_input: object) -> int:  # noqa: ARG001
    until = time.thread_time() + 0.1
    number = 0
    while time.thread_time() < until:
        number += 1
    return number

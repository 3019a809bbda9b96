"""Waits for 100 ms, as a blocking client would for a network."""

import time

from pgflow_worker import Flow

flow = Flow("thread_io")


@flow.step(thread=True)
def wait(flow_input: object) -> int:  # noqa: ARG001
    time.sleep(0.1)
    return 1

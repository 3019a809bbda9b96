"""Waits for 100 ms, as a client of asyncio would for a network."""

import asyncio

from pgflow_worker import Flow

flow = Flow("async_io")


@flow.step
async def wait(flow_input: object) -> int:  # noqa: ARG001
    await asyncio.sleep(0.1)
    return 1

"""Does nothing, in a thread."""

from pgflow_worker import Flow

flow = Flow("thread_noop")


@flow.step(thread=True)
def nothing(flow_input: object) -> int:  # noqa: ARG001
    return 1

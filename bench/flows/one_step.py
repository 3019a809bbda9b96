"""One step that does nothing."""

from pgflow_worker import Flow

flow = Flow("one_step")


@flow.step
def only(flow_input: object) -> int:  # noqa: ARG001
    return 1

"""One step with a result of a hundred bytes, as small as results that say something are."""

from pgflow_worker import Flow

flow = Flow("hundred_bytes")


@flow.step
def only(flow_input: object) -> str:  # noqa: ARG001
    return 98 * "x"

"""One step that does nothing, with a transaction."""

from pgflow_worker import Flow, Transaction

flow = Flow("one_step_tx")


@flow.step
def only(flow_input: object, tx: Transaction) -> int:  # noqa: ARG001
    return 1

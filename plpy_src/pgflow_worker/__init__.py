"""Run pgflow tasks inside PostgreSQL, with handlers in Python.

from pgflow_worker import Flow

flow = Flow("greet")

@flow.step
def hello(flow_input):
    return f"Hello, {flow_input['name']}"
"""

from typing import TYPE_CHECKING, Any

from pgflow_worker.context import Context
from pgflow_worker.errors import DatabaseError, Fail, Retry, Snooze
from pgflow_worker.flow import Flow
from pgflow_worker.transaction import Transaction

if TYPE_CHECKING:
    from pgflow_worker.secrets import secret
else:

    def __getattr__(name: str) -> Any:
        # Imported by the first module that needs it: most calls are a new interpreter's only one.
        if name == "secret":
            from pgflow_worker.secrets import secret

            return secret
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["Context", "DatabaseError", "Fail", "Flow", "Retry", "Snooze", "Transaction", "secret"]
__version__ = "0.2.0"

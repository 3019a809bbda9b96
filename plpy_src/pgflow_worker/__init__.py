"""Run pgflow tasks inside PostgreSQL, with handlers in Python.

from pgflow_worker import Flow

flow = Flow("greet")

@flow.step
def hello(flow_input):
    return f"Hello, {flow_input['name']}"
"""

from pgflow_worker.context import Context
from pgflow_worker.errors import DatabaseError, Fail, Retry, Snooze
from pgflow_worker.flow import Flow
from pgflow_worker.transaction import Transaction

__all__ = ["Context", "DatabaseError", "Fail", "Flow", "Retry", "Snooze", "Transaction"]
__version__ = "0.1.0"

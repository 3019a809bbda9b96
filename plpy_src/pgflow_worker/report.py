"""The report of one call of work()."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Literal

from pgflow_worker import codec
from pgflow_worker.tracebacks import printable

# completed; retried: the attempt failed, another will follow; snoozed: the handler asked to be
# called later; failed: for good; discarded: the run had failed or another worker had taken the
# task; rescued: taken back from a dead worker.
Outcome = Literal["completed", "retried", "snoozed", "failed", "discarded", "rescued"]


@dataclass
class Report:
    """What a call was asked for and what it did; work() returns it as JSON."""

    status: str
    flow_slug: str
    mode: str
    batch_size: int
    max_concurrent: int
    worker_id: str | None = None
    slot: int | None = None
    completed: int = 0
    retried: int = 0
    snoozed: int = 0
    failed: int = 0
    discarded: int = 0
    rescued: int = 0
    parked: int = 0
    duration_ms: int = 0
    frozen_ms: float = 0.0
    notes: list[str] = field(default_factory=list)

    @property
    def did_something(self) -> bool:
        """Whether the call changed any task or message."""
        ended = (self.completed, self.retried, self.snoozed, self.failed, self.discarded)
        return any((*ended, self.rescued, self.parked))

    def count(self, outcome: Outcome) -> None:
        """Count a task."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def note(self, text: str) -> None:
        """Add a remark, once."""
        if text not in self.notes:
            self.notes.append(text)

    def json(self, **more: str) -> str:
        """The report as JSON text."""
        texts = {name: printable(text) for name, text in more.items()}
        return codec.encode({**asdict(self), "frozen_ms": round(self.frozen_ms), **texts})

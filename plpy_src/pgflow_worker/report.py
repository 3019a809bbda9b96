"""The report of one call of work()."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pgflow_worker import codec
from pgflow_worker.tracebacks import printable

# completed; retried: the attempt failed, another will follow; snoozed: the handler asked to be
# called later; failed: for good; discarded: the run had failed or another worker had taken the
# task; rescued: taken back from a dead worker.
Outcome = Literal["completed", "retried", "snoozed", "failed", "discarded", "rescued"]
_COUNTS = (*get_args(Outcome), "parked")


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
        return any(getattr(self, name) for name in _COUNTS)

    def count(self, outcome: Outcome) -> None:
        """Count a task."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def note(self, text: str) -> None:
        """Add a remark, once."""
        text = printable(text)
        if text not in self.notes:
            self.notes.append(text)

    def json(self, **more: str) -> str:
        """The report as JSON text."""
        texts = {name: printable(text) for name, text in more.items()}
        return codec.encode({**self._fields(), "frozen_ms": round(self.frozen_ms), **texts})

    def _fields(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class TotalReport(Report):
    """The report of a call for all flows. `flows`: those for which it worked, in that order."""

    flows: list[str] = field(default_factory=list)

    def add(self, part: Report) -> None:
        """Add what the call did for one flow."""
        if part.flow_slug not in self.flows:
            self.flows.append(part.flow_slug)
        for name in (*_COUNTS, "frozen_ms"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        for note in part.notes:
            self.note(f"{part.flow_slug}: {note}")

    def _fields(self) -> dict[str, Any]:
        return {**super()._fields(), "flow_slug": None}

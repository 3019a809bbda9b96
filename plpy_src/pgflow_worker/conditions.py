"""Conditions: whether a step runs at all, and what becomes of its run if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

When = Literal["skip", "skip-cascade", "fail"]
Pattern = Mapping[str, Any]


@dataclass(frozen=True)
class Conditions:
    """A step's conditions as pgflow stores them, with its defaults (0.14 and later).

    if_, if_not: patterns that the step's input must contain, and must not; of a dependent step
    over the results of its dependencies by slug, of a root step over the run's input.
    when_unmet: what happens if they are not met; when_exhausted: if a task has no attempt left.
    """

    if_: Pattern | None = field(default=None, hash=False)
    if_not: Pattern | None = field(default=None, hash=False)
    when_unmet: When = "skip"
    when_exhausted: When = "fail"

    @property
    def are_default(self) -> bool:
        """Whether pgflow versions without conditions do the same."""
        return self == UNCONDITIONAL


UNCONDITIONAL = Conditions()

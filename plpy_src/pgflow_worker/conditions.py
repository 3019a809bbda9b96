"""Conditions: whether a step runs at all, and what becomes of its run if it does not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, cast, get_args

from pgflow_worker import codec
from pgflow_worker.errors import FlowError

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

    @property
    def leaving_a_gap(self) -> tuple[str, ...]:
        """The options by which the step is skipped while the steps after it run."""
        has_pattern = self.if_ is not None or self.if_not is not None
        return tuple(
            option
            for option, leaves in (
                ("when_unmet", has_pattern and self.when_unmet == "skip"),
                ("when_exhausted", self.when_exhausted == "skip"),
            )
            if leaves
        )

    def are_met(self, step_input: object) -> bool:
        """Whether pgflow would let the step run."""
        return (self.if_ is None or contains(step_input, self.if_)) and (
            self.if_not is None or not contains(step_input, self.if_not)
        )


UNCONDITIONAL = Conditions()


class ConditionOptions(TypedDict, total=False):
    """The conditions as keyword arguments of a decorator. None: as if it were not there."""

    if_: Pattern | None
    if_not: Pattern | None
    when_unmet: When | None
    when_exhausted: When | None


@dataclass(frozen=True)
class Known:
    """What a step's patterns may name, and the other names for which there is advice.

    dependencies: slugs by the function's name; a root step has none. others: likewise, of the
    flow's other steps. lists: slugs of steps whose result is a list. array_input_of: the map step
    for which the run's input must be an array.
    """

    dependencies: Mapping[str, str]
    others: Mapping[str, str]
    lists: frozenset[str]
    array_input_of: str | None


def resolved(options: ConditionOptions, known: Known, where: str) -> Conditions:
    """Check conditions and put slugs in the place of functions' names. Raises FlowError."""
    if_ = _pattern(options.get("if_"), known, where, "if_")
    if_not = _pattern(options.get("if_not"), known, where, "if_not")
    if options.get("when_unmet") is not None and if_ is None and if_not is None:
        raise FlowError(
            f"{where}: when_unmet has no effect without if_ or if_not",
            hint="Leave it out, or say what is to be met. What becomes of a step whose attempts "
            "have all failed is when_exhausted.",
        )
    return Conditions(
        if_,
        if_not,
        _when(options.get("when_unmet"), UNCONDITIONAL.when_unmet, f"{where}: when_unmet"),
        _when(
            options.get("when_exhausted"), UNCONDITIONAL.when_exhausted, f"{where}: when_exhausted"
        ),
    )


def contains(value: object, pattern: object) -> bool:
    """jsonb's `value @> pattern`, of JSON as the codec reads it."""
    if isinstance(value, list) and not isinstance(pattern, dict | list):
        return _contains(value, [pattern])  # an exception of jsonb's, at the top only
    return _contains(value, pattern)


def _contains(value: object, pattern: object) -> bool:
    if isinstance(pattern, dict):
        return isinstance(value, dict) and all(
            key in value and _contains(value[key], inner) for key, inner in pattern.items()
        )
    if isinstance(pattern, list):
        return isinstance(value, list) and all(
            any(_contains(element, inner) for element in value) for inner in pattern
        )
    # For Python True is 1.
    return isinstance(value, bool) == isinstance(pattern, bool) and value == pattern


def _when(value: object, default: When, where: str) -> When:
    if value is None:
        return default
    known = get_args(When)
    if value not in known:
        raise FlowError(
            f"{where} must be one of the known values, not {value!r}",
            hint=f"Known values: {', '.join(known)}.",
        )
    return cast(When, value)


def _pattern(value: object, known: Known, where: str, option: str) -> Pattern | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        example = f'{{"{min(known.dependencies, default="plan")}": ...}}'
        raise FlowError(
            f"{where}: {option} must be a JSON object, not {value!r}",
            hint=f"Write a dict, such as {option}={example}.",
        )
    try:
        pattern = codec.decode(codec.encode(value))
    except codec.NotJson as error:
        raise FlowError(
            f"{where}: {option} is not JSON: {error}",
            hint="A pattern is compared with JSON: write what a result may be.",
        ) from None
    assert isinstance(pattern, dict)
    if not known.dependencies:
        if known.array_input_of is not None:
            raise FlowError(
                f"{where}: {option} is {_outcome(option)} met: it is an object, and the run's "
                f'input is an array, because of map step "{known.array_input_of}"',
                hint="Let the run's input be an object, and map with over= the result of a step.",
            )
        return pattern
    for name, inner in pattern.items():
        if name not in known.dependencies:
            raise _unknown_name(name, known, where, option)
        if known.dependencies[name] in known.lists and not isinstance(inner, list):
            raise FlowError(
                f"{where}: {option} is {_outcome(option)} met: the result of step "
                f'"{known.dependencies[name]}" is a list, and the pattern for it is not',
                hint=f'Write {option}={{"{name}": [...]}}: a list contains the elements named.',
            )
    return {known.dependencies[name]: inner for name, inner in pattern.items()}


def _outcome(option: str) -> str:
    """What a pattern that nothing can contain comes to."""
    return "always" if option == "if_not" else "never"


def _unknown_name(name: str, known: Known, where: str, option: str) -> FlowError:
    import difflib

    functions = {slug: function for function, slug in known.dependencies.items()}
    close = difflib.get_close_matches(name, known.dependencies, n=1)
    if name in functions:
        hint = f'A pattern names a step by its function: write "{functions[name]}".'
    elif name in known.others:
        hint = f"Make it one: give the step after=[{name}]."
    elif name in known.others.values():
        [function] = [other for other, slug in known.others.items() if slug == name]
        hint = f"Make it one: give the step after=[{function}]."
    elif name == "flow_input":
        hint = (
            "Only a step without dependencies is compared with the run's input: let one of the "
            "dependencies return what the pattern is about."
        )
    elif close:
        hint = f'Did you mean "{close[0]}"?'
    else:
        hint = f"Its dependencies: {', '.join(sorted(known.dependencies))}."
    return FlowError(
        f'{where}: {option} names "{name}", which is not one of its dependencies', hint=hint
    )

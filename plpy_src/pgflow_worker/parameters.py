"""A handler's parameters: what each of them receives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from pgflow_worker.errors import FlowError


class Role(Enum):
    """What a handler's parameter receives."""

    DEPENDENCY = "dependency"
    ELEMENT = "element"
    FLOW_INPUT = "flow_input"
    CONTEXT = "Context"
    TRANSACTION = "Transaction"


@dataclass(frozen=True)
class Parameter:
    """One parameter of a handler and what it receives; `dependency` is a step's slug."""

    name: str
    role: Role
    dependency: str | None = None
    optional: bool = False


def parameters_of(handler: Callable[..., Any], where: str) -> tuple[inspect.Parameter, ...]:
    """A handler's parameters, if each can receive something. Raises FlowError."""
    try:
        parameters = tuple(inspect.signature(handler).parameters.values())
    except ValueError:
        raise FlowError(
            f"{where}: {handler!r} does not tell its parameters",
            hint="Wrap it in a function of your own.",
        ) from None
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise FlowError(
                f'{where}: parameter "{parameter}" names no step',
                hint="Name each step that the handler needs as a parameter of its own.",
            )
    return parameters


def matched(
    function: str,
    parameters: Sequence[inspect.Parameter],
    slugs: Mapping[str, str],
    where: str,
    *,
    is_map: bool,
) -> Iterable[Parameter]:
    """Say what each parameter of a function receives. Raises FlowError.

    slugs: those of the flow's steps, by the function's name.
    """
    if is_map and not _takes_element(parameters):
        raise FlowError(
            f"{where}: a map step's first parameter is the element, and this one has none",
            hint="Add it before the others: def handler(element, flow_input, ...).",
        )
    for position, parameter in enumerate(parameters):
        if is_map and position == 0:
            yield Parameter(parameter.name, Role.ELEMENT)
            continue
        role = _annotated_role(parameter)
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise FlowError(
                f'{where}: parameter "{parameter.name}" is positional-only',
                hint='Remove the "/" from the parameters: they are passed by name.',
            )
        if role is not None:
            yield Parameter(parameter.name, role)
        elif parameter.name == "flow_input":
            yield Parameter(parameter.name, Role.FLOW_INPUT)
        elif parameter.name in slugs:
            if is_map:
                raise FlowError(
                    f'{where}: a map step cannot depend on step "{slugs[parameter.name]}"',
                    hint="pgflow gives a map step one dependency, the list it maps: name it with "
                    "over=, and let that step put what else is needed into its elements.",
                )
            yield Parameter(
                parameter.name,
                Role.DEPENDENCY,
                slugs[parameter.name],
                optional=parameter.default is not parameter.empty,
            )
        else:
            raise _unknown_parameter(function, parameter, slugs, where)


def _takes_element(parameters: Sequence[inspect.Parameter]) -> bool:
    if not parameters:
        return False
    first = parameters[0]
    return (
        first.kind is not first.KEYWORD_ONLY
        and first.name != "flow_input"
        and _annotated_role(first) is None
    )


def _annotated_role(parameter: inspect.Parameter) -> Role | None:
    """The role an annotation names: by its last name, as it may be imported for types only."""
    annotation = parameter.annotation
    name = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")
    match name.strip("'\" ").rpartition(".")[2]:
        case "Context":
            return Role.CONTEXT
        case "Transaction":
            return Role.TRANSACTION
    return None


def _unknown_parameter(
    function: str, parameter: inspect.Parameter, slugs: Mapping[str, str], where: str
) -> FlowError:
    name = parameter.name
    for usual, role in (("ctx", Role.CONTEXT), ("tx", Role.TRANSACTION)):
        if name == usual:
            missing = parameter.annotation is parameter.empty
            problem = "has no annotation" if missing else f"is not annotated as {role.value}"
            return FlowError(
                f'{where}: parameter "{name}" {problem}',
                hint=f"Write {name}: {role.value}, with: from pgflow_worker import {role.value}",
            )
    import difflib

    known = [*(other for other in slugs if other != function), "flow_input"]
    close = difflib.get_close_matches(name, known, n=1)
    by_slug = [other for other, slug in slugs.items() if slug == name]
    if by_slug:
        hint = f'A parameter names a step by its function: write "{by_slug[0]}".'
    elif close:
        hint = f'Did you mean "{close[0]}"?'
    else:
        hint = f"Known names: {', '.join(sorted(known))}."
    return FlowError(f'{where}: parameter "{name}" names no step of this flow', hint=hint)

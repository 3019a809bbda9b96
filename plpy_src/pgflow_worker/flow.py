"""The flow language: steps are Python functions, their parameters name what they depend on."""

from __future__ import annotations

import heapq
import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from math import inf
from typing import Any, Literal, TypeVar, Unpack, overload

from pgflow_worker.conditions import (
    UNCONDITIONAL,
    ConditionOptions,
    Conditions,
    Known,
    resolved,
)
from pgflow_worker.errors import FlowError
from pgflow_worker.parameters import Parameter, Role, matched, parameters_of

Handler = Callable[..., Any]
H = TypeVar("H", bound=Handler)
Kind = Literal["single", "array", "map"]

# pgflow's own limits: is_valid_slug() and the DSL's validateRuntimeOptions(). A flow's slug is
# also a pgmq queue's name, and pgmq allows those 47 characters.
SLUG = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
DECORATORS = {"single": "step", "array": "array", "map": "map"}
MAX_STEP_SLUG = 128
MAX_FLOW_SLUG = 47
MAX_SECRET = 128  # characters of a name
MOST = 2**31 - 1  # PostgreSQL's integer
LEAST = {"max_attempts": 1, "base_delay": 1, "timeout": 3, "start_delay": 0}
OPTIONS = (*LEAST, *(option.name for option in fields(Conditions)))  # of a decorator


@dataclass(frozen=True)
class Options:
    """How pgflow runs a flow or a step. None: pgflow's default, or for a step the flow's value.

    max_attempts: number of attempts, at least 1. base_delay: seconds, at least 1; after the n-th
    attempt pgflow waits base_delay * 2**n. timeout: seconds, at least 3. start_delay: seconds
    between a step becoming ready and its start, for steps only.
    """

    max_attempts: int | None = None
    base_delay: int | None = None
    timeout: int | None = None
    start_delay: int | None = None

    def check(self, where: str) -> None:
        """Raise FlowError for a value that pgflow would refuse."""
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise FlowError(f"{where}: {option.name} must be a whole number, not {value!r}")
            if value > MOST:
                raise FlowError(f"{where}: {option.name} must be at most {MOST}, not {value}")
            if value < LEAST[option.name]:
                raise FlowError(
                    f"{where}: {option.name} must be at least {LEAST[option.name]}, not {value}"
                )


class StepOptions(ConditionOptions, total=False):
    """The options as keyword arguments of a decorator."""

    max_attempts: int | None
    base_delay: int | None
    timeout: int | None
    start_delay: int | None


@dataclass(frozen=True)
class Step:
    """A step whose parameters have been matched to the steps they name."""

    slug: str
    kind: Kind
    handler: Handler
    parameters: tuple[Parameter, ...]
    dependencies: tuple[str, ...]
    options: Options
    thread: bool = False
    conditions: Conditions = UNCONDITIONAL
    feeds_map: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def is_async(self) -> bool:
        """Whether the handler is a coroutine function, for the event loop."""
        return inspect.iscoroutinefunction(self.handler)

    @cached_property
    def is_concurrent(self) -> bool:
        """Whether the handler runs beside others, in a thread or on the event loop."""
        return self.thread or self.is_async

    @property
    def type(self) -> Literal["single", "map"]:
        """The step's type as pgflow stores it: an array step is a single step there."""
        return "map" if self.kind == "map" else "single"

    @property
    def returns_list(self) -> bool:
        """Whether the step's result is a list, made by the handler or of a map's tasks."""
        return self.kind == "map" or self.must_return_list

    @property
    def must_return_list(self) -> bool:
        """Whether anything but a list would fail the run."""
        return self.kind == "array" or (self.kind == "single" and self.feeds_map is not None)

    @cached_property
    def is_transactional(self) -> bool:
        """Whether the handler has a Transaction, and so the main thread."""
        return self.wants(Role.TRANSACTION)

    def wants(self, role: Role) -> bool:
        """Whether the handler has a parameter of this role."""
        return any(parameter.role is role for parameter in self.parameters)

    def call(
        self,
        task_input: object,
        flow_input: object,
        context: object,
        transaction: object,
        handler: Handler | None = None,
    ) -> object:
        """Call the handler with what its parameters ask for.

        `task_input` is an object of dependency outputs by slug, or for a map step the element.
        """
        element: list[object] = []
        keywords: dict[str, object] = {}
        for parameter in self.parameters:
            match parameter.role:
                case Role.ELEMENT:
                    element.append(task_input)
                case Role.FLOW_INPUT:
                    keywords[parameter.name] = flow_input
                case Role.CONTEXT:
                    keywords[parameter.name] = context
                case Role.TRANSACTION:
                    keywords[parameter.name] = transaction
                case Role.DEPENDENCY:
                    assert isinstance(task_input, Mapping)
                    if parameter.dependency in task_input or not parameter.optional:
                        keywords[parameter.name] = task_input[parameter.dependency]
        return (handler or self.handler)(*element, **keywords)


@dataclass(frozen=True)
class _Definition:
    """A decorated function, before its parameters are matched to steps."""

    slug: str
    kind: Kind
    handler: Handler
    parameters: tuple[inspect.Parameter, ...]
    after: tuple[object, ...]
    over: object | None
    options: Options
    conditions: ConditionOptions
    thread: bool
    resources: Mapping[str, float]

    @property
    def name(self) -> str:
        return self.handler.__name__


class Flow:
    """A flow: `@flow.step`, `@flow.array` and `@flow.map` turn functions into its steps.

    slug: at most 47 characters, letters, digits and underscores. max_attempts, base_delay and
    timeout (seconds) are the steps' defaults; pgflow's own are 3, 5 and 60. secrets: the names
    that its handlers may pass to secret().
    Raises FlowError where the definition is wrong.
    """

    def __init__(
        self,
        slug: str,
        *,
        max_attempts: int | None = None,
        base_delay: int | None = None,
        timeout: int | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        _check_slug(slug, MAX_FLOW_SLUG, f'flow "{slug}"')
        self.slug = slug
        self.options = Options(max_attempts, base_delay, timeout)
        self.options.check(f'flow "{slug}"')
        _check_secrets(secrets, f'flow "{slug}"')
        self.secrets = tuple(dict.fromkeys(secrets))
        self._definitions: list[_Definition] = []
        self._steps: dict[str, Step] | None = None

    def __repr__(self) -> str:
        return f"Flow({self.slug!r})"

    @overload
    def step(self, handler: H, /) -> H: ...

    @overload
    def step(
        self,
        slug: str | None = None,
        /,
        *,
        after: Sequence[Handler] = (),
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> Callable[[H], H]: ...

    def step(
        self,
        slug: H | str | None = None,
        /,
        *,
        after: Sequence[Handler] = (),
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> H | Callable[[H], H]:
        """Add a step. Its parameters name the steps whose results it gets.

        slug: the function's name unless given. after: steps that must be done first, without
        their results. thread: run the handler in a thread, beside others, for clients that block.
        resources: what a handler with thread=True or an async one needs of a Dask worker, where it
        is run by one, such as {"GPU": 1}; elsewhere nobody asks.
        options: max_attempts, base_delay, timeout, start_delay, see Options; if_, if_not,
        when_unmet, when_exhausted, see Conditions.
        """
        return self._add("single", slug, after, None, thread, resources, options)

    @overload
    def array(self, handler: H, /) -> H: ...

    @overload
    def array(
        self,
        slug: str | None = None,
        /,
        *,
        after: Sequence[Handler] = (),
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> Callable[[H], H]: ...

    def array(
        self,
        slug: H | str | None = None,
        /,
        *,
        after: Sequence[Handler] = (),
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> H | Callable[[H], H]:
        """Add a step that returns a list; anything else is a failed attempt. Otherwise as step."""
        return self._add("array", slug, after, None, thread, resources, options)

    @overload
    def map(self, handler: H, /) -> H: ...

    @overload
    def map(
        self,
        slug: str | None = None,
        /,
        *,
        over: Handler | None = None,
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> Callable[[H], H]: ...

    def map(
        self,
        slug: H | str | None = None,
        /,
        *,
        over: Handler | None = None,
        thread: bool = False,
        resources: Mapping[str, float] | None = None,
        **options: Unpack[StepOptions],
    ) -> H | Callable[[H], H]:
        """Add a step that runs once per element; the first parameter is the element.

        over: the step whose list is mapped; without it, the run's input, which must be an array.
        """
        return self._add("map", slug, (), over, thread, resources, options)

    @property
    def steps(self) -> Mapping[str, Step]:
        """The steps by slug, each after those it depends on. Raises FlowError."""
        if self._steps is None:
            self._steps = _resolve(self.slug, self._definitions)
        return self._steps

    def _add(
        self,
        kind: Kind,
        slug: H | str | None,
        after: Iterable[Handler],
        over: object | None,
        thread: bool,
        resources: Mapping[str, float] | None,
        step_options: StepOptions,
    ) -> H | Callable[[H], H]:
        for name in step_options:
            if name not in OPTIONS:
                raise FlowError(
                    f'flow "{self.slug}": @flow.{DECORATORS[kind]} has no option "{name}"',
                    hint=f"Options: {', '.join(OPTIONS)}.",
                )
        options = Options(
            step_options.get("max_attempts"),
            step_options.get("base_delay"),
            step_options.get("timeout"),
            step_options.get("start_delay"),
        )
        if not isinstance(thread, bool):
            raise FlowError(f'flow "{self.slug}": thread must be True or False, not {thread!r}')

        def decorate(handler: H) -> H:
            if not callable(handler) or not hasattr(handler, "__name__"):
                raise FlowError(f'flow "{self.slug}": a step is a function, not {handler!r}')
            step_slug = slug if isinstance(slug, str) else handler.__name__
            where = f'flow "{self.slug}", step "{step_slug}"'
            _check_slug(step_slug, MAX_STEP_SLUG, where)
            options.check(where)
            _check_resources(resources, where)
            for other in self._definitions:
                if other.slug.lower() == step_slug.lower():
                    differs = "" if other.slug == step_slug else ", but for upper and lower case"
                    raise FlowError(
                        f"{where}: the slug is taken by another step{differs}",
                        hint='Give one of them a slug of its own: @flow.step("another_slug").',
                    )
                if other.name == handler.__name__:
                    raise FlowError(
                        f'{where}: its function has the name of step "{other.slug}"\'s, '
                        f'"{handler.__name__}"',
                        hint="Parameters name steps by their function: rename one of the two.",
                    )
            after_all = tuple(after) if isinstance(after, list | tuple) else (after,)
            self._definitions.append(
                _Definition(
                    step_slug,
                    kind,
                    handler,
                    parameters_of(handler, where),
                    after_all,
                    over,
                    options,
                    step_options,
                    thread,
                    dict(resources or {}),
                )
            )
            self._steps = None
            return handler

        if slug is None or isinstance(slug, str):
            return decorate
        return decorate(slug)


def _check_slug(slug: object, limit: int, where: str) -> None:
    """Refuse what pgflow.is_valid_slug() or pgmq would refuse."""
    if not isinstance(slug, str):
        raise FlowError(f"{where}: the slug must be text, not {slug!r}")
    if slug == "run":
        raise FlowError(f'{where}: the slug "run" is reserved by pgflow')
    if len(slug) > limit:
        raise FlowError(f"{where}: the slug has {len(slug)} characters, the limit is {limit}")
    if not SLUG.fullmatch(slug):
        raise FlowError(
            f"{where}: a slug has letters, digits and underscores and does not start with a digit"
        )


def _check_resources(resources: object, where: str) -> None:
    if resources is None:
        return
    if not isinstance(resources, Mapping):
        raise FlowError(
            f"{where}: resources must be names with quantities, not {resources!r}",
            hint='For example resources={"GPU": 1}.',
        )
    for name, quantity in resources.items():
        is_number = isinstance(quantity, int | float) and not isinstance(quantity, bool)
        if not isinstance(name, str) or not is_number or not 0 < quantity < inf:
            raise FlowError(
                f"{where}: resource {name!r} must be text with a positive number, not {quantity!r}"
            )


def _check_secrets(secrets: object, where: str) -> None:
    if not isinstance(secrets, list | tuple):
        raise FlowError(f"{where}: secrets must be a list of names, not {secrets!r}")
    for name in secrets:
        if not isinstance(name, str):
            raise FlowError(f"{where}: a secret's name must be text, not {name!r}")
        if len(name) > MAX_SECRET:
            raise FlowError(
                f'{where}: the name of secret "{name:.40}..." has {len(name)} characters, the '
                f"limit is {MAX_SECRET}"
            )
        if not SLUG.fullmatch(name):
            raise FlowError(
                f'{where}: "{name}" is not a name for a secret',
                hint="It has letters, digits and underscores and does not start with a digit.",
            )


def _resolve(flow_slug: str, definitions: Sequence[_Definition]) -> dict[str, Step]:
    """Match parameters to steps and put the steps into an order that pgflow accepts."""
    if not definitions:
        raise FlowError(
            f'flow "{flow_slug}" has no steps', hint="Decorate a function with @flow.step."
        )
    slugs = {definition.name: definition.slug for definition in definitions}
    by_handler = {id(definition.handler): definition for definition in definitions}
    steps: dict[str, Step] = {}
    for definition in definitions:
        where = f'flow "{flow_slug}", step "{definition.slug}"'

        def named(handler: object, option: str, where: str = where) -> _Definition:
            found = by_handler.get(id(handler))
            if found is None:
                raise FlowError(
                    f"{where}: {option}= must be given step functions of this flow, not {handler!r}"
                )
            return found

        after = [named(handler, "after").slug for handler in definition.after]
        over = [] if definition.over is None else [named(definition.over, "over").slug]
        parameters = tuple(
            matched(
                definition.name,
                definition.parameters,
                slugs,
                where,
                is_map=definition.kind == "map",
            )
        )
        _check_concurrency(definition, parameters, where)
        named_steps = [p.dependency for p in parameters if p.dependency is not None]
        steps[definition.slug] = Step(
            definition.slug,
            definition.kind,
            definition.handler,
            parameters,
            tuple(sorted({*named_steps, *after, *over})),
            definition.options,
            definition.thread,
            resources=definition.resources,
        )
    for step in tuple(steps.values()):
        if step.kind == "map":
            for dependency in step.dependencies:
                steps[dependency] = replace(steps[dependency], feeds_map=step.slug)
    for definition in definitions:
        steps[definition.slug] = _with_conditions(flow_slug, definition, definitions, steps)
    for step in steps.values():
        _check_defaults(flow_slug, step, steps)
    return {slug: steps[slug] for slug in _ordered(flow_slug, steps)}


def _with_conditions(
    flow_slug: str,
    definition: _Definition,
    definitions: Sequence[_Definition],
    steps: Mapping[str, Step],
) -> Step:
    step = steps[definition.slug]
    slugs = {other.name: other.slug for other in definitions if other is not definition}
    root_maps = (s.slug for s in steps.values() if s.kind == "map" and not s.dependencies)
    known = Known(
        {name: slug for name, slug in slugs.items() if slug in step.dependencies},
        {name: slug for name, slug in slugs.items() if slug not in step.dependencies},
        frozenset(slug for slug, other in steps.items() if other.returns_list),
        next(root_maps, None),
    )
    where = f'flow "{flow_slug}", step "{step.slug}"'
    return replace(step, conditions=resolved(definition.conditions, known, where))


def _check_defaults(flow_slug: str, step: Step, steps: Mapping[str, Step]) -> None:
    """Refuse a parameter that may get nothing."""
    for parameter in step.parameters:
        if parameter.dependency is None or parameter.optional:
            continue
        options = steps[parameter.dependency].conditions.leaving_a_gap
        if options:
            cascade = " and ".join(f'{option}="skip-cascade"' for option in options)
            raise FlowError(
                f'flow "{flow_slug}", step "{step.slug}": parameter "{parameter.name}" needs a '
                f'default, because step "{parameter.dependency}" may be skipped',
                hint=f"Write {parameter.name}=None, or give step "
                f'"{parameter.dependency}" {cascade}.',
            )


def _check_concurrency(
    definition: _Definition, parameters: Sequence[Parameter], where: str
) -> None:
    """Refuse SQL outside the main thread, and a thread for what has the event loop."""
    is_async = inspect.iscoroutinefunction(definition.handler)
    if definition.resources and not (is_async or definition.thread):
        raise FlowError(
            f"{where}: resources are for handlers that may run on a cluster",
            hint="Those have thread=True or are async, and no transaction.",
        )
    if is_async and definition.thread:
        raise FlowError(
            f"{where}: an async handler runs on the event loop, not in a thread",
            hint="Leave out thread=True, or write def.",
        )
    if any(parameter.role is Role.TRANSACTION for parameter in parameters):
        if is_async:
            raise FlowError(
                f"{where}: an async handler cannot have a transaction",
                hint="Write def, or save the result in a step of its own.",
            )
        if definition.thread:
            raise FlowError(
                f"{where}: a handler in a thread cannot have a transaction",
                hint="Leave out thread=True, or save the result in a step of its own.",
            )


def _ordered(flow_slug: str, steps: Mapping[str, Step]) -> Iterable[str]:
    """The order of definition, changed only where a step is defined before one it depends on."""
    sorter = TopologicalSorter({slug: step.dependencies for slug, step in steps.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        raise FlowError(
            f'flow "{flow_slug}": steps depend on each other in a circle: {cycle}',
            hint="Remove one of these dependencies.",
        ) from None
    position = {slug: index for index, slug in enumerate(steps)}
    ready: list[tuple[int, str]] = []
    while sorter:
        for slug in sorter.get_ready():
            heapq.heappush(ready, (position[slug], slug))
        _, slug = heapq.heappop(ready)
        yield slug
        sorter.done(slug)

create function pgflow_worker._recorded_input(run_id uuid, step_slug text, task_index integer)
returns table (
    flow_slug text,
    run_input text,
    input text,
    attempt integer,
    max_attempts integer,
    timeout integer,
    is_started boolean
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    run record;
    step record;
    dependencies record;
    elements jsonb;
    tasks integer := 1;
    element jsonb;
    task record;
begin
    select known.flow_slug, known.input
    into run
    from pgflow.runs as known
    where known.run_id = _recorded_input.run_id;
    if not found then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format('run %s does not exist', coalesce(run_id::text, 'null')),
            hint = 'The latest runs: select run_id, flow_slug, status, started_at from pgflow.runs '
            'order by started_at desc limit 10;';
    end if;
    perform pgflow_worker._check_flow(run.flow_slug);
    select
        known.step_type,
        coalesce(known.opt_max_attempts, flow.opt_max_attempts) as max_attempts,
        coalesce(known.opt_timeout, flow.opt_timeout) as timeout
    into step
    from pgflow.steps as known
    join pgflow.flows as flow on flow.flow_slug = known.flow_slug
    where known.flow_slug = run.flow_slug and known.step_slug = _recorded_input.step_slug;
    if not found then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format(
                'flow "%s" has no step %s', run.flow_slug, coalesce('"' || step_slug || '"', 'null')
            ),
            hint = 'Its steps: ' || (
                select pg_catalog.string_agg(known.step_slug, ', ' order by known.step_index)
                from pgflow.steps as known
                where known.flow_slug = run.flow_slug
            ) || '.';
    end if;

    -- As start_tasks() does: the results of the steps that are completed, not of those that were skipped. From
    -- pgflow 0.13 on a step's result is its own, before that it is made of its tasks'.
    select
        pg_catalog.count(*) as number,
        coalesce(
            pg_catalog.jsonb_object_agg(dep.dep_slug, recorded.output) filter (where state.status = 'completed'),
            '{}'
        ) as outputs,
        pg_catalog.string_agg(
            pg_catalog.format('step "%s" (%s)', dep.dep_slug, coalesce(state.status, 'unknown to the run')),
            ', ' order by dep.dep_slug
        ) filter (where state.status is null or state.status not in ('completed', 'skipped')) as missing
    into dependencies
    from pgflow.deps as dep
    join pgflow.steps as parent on parent.flow_slug = dep.flow_slug and parent.step_slug = dep.dep_slug
    left join pgflow.step_states as state
        on state.run_id = _recorded_input.run_id and state.step_slug = dep.dep_slug
    cross join lateral (
        select case
            when pg_catalog.to_jsonb(state) ? 'output' then pg_catalog.to_jsonb(state) -> 'output'
            when parent.step_type = 'map' then coalesce((
                select pg_catalog.jsonb_agg(done.output order by done.task_index)
                from pgflow.step_tasks as done
                where done.run_id = state.run_id
                    and done.step_slug = state.step_slug
                    and done.status = 'completed'
            ), '[]')
            else (
                select done.output
                from pgflow.step_tasks as done
                where done.run_id = state.run_id
                    and done.step_slug = state.step_slug
                    and done.status = 'completed'
            )
        end as output
    ) as recorded
    where dep.flow_slug = run.flow_slug and dep.step_slug = _recorded_input.step_slug;
    if dependencies.missing is not null then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format(
                'step "%s" has no input yet: there is no output of %s', step_slug, dependencies.missing
            ),
            hint = 'Replay a step whose dependencies are completed, or wait until they are.';
    end if;

    if step.step_type = 'map' then
        elements := case
            when dependencies.number = 0 then run.input
            else (select each.value from pg_catalog.jsonb_each(dependencies.outputs) as each)
        end;
        tasks := case
            when pg_catalog.jsonb_typeof(elements) = 'array' then pg_catalog.jsonb_array_length(elements)
            else 0
        end;
        element := elements -> task_index;
    end if;
    if task_index is null or task_index < 0 or task_index >= tasks then
        raise exception using
            errcode = 'PW002',
            message = pg_catalog.format(
                'step "%s" of this run has no task %s', step_slug, coalesce(task_index::text, 'null')
            ),
            hint = case
                when step.step_type <> 'map' then 'It is no map step and has only task 0.'
                when tasks = 0 then 'There is nothing that it maps, so that it has no tasks.'
                else pg_catalog.format('It has the tasks 0 to %s.', tasks - 1)
            end;
    end if;

    select known.attempts_count, known.status = 'started' as is_started
    into task
    from pgflow.step_tasks as known
    where known.run_id = _recorded_input.run_id
        and known.step_slug = _recorded_input.step_slug
        and known.task_index = _recorded_input.task_index;
    return query
    select
        run.flow_slug,
        run.input::text,
        case
            when step.step_type = 'map' then element::text
            else (pg_catalog.jsonb_build_object('run', run.input) || dependencies.outputs)::text
        end,
        greatest(task.attempts_count, 1),
        step.max_attempts,
        step.timeout,
        coalesce(task.is_started, false);
end
$$;

comment on function pgflow_worker._recorded_input(uuid, text, integer) is
'What pgflow.start_tasks() would give a task now, without starting it: its input and its run''s, and the number '
'of its last attempt, 1 before the first. Raises PW001 or PW002 for what is unknown or has no input yet.';

revoke execute on function pgflow_worker._recorded_input(uuid, text, integer) from public;

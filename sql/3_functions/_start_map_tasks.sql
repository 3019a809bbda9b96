create function pgflow_worker._start_map_tasks(
    flow_slug text, message_ids bigint [], worker_id uuid
)
returns table (run_id uuid, step_slug text, task_index integer, input text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    map record;
    elements jsonb;
begin
    for map in
        with started as (
            update pgflow.step_tasks as task
            set
                status = 'started',
                started_at = now(),
                attempts_count = task.attempts_count + 1,
                last_worker_id = _start_map_tasks.worker_id
            from pgflow.runs as run, pgflow.steps as step
            where task.flow_slug = _start_map_tasks.flow_slug
                and task.message_id = any(_start_map_tasks.message_ids)
                and task.status = 'queued'
                and run.run_id = task.run_id
                and run.status <> 'failed'
                and step.flow_slug = task.flow_slug
                and step.step_slug = task.step_slug
                and step.step_type = 'map'
            returning task.run_id, task.step_slug, task.task_index
        )
        select
            started.run_id,
            started.step_slug,
            dep.dep_slug,
            parent.step_type as parent_type,
            pg_catalog.array_agg(started.task_index) as task_indexes
        from started
        left join pgflow.deps as dep
            on dep.flow_slug = _start_map_tasks.flow_slug and dep.step_slug = started.step_slug
        left join pgflow.steps as parent
            on parent.flow_slug = _start_map_tasks.flow_slug and parent.step_slug = dep.dep_slug
        group by started.run_id, started.step_slug, dep.dep_slug, parent.step_type
    loop
        if map.parent_type = 'map' then
            -- A map over a map: the element is the result of one task.
            return query
            select map.run_id, map.step_slug, given.task_index, coalesce(parent.output::text, 'null')
            from unnest(map.task_indexes) as given (task_index)
            left join pgflow.step_tasks as parent
                on parent.run_id = map.run_id
                and parent.step_slug = map.dep_slug
                and parent.task_index = given.task_index
                and parent.status = 'completed';
            continue;
        end if;
        -- Concatenated with nothing, so that the array is fetched and unpacked once and not for each element.
        if map.dep_slug is null then
            select run.input || '[]' into elements
            from pgflow.runs as run
            where run.run_id = map.run_id;
        else
            select parent.output || '[]' into elements
            from pgflow.step_tasks as parent
            where parent.run_id = map.run_id
                and parent.step_slug = map.dep_slug
                and parent.status = 'completed';
        end if;
        return query
        select
            map.run_id, map.step_slug, given.task_index,
            coalesce((elements -> given.task_index)::text, 'null')
        from unnest(map.task_indexes) as given (task_index);
    end loop;
end
$$;

comment on function pgflow_worker._start_map_tasks(text, bigint [], uuid) is
'Starts queued tasks of map steps and returns each one''s element, in time that grows with the tasks '
'alone: pgflow.start_tasks() puts the whole array together once for each of them. To be used only with '
'bodies of pgflow''s that it was tested with.';

revoke execute on function pgflow_worker._start_map_tasks(text, bigint [], uuid) from public;

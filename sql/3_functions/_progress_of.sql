create function pgflow_worker._progress_of(run_id uuid)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return (
        select pg_catalog.string_agg(
            pg_catalog.format('step "%s": ', step.step_slug)
            || case
                when step.status = 'created' then pg_catalog.format(
                    'waits for %s step%s', step.remaining_deps, case when step.remaining_deps > 1 then 's' else '' end
                )
                else pg_catalog.format('%s started, %s queued', step.started, step.queued)
                    || case when step.attempts > 0 then ' after a failed attempt' else '' end
            end,
            '; '
            order by step.status desc, step.step_index
        )
        from (
            select
                state.step_slug,
                state.status,
                state.remaining_deps,
                (
                    select definition.step_index from pgflow.steps as definition
                    where definition.flow_slug = state.flow_slug and definition.step_slug = state.step_slug
                ),
                pg_catalog.count(*) filter (where task.status = 'started') as started,
                pg_catalog.count(*) filter (where task.status = 'queued') as queued,
                pg_catalog.max(task.attempts_count) filter (where task.status = 'queued') as attempts
            from pgflow.step_states as state
            left join pgflow.step_tasks as task
                on task.run_id = state.run_id
                and task.step_slug = state.step_slug
                and task.status in ('queued', 'started')
            where state.run_id = _progress_of.run_id and state.status in ('created', 'started')
            group by state.flow_slug, state.step_slug, state.status, state.remaining_deps
        ) as step
    );
end
$$;

comment on function pgflow_worker._progress_of(uuid) is
'What a run''s unfinished steps do or wait for, as text; null if there are none.';

revoke execute on function pgflow_worker._progress_of(uuid) from public;

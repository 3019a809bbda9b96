create function pgflow_worker._progress()
returns table (
    flow_slug text,
    run_id uuid,
    run_status text,
    run_started_at timestamptz,
    run_ended_at timestamptz,
    step_slug text,
    step_index integer,
    status text,
    tasks_done integer,
    tasks_total integer,
    failed_attempts bigint,
    started_at timestamptz,
    ended_at timestamptz,
    mean_ms double precision,
    left_ms double precision
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgflow_worker._check_pgflow();
    return query
    with chosen as materialized (
        select run.flow_slug, run.run_id, run.status, run.started_at, run.failed_at
        from pgflow.runs as run
        where run.status = 'started'
        union all
        select run.flow_slug, run.run_id, run.status, run.started_at, run.failed_at
        from pgflow.runs as run
        where run.status = 'failed'
            and run.failed_at > pg_catalog.clock_timestamp() - interval '1 hour'
            -- There is no index on failed_at.
            and run.run_id in (
                select attempt.run_id
                from pgflow.flows as flow
                join pgflow_worker.attempts as attempt on attempt.flow_slug = flow.flow_slug
                where attempt.finished_at > pg_catalog.clock_timestamp() - interval '1 hour'
                    and attempt.outcome not in ('completed', 'snoozed')
            )
    ),
    flow as materialized (
        select chosen.flow_slug, pg_catalog.min(chosen.started_at) as since
        from chosen
        group by chosen.flow_slug
    ),
    failure as materialized (
        select attempt.run_id, attempt.step_slug, pg_catalog.count(*) as attempts
        from flow
        join pgflow_worker.attempts as attempt on attempt.flow_slug = flow.flow_slug
        where attempt.finished_at >= flow.since
            and attempt.outcome not in ('completed', 'snoozed')
            and attempt.outcome in ('failed', 'died', 'crashed')
        group by attempt.run_id, attempt.step_slug
    ),
    former as materialized (
        select former_run.run_id
        from flow
        cross join lateral (
            select run.run_id
            from pgflow.runs as run
            -- Not "=", with which the order would mean nothing: from the end of the index on flow_slug, where among
            -- equals the rows that were written last are. There is no index on the time.
            where run.flow_slug between flow.flow_slug and flow.flow_slug and run.status = 'completed'
            order by run.flow_slug desc
            limit 5
        ) as former_run
    ),
    usual as materialized (
        select
            state.flow_slug,
            state.step_slug,
            pg_catalog.avg(size.initial_tasks) as tasks,
            pg_catalog.avg(sample.mean_ms) as mean_ms
        from former
        join pgflow.step_states as state on state.run_id = former.run_id
        -- Where the inner table has no such column, before pgflow 0.7, the name means the outer one.
        cross join (select 1 as initial_tasks) as without_maps
        cross join lateral (
            select (select initial_tasks from (select state.*) as this) as initial_tasks
        ) as size
        cross join lateral (
            select pg_catalog.avg(attempt.duration_ms) as mean_ms
            from (
                select one.duration_ms
                from pgflow_worker.attempts as one
                where one.run_id = state.run_id and one.step_slug = state.step_slug and one.outcome = 'completed'
                limit 100
            ) as attempt
        ) as sample
        where state.status = 'completed'
        group by state.flow_slug, state.step_slug
    )
    select
        chosen.flow_slug,
        chosen.run_id,
        chosen.status,
        chosen.started_at,
        chosen.failed_at,
        state.step_slug,
        step.step_index,
        state.status,
        count.done,
        count.total,
        coalesce(failure.attempts, 0),
        state.started_at,
        coalesce(state.completed_at, state.failed_at, chosen.failed_at),
        sample.mean_ms,
        case
            when chosen.status <> 'started' then null
            when state.status in ('completed', 'skipped') then 0
            else
                coalesce(sample.mean_ms, usual.mean_ms)
                * coalesce(count.total, usual.tasks)::double precision
                - coalesce(sample.mean_ms, usual.mean_ms) * count.done
        end
    from chosen
    join pgflow.step_states as state on state.run_id = chosen.run_id
    join pgflow.steps as step on step.flow_slug = state.flow_slug and step.step_slug = state.step_slug
    cross join (select 1 as initial_tasks) as without_maps
    cross join lateral (
        select (select initial_tasks from (select state.*) as this) as initial_tasks
    ) as size
    cross join lateral (
        select
            case state.status
                when 'created' then 0
                when 'completed' then coalesce(size.initial_tasks, 0)
                when 'skipped' then coalesce(size.initial_tasks, 0)
                else coalesce(size.initial_tasks - coalesce(state.remaining_tasks, size.initial_tasks), 0)
            end as done,
            case
                when state.status in ('completed', 'skipped') then coalesce(size.initial_tasks, 0)
                else size.initial_tasks
            end as total
    ) as count
    cross join lateral (
        select pg_catalog.avg(attempt.duration_ms) as mean_ms
        from (
            select one.duration_ms
            from pgflow_worker.attempts as one
            where one.run_id = state.run_id and one.step_slug = state.step_slug and one.outcome = 'completed'
            limit 100
        ) as attempt
    ) as sample
    left join failure on failure.run_id = state.run_id and failure.step_slug = state.step_slug
    left join usual on usual.flow_slug = state.flow_slug and usual.step_slug = state.step_slug
    order by chosen.started_at, chosen.run_id, step.step_index;
end
$$;

comment on function pgflow_worker._progress() is
'The steps of runs that are not finished, and of those that failed in the last hour: for the views run_progress and '
'step_progress. left_ms: how long the handlers of the step''s other tasks will take, one after another; null: unknown. '
'Raises PW004 without pgflow.';

revoke execute on function pgflow_worker._progress() from public;

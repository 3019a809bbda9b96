create function pgflow_worker._run_spans(run_id uuid)
returns table (
    step_slug text, task_index integer, mark text, began_at timestamptz, ended_at timestamptz
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    return query
    with attempt as (
        select
            done.step_slug,
            done.task_index,
            done.outcome,
            done.finished_at,
            done.finished_at - pg_catalog.make_interval(secs => coalesce(done.duration_ms, 0) / 1000) as began_at
        from pgflow_worker.attempts as done
        where done.run_id = _run_spans.run_id
    ),
    last as (
        select
            attempt.step_slug,
            attempt.task_index,
            max(attempt.finished_at) as finished_at,
            -- That of a worker which has lost the task says nothing of the attempt that counts.
            max(attempt.finished_at) filter (where attempt.outcome <> 'discarded') as counted_at,
            pg_catalog.bool_or(attempt.outcome = 'failed') as has_failed
        from attempt
        group by attempt.step_slug, attempt.task_index
    ),
    -- pgflow's queued_at is when the transaction began that completed the last dependency: before its handler ran.
    ready as (
        select dep.step_slug, max(attempt.finished_at) as at
        from pgflow.runs as run
        join pgflow.deps as dep on dep.flow_slug = run.flow_slug
        join attempt on attempt.step_slug = dep.dep_slug and attempt.outcome = 'completed'
        where run.run_id = _run_spans.run_id
        group by dep.step_slug
    ),
    task as (
        select
            known.step_slug,
            known.task_index,
            known.status,
            greatest(
                known.queued_at, case when ready.at < coalesce(known.started_at, 'infinity') then ready.at end
            ) as queued_at,
            known.started_at,
            greatest(
                known.queued_at,
                ready.at,
                last.finished_at,
                coalesce(
                    known.completed_at,
                    known.failed_at,
                    skipped.at,
                    run.completed_at,
                    run.failed_at,
                    statement_timestamp()
                )
            ) as ended_at,
            known.started_at is not null
            and (last.counted_at is null or last.counted_at < known.started_at) as is_unrecorded,
            known.status = 'failed' and last.has_failed is not true as failed_unrecorded
        from pgflow.step_tasks as known
        join pgflow.runs as run on run.run_id = known.run_id
        left join (
            select
                state.step_slug,
                -- Not in every version of pgflow.
                (pg_catalog.to_jsonb(state) ->> 'skipped_at')::timestamptz as at
            from pgflow.step_states as state
            where state.run_id = _run_spans.run_id and state.status = 'skipped'
        ) as skipped on skipped.step_slug = known.step_slug
        left join ready on ready.step_slug = known.step_slug
        left join last
            on last.step_slug = known.step_slug and last.task_index = known.task_index
        where known.run_id = _run_spans.run_id
    )
    select task.step_slug, task.task_index, '.', task.queued_at, task.ended_at
    from task
    union all
    select task.step_slug, task.task_index, '#', task.started_at, greatest(task.started_at, task.ended_at)
    from task
    where task.is_unrecorded
    union all
    select
        attempt.step_slug,
        attempt.task_index,
        '#',
        greatest(attempt.began_at, task.queued_at),
        greatest(attempt.finished_at, task.queued_at)
    from attempt
    join task on task.step_slug = attempt.step_slug and task.task_index = attempt.task_index
    union all
    select attempt.step_slug, attempt.task_index, 'x', attempt.finished_at, attempt.finished_at
    from attempt
    where attempt.outcome in ('failed', 'died', 'suspected', 'crashed')
    union all
    select task.step_slug, task.task_index, 'x', task.ended_at, task.ended_at
    from task
    where task.failed_unrecorded;
end
$$;

comment on function pgflow_worker._run_spans(uuid) is
'When a run''s tasks waited and ran, to be painted one over the other: . from being queued to the task''s end; '
'# attempts, from pgflow_worker.attempts, because pgflow''s timestamps are transaction starts, and from pgflow''s for '
'those that are running or that another kind of worker made; x the ends of attempts that failed or whose worker died.';

revoke execute on function pgflow_worker._run_spans(uuid) from public;

create function pgflow_worker.run_diagram(run_id uuid)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    run record;
    notes jsonb;
begin
    run := pgflow_worker._run_summary(run_id);
    with span as (
        select * from pgflow_worker._run_spans(run_diagram.run_id)
    ),
    times as (
        select
            span.step_slug,
            min(span.began_at) filter (where span.mark = '.') as queued_at,
            min(span.began_at) filter (where span.mark = '#') as began_at,
            max(span.ended_at) filter (where span.mark = '#') as ended_at
        from span
        group by span.step_slug
    ),
    tasks as (
        select
            task.step_slug,
            pg_catalog.count(*) as total,
            pg_catalog.count(*) filter (where task.status = 'started') as started,
            pg_catalog.count(*) filter (where task.status = 'completed') as completed,
            pg_catalog.count(*) filter (where task.status = 'failed') as failed,
            max(task.attempts_count) as attempts
        from pgflow.step_tasks as task
        where task.run_id = run_diagram.run_id
        group by task.step_slug
    ),
    seen as (
        select
            state.step_slug,
            step.step_type,
            state.remaining_deps,
            case when state.status = 'skipped' then pg_catalog.to_jsonb(state) ->> 'skip_reason' end as skip_reason,
            case
                when state.status not in ('created', 'started') then state.status
                when run.status <> 'started' then 'cancelled'
                when state.status = 'started' and tasks.started = 0 then 'queued'
                else state.status
            end as status,
            tasks.total,
            tasks.completed,
            tasks.failed,
            tasks.attempts,
            times.began_at is not null as has_begun,
            extract(epoch from times.began_at - times.queued_at) as waited,
            extract(epoch from times.ended_at - times.began_at) as took,
            extract(epoch from statement_timestamp() - greatest(times.queued_at, times.ended_at)) as waiting
        from pgflow.step_states as state
        join pgflow.steps as step on step.flow_slug = state.flow_slug and step.step_slug = state.step_slug
        left join times on times.step_slug = state.step_slug
        left join tasks on tasks.step_slug = state.step_slug
        where state.run_id = run_diagram.run_id
    )
    select pg_catalog.jsonb_object_agg(
        seen.step_slug,
        pg_catalog.jsonb_build_object(
            'status', seen.status,
            'text', pg_catalog.concat_ws(
                '<br>',
                case
                    when seen.step_type = 'map' and seen.total is not null then pg_catalog.concat_ws(
                        ', ',
                        pg_catalog.format('%s of %s tasks', seen.completed, seen.total),
                        case when seen.failed > 0 then pg_catalog.format('%s failed', seen.failed) end
                    )
                end,
                case seen.status
                    when 'created' then pg_catalog.format(
                        'waits for %s step%s', seen.remaining_deps, case when seen.remaining_deps <> 1 then 's' end
                    )
                    when 'queued' then
                        'waiting for ' || pgflow_worker._duration_text(greatest(seen.waiting, 0))
                    when 'started' then 'running for ' || pgflow_worker._duration_text(seen.took)
                    when 'skipped' then
                        pg_catalog.concat_ws(': ', 'skipped', pg_catalog.replace(seen.skip_reason, '_', ' '))
                    when 'cancelled' then
                        case when seen.has_begun then 'ended with the run' else 'not run' end
                    else pg_catalog.concat_ws(
                        ', ',
                        case when seen.status <> 'completed' then seen.status end,
                        'took ' || pgflow_worker._duration_text(seen.took)
                    )
                end,
                case
                    when seen.status <> 'queued' and seen.waited >= 1
                        then 'waited ' || pgflow_worker._duration_text(seen.waited)
                end,
                case
                    when seen.attempts > 1 then pg_catalog.format('%s attempts', seen.attempts)
                    when seen.attempts = 1 and seen.status = 'queued' and seen.step_type = 'single'
                        then 'after 1 attempt'
                end
            )
        )
    )
    into notes
    from seen;
    return pgflow_worker._flowchart(
        run.flow_slug, pg_catalog.concat_ws(': ', run.flow_slug, run.summary), coalesce(notes, '{}')
    );
end
$$;

comment on function pgflow_worker.run_diagram(uuid) is
'A run as the text of a Mermaid flowchart: its flow''s steps, coloured by their state, with how long they took or '
'wait. A step whose tasks are all in the queue is queued; one that its run''s end has overtaken, cancelled. '
'Raises PW002 for an unknown run.';

revoke execute on function pgflow_worker.run_diagram(uuid) from public;

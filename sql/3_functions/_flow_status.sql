create function pgflow_worker._flow_status()
returns table (
    flow_slug text,
    version integer,
    slots integer,
    busy bigint,
    schedule text,
    paused text,
    waiting bigint,
    oldest interval,
    later bigint,
    running bigint,
    failed bigint
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    queue regclass;
    hidden bigint;
begin
    perform pgflow_worker._check_pgflow();
    for flow_slug, version, slots, busy, schedule, paused, running, failed in
        select
            flow.flow_slug,
            flow.version,
            flow.workers,
            (
                select pg_catalog.count(*)
                from pgflow_worker._slots(flow.flow_slug) as slot
                where slot.pid is not null
            ),
            (
                select pg_catalog.string_agg(kind.jobs, ', ' order by kind.jobs)
                from (
                    select
                        job.schedule
                        || case when pg_catalog.count(*) > 1 then ' x' || pg_catalog.count(*) else '' end
                        || case when job.flow_slug is null then ' (all)' else '' end as jobs
                    from pgflow_worker._cron_jobs() as job
                    where job.active
                        and job.database = pg_catalog.current_database()
                        and job.call is not null
                        and coalesce(job.flow_slug, flow.flow_slug) = flow.flow_slug
                    group by job.schedule, job.flow_slug
                ) as kind
            ),
            pg_catalog.left(
                pg_catalog.regexp_replace(pgflow_worker._pause_reason(flow.flow_slug), '\s+', ' ', 'g'), 40
            ),
            (
                select pg_catalog.count(*)
                from pgflow.step_tasks as task
                where task.status = 'started' and task.flow_slug = flow.flow_slug
            ),
            (
                select pg_catalog.count(distinct (task.run_id, task.step_slug, task.task_index))
                from pgflow_worker.attempts as attempt
                join pgflow.step_tasks as task using (run_id, step_slug, task_index)
                where attempt.flow_slug = flow.flow_slug
                    and attempt.finished_at > pg_catalog.clock_timestamp() - interval '1 hour'
                    and attempt.outcome not in ('completed', 'snoozed')
                    and task.status = 'failed'
            )
        from pgflow_worker.flows as flow
        order by flow.flow_slug
    loop
        waiting := null;
        oldest := null;
        later := null;
        queue := pg_catalog.to_regclass(pgflow_worker._queue_table(flow_slug, 'q'));
        if queue is not null then
            execute pg_catalog.format(
                'select
                    pg_catalog.count(*) filter (where message.vt <= $1),
                    pg_catalog.date_trunc(''second'', $1 - pg_catalog.min(message.vt) filter (where message.vt <= $1)),
                    pg_catalog.count(*) filter (where message.vt > $1)
                from %s as message',
                queue
            ) into waiting, oldest, hidden using pg_catalog.clock_timestamp();
            -- The messages of tasks that run are hidden as well.
            later := greatest(hidden - running, 0);
        end if;
        return next;
    end loop;
end
$$;

comment on function pgflow_worker._flow_status() is
'The rows of the view flow_status. Raises PW004 without pgflow.';

revoke execute on function pgflow_worker._flow_status() from public;

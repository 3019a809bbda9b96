create function pgflow_worker._recent_failures()
returns table (
    failed_at timestamptz,
    flow_slug text,
    step_slug text,
    task integer,
    attempt text,
    error text,
    task_is text,
    retried_at timestamptz,
    outcome text,
    run_id uuid,
    traceback text,
    log text
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    message_id bigint;
    queue regclass;
begin
    perform pgflow_worker._check_pgflow();
    for failed_at, flow_slug, step_slug, task, attempt, error, task_is, outcome, run_id, traceback, log, message_id in
        select
            failure.finished_at,
            flow.flow_slug,
            failure.step_slug,
            failure.task_index,
            failure.attempt || '/' || coalesce(step.opt_max_attempts, flow.opt_max_attempts),
            failure.error,
            coalesce(current_task.status, 'deleted'),
            failure.outcome,
            failure.run_id,
            failure.traceback,
            failure.log,
            current_task.message_id
        from pgflow.flows as flow
        cross join lateral (
            select * from pgflow_worker.attempts as one
            where one.flow_slug = flow.flow_slug
                and one.outcome not in ('completed', 'snoozed')
                and one.finished_at > pg_catalog.clock_timestamp() - interval '1 day'
            order by one.finished_at desc
            limit 50
        ) as failure
        left join pgflow.steps as step
            on step.flow_slug = failure.flow_slug and step.step_slug = failure.step_slug
        left join pgflow.step_tasks as current_task
            on current_task.run_id = failure.run_id
            and current_task.step_slug = failure.step_slug
            and current_task.task_index = failure.task_index
        order by failure.finished_at desc
    loop
        retried_at := null;
        queue := pg_catalog.to_regclass(pgflow_worker._queue_table(flow_slug, 'q'));
        if task_is = 'queued' and queue is not null then
            execute pg_catalog.format('select message.vt from %s as message where message.msg_id = $1', queue)
            into retried_at using message_id;
        end if;
        return next;
    end loop;
end
$$;

comment on function pgflow_worker._recent_failures() is
'The rows of the view recent_failures. Raises PW004 without pgflow.';

revoke execute on function pgflow_worker._recent_failures() from public;

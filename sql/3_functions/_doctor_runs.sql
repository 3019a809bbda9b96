create function pgflow_worker._doctor_runs()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.to_regnamespace('pgflow') is null then
        return;
    end if;
    -- Flows that were never worked on here belong to another kind of worker.
    return query
    select
        'error',
        pg_catalog.format(
            case when pg_catalog.count(*) = 1
                then '%s run of flow "%s" is not finished, and the flow is not deployed'
                else '%s runs of flow "%s" are not finished, and the flow is not deployed'
            end,
            pg_catalog.count(*), run.flow_slug
        ),
        'nothing will work on it',
        pg_catalog.format(
            'select pgflow_worker.cancel_run(run_id) from pgflow.runs where flow_slug = %L and status = ''started'';  '
            '-- or deploy its module again: select * from pgflow_worker.rollback_deploy(''its module'');',
            run.flow_slug
        )
    from pgflow.runs as run
    where run.status = 'started'
        and not exists (select from pgflow_worker.flows as flow where flow.flow_slug = run.flow_slug)
        and exists (select from pgflow_worker.invocations as call where call.flow_slug = run.flow_slug)
    group by run.flow_slug
    order by run.flow_slug;

    return query
    select
        'note',
        pg_catalog.format(
            case when pg_catalog.count(*) = 1
                then '%s task of flow "%s" failed for good in the last hour'
                else '%s tasks of flow "%s" failed for good in the last hour'
            end,
            pg_catalog.count(*), failed.flow_slug
        ),
        'its run has failed',
        pg_catalog.format(
            'select * from pgflow_worker.recent_failures where flow_slug = %L limit 1 \gx', failed.flow_slug
        )
    from (
        select distinct attempt.flow_slug, attempt.run_id, attempt.step_slug, attempt.task_index
        from pgflow_worker.attempts as attempt
        join pgflow.step_tasks as task using (run_id, step_slug, task_index)
        where attempt.outcome not in ('completed', 'snoozed')
            and attempt.finished_at > pg_catalog.clock_timestamp() - interval '1 hour'
            and task.status = 'failed'
            and exists (select from pgflow_worker.flows as flow where flow.flow_slug = attempt.flow_slug)
    ) as failed
    group by failed.flow_slug
    order by failed.flow_slug;
end
$$;

comment on function pgflow_worker._doctor_runs() is
'The findings of doctor() about runs: of flows that are not deployed any more, and tasks that failed for good.';

revoke execute on function pgflow_worker._doctor_runs() from public;

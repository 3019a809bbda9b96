create function pgflow_worker._prune_runs(
    first tid, beyond tid, cutoff timestamptz, batch_size integer, out runs integer, out tasks integer
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    old record;
    unread bigint [];
    deleted integer;
begin
    runs := 0;
    tasks := 0;
    for old in
        select run.run_id, run.flow_slug
        from pgflow.runs as run
        where run.ctid >= first and run.ctid < beyond
            and run.status <> 'started'
            and coalesce(run.completed_at, run.failed_at) < cutoff
        for update skip locked
    loop
        -- Versions of pgflow have left some in the queue.
        unread := array(
            select task.message_id from pgflow.step_tasks as task
            where task.run_id = old.run_id and task.status in ('queued', 'started')
        );
        if pg_catalog.cardinality(unread) > 0
            and pg_catalog.to_regclass(pgflow_worker._queue_table(old.flow_slug, 'q')) is not null
        then
            execute pg_catalog.format(
                'delete from %s where msg_id = any($1) and message ->> ''run_id'' = $2',
                pgflow_worker._queue_table(old.flow_slug, 'q')
            ) using unread, old.run_id::text;
        end if;
        delete from pgflow.step_tasks as task where task.run_id = old.run_id;
        get diagnostics deleted = row_count;
        delete from pgflow.step_states as state where state.run_id = old.run_id;
        delete from pgflow.runs as run where run.run_id = old.run_id;
        runs := runs + 1;
        tasks := tasks + deleted;
        exit when runs + tasks >= batch_size;
    end loop;
end
$$;

comment on function pgflow_worker._prune_runs(tid, tid, timestamptz, integer) is
'Deletes runs that ended before the time, with their steps and tasks, in a range of the table''s pages, until that '
'are batch_size rows.';

revoke execute on function pgflow_worker._prune_runs(tid, tid, timestamptz, integer) from public;

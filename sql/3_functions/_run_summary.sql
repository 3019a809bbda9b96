create function pgflow_worker._run_summary(
    run_id uuid,
    out flow_slug text,
    out status text,
    out started_at timestamptz,
    out ended_at timestamptz,
    out summary text
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    select
        run.flow_slug,
        run.status,
        run.started_at,
        greatest(
            run.started_at,
            coalesce(run.completed_at, run.failed_at, statement_timestamp()),
            -- pgflow's timestamps are transaction starts: a handler with tx has begun then, not ended.
            case when run.status <> 'started' then (
                select max(attempt.finished_at)
                from pgflow_worker.attempts as attempt
                where attempt.run_id = _run_summary.run_id and attempt.outcome <> 'discarded'
            ) end
        )
    into flow_slug, status, started_at, ended_at
    from pgflow.runs as run
    where run.run_id = _run_summary.run_id;
    if not found then
        perform pgflow_worker._check_run(run_id);
    end if;
    summary := pg_catalog.format(
        case when status = 'started' then 'running for %2$s' else '%1$s after %2$s' end,
        status,
        pgflow_worker._duration_text(extract(epoch from ended_at - started_at))
    );
end
$$;

comment on function pgflow_worker._run_summary(uuid) is
'A run''s flow, status and times; of a run that has not ended, ended_at is now. summary says it in words: '
'completed after 3.4 s. Raises PW002 if there is no such run.';

revoke execute on function pgflow_worker._run_summary(uuid) from public;

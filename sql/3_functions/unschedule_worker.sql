create function pgflow_worker.unschedule_worker(flow_slug text default null)
returns table (job text, schedule text, status text, statement text)
language sql
set search_path = pg_catalog, pg_temp
as $$
    select removed.* from pgflow_worker._schedule_jobs(flow_slug, 0, null, null) as removed
$$;

comment on function pgflow_worker.unschedule_worker(text) is
'Removes the current role''s jobs that schedule_worker() has made for a flow, or with null those of all flows '
'together. A call that is running goes on to its end. Where pg_cron is in another database, "statement" is to be run '
'in it. Raises PW013.';

revoke execute on function pgflow_worker.unschedule_worker(text) from public;

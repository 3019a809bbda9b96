create function pgflow_worker._job_prefix(flow_slug text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format(
        'pgflow-worker--%s--%s--', pg_catalog.current_database(), coalesce(flow_slug, '*')
    )
$$;

comment on function pgflow_worker._job_prefix(text) is
'What the names of the pg_cron jobs for a flow''s workers begin with; null: those for workers of all flows. '
'A job''s number follows. A role''s job names are unique over all databases.';

revoke execute on function pgflow_worker._job_prefix(text) from public;

create function pgflow_worker._may_see_jobs()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    -- A name in a schema that may not be used would be an error.
    select coalesce(
        (
            select pg_catalog.has_schema_privilege(class.relnamespace, 'usage')
                and pg_catalog.has_table_privilege(class.oid, 'select')
            from pg_catalog.pg_class as class
            join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
            where namespace.nspname = 'cron' and class.relname = 'job'
        ),
        false
    )
$$;

comment on function pgflow_worker._may_see_jobs() is
'Whether pg_cron keeps its jobs in this database and the caller may read the table; row security shows a role its own.';

revoke execute on function pgflow_worker._may_see_jobs() from public;

create function pgflow_worker._may_see_jobs()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    -- Only pg_cron's own table: without pg_cron anybody could have put something else there. And a name in a schema
    -- that may not be used would be an error.
    select exists (
        select from pg_catalog.pg_extension as extension
        join pg_catalog.pg_depend as depend
            on depend.refclassid = 'pg_catalog.pg_extension'::regclass and depend.refobjid = extension.oid
            and depend.classid = 'pg_catalog.pg_class'::regclass and depend.deptype = 'e'
        join pg_catalog.pg_class as class on class.oid = depend.objid
        join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
        where extension.extname = 'pg_cron' and namespace.nspname = 'cron' and class.relname = 'job'
            and pg_catalog.has_schema_privilege(namespace.oid, 'usage')
            and pg_catalog.has_table_privilege(class.oid, 'select')
    )
$$;

comment on function pgflow_worker._may_see_jobs() is
'Whether pg_cron keeps its jobs in this database and the caller may read the table; row security shows a role its own.';

revoke execute on function pgflow_worker._may_see_jobs() from public;

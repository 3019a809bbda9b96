create function pgflow_worker._doctor_may_read()
returns boolean
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    -- A view, or a type with a cast, in the place of a table would run its owner's code as the superuser.
    select not (select caller.rolsuper from pg_catalog.pg_roles as caller where caller.rolname = current_user)
        or not exists (
            select from pg_catalog.pg_namespace as namespace
            left join pg_catalog.pg_class as class
                on class.relnamespace = namespace.oid and class.relkind in ('r', 'p', 'v', 'm', 'f')
            join pg_catalog.pg_roles as owner on owner.oid in (namespace.nspowner, class.relowner)
            where namespace.nspname in ('pgflow', 'pgmq') and not owner.rolsuper
        )
$$;

comment on function pgflow_worker._doctor_may_read() is
'Whether doctor() may read the tables of pgflow and pgmq: a superuser''s may only if they belong to superusers.';

revoke execute on function pgflow_worker._doctor_may_read() from public;

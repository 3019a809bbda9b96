create function pgflow_worker._doctor_owners()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $body$
declare
    -- The one who is asked to own all of it.
    superuser constant name := (select role.rolname from pg_catalog.pg_roles as role where role.oid = 10);
    consequence text;
begin
    if not pgflow_worker._doctor_may_read() then
        return query values (
            'warning',
            'code, flows, tasks and timeouts were not looked at',
            'a superuser who reads tables of ordinary roles may run what these have put there',
            'select * from pgflow_worker.doctor();  -- again, when the tables have their owners'
        );
    end if;
    select pg_catalog.format(
        'job %s%s runs as superuser "%s" and calls what is there: the owner could do anything',
        job.jobid, ' "' || job.name || '"', job.username
    )
    into consequence
    from pgflow_worker._cron_jobs() as job
    join pg_catalog.pg_roles as role on role.rolname = job.username
    where job.active and role.rolsuper and job.database = pg_catalog.current_database()
    order by job.jobid
    limit 1;
    consequence := coalesce(consequence, 'workers and deploy() call what is there, superusers'' too: the owner could do anything');

    return query
    with schema as (
        select namespace.oid, namespace.nspname, namespace.nspowner
        from pg_catalog.pg_namespace as namespace
        where namespace.nspname in ('pgflow', 'pgmq', 'pgflow_worker', 'realtime')
    ),
    owned (nspname, owner, kind, number, cure) as (
        select
            schema.nspname, schema.nspowner, 'schema', 1::bigint,
            pg_catalog.format('alter schema %I owner to %I;', schema.nspname, superuser)
        from schema
        union all
        select
            schema.nspname, proc.proowner, 'function', pg_catalog.count(*),
            case
                when pg_catalog.count(*) = 1
                    then pg_catalog.format(
                        'alter routine %s owner to %I;', pg_catalog.min(proc.oid::regprocedure::text), superuser
                    )
                else pg_catalog.format(
                    'select format(''alter routine %%s owner to %%I'', oid::regprocedure, %L) from pg_proc '
                    'where pronamespace = %s::regnamespace and proowner = %s::regrole \gexec',
                    superuser,
                    pg_catalog.quote_literal(schema.oid::regnamespace),
                    pg_catalog.quote_literal(proc.proowner::regrole)
                )
            end
        from schema
        join pg_catalog.pg_proc as proc on proc.pronamespace = schema.oid
        where schema.nspname <> 'realtime' or proc.proname = 'send'
        group by schema.oid, schema.nspname, proc.proowner
        union all
        select
            schema.nspname, class.relowner, 'table', pg_catalog.count(*),
            case
                when pg_catalog.count(*) = 1
                    then pg_catalog.format(
                        'alter table %s owner to %I;', pg_catalog.min(class.oid::regclass::text), superuser
                    )
                else pg_catalog.format(
                    'select format(''alter table %%s owner to %%I'', oid::regclass, %L) from pg_class '
                    'where relnamespace = %s::regnamespace and relowner = %s::regrole '
                    'and relkind in (''r'', ''p'', ''v'') \gexec',
                    superuser,
                    pg_catalog.quote_literal(schema.oid::regnamespace),
                    pg_catalog.quote_literal(class.relowner::regrole)
                )
            end
        from schema
        join pg_catalog.pg_class as class on class.relnamespace = schema.oid and class.relkind in ('r', 'p', 'v')
        where schema.nspname <> 'realtime'
        group by schema.oid, schema.nspname, class.relowner
    )
    select
        'warning',
        case owned.kind
            when 'schema' then pg_catalog.format('schema "%s" belongs to role "%s"', owned.nspname, role.rolname)
            else pg_catalog.format(
                '%s %s%s of schema "%s" belong%s to role "%s"',
                owned.number, owned.kind, case when owned.number > 1 then 's' end, owned.nspname,
                case when owned.number = 1 then 's' end, role.rolname
            )
        end,
        consequence,
        owned.cure
    from owned
    join pg_catalog.pg_roles as role on role.oid = owned.owner
    where not role.rolsuper
    order by owned.nspname, owned.kind;
end
$body$;

comment on function pgflow_worker._doctor_owners() is
'The findings of doctor() about schemas, functions and tables that belong to roles which are no superusers.';

revoke execute on function pgflow_worker._doctor_owners() from public;

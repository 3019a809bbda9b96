-- CREATE EXTENSION takes a schema that is there. Its owner could add functions that are called in place of these.
do $$
begin
    if exists (
        select from pg_catalog.pg_namespace as namespace
        join pg_catalog.pg_roles as role on role.oid = namespace.nspowner
        where namespace.nspname = 'pgflow_worker' and not role.rolsuper
    ) then
        raise exception using
            errcode = 'duplicate_schema',
            message = 'schema "pgflow_worker" exists and does not belong to a superuser',
            hint = 'Drop it, or give it another name; the extension makes a schema of its own.';
    end if;
end
$$;

comment on schema pgflow_worker is
'pgflow_worker: work(), deploy(), pause() and what they need. Who may do what: grant_usage().';

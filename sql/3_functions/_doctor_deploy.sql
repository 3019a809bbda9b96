create function pgflow_worker._doctor_deploy(module text, dry_run boolean default false)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format(
        'select * from pgflow_worker.deploy(%1$L, '
        '(select source from pgflow_worker.modules where module = %1$L and current)%2$s);',
        module, case when dry_run then ', dry_run => true' end
    )
$$;

comment on function pgflow_worker._doctor_deploy(text, boolean) is
'The statement that deploys a module once more as it is stored, or shows what that would change.';

revoke execute on function pgflow_worker._doctor_deploy(text, boolean) from public;

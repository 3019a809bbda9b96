create function pgflow_worker._revision()
returns text
language sql
stable
security definer
set search_path = pg_catalog, pg_temp
as $$
    select coalesce(
        pg_catalog.string_agg(module.module || ' ' || module.version, ',' order by module.module), ''
    )
    from pgflow_worker.modules as module
    where module.current
$$;

comment on function pgflow_worker._revision() is
'Names the deployed modules'' versions; it changes with every deploy of new text. As the owner, because '
'a worker''s role may not read the modules.';

revoke execute on function pgflow_worker._revision() from public;

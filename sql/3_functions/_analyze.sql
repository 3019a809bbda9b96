create function pgflow_worker._analyze(relation regclass)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    if not exists (
        select from pg_catalog.pg_class as class
        where class.oid = relation
            and class.relnamespace in ('pgflow'::regnamespace, 'pgmq'::regnamespace)
    ) then
        raise exception using
            errcode = 'insufficient_privilege',
            message = pg_catalog.format('%s is not a table of pgflow''s or pgmq''s', relation);
    end if;
    execute pg_catalog.format('analyze (skip_locked) %s', relation);
end
$$;

comment on function pgflow_worker._analyze(regclass) is
'Renews the statistics of a table of pgflow''s or pgmq''s. As the owner, because a worker''s role may not '
'ANALYZE what others own.';

revoke execute on function pgflow_worker._analyze(regclass) from public;

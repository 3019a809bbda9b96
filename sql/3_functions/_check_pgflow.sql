create function pgflow_worker._check_pgflow()
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.to_regnamespace('pgflow') is null then
        raise exception using
            errcode = 'PW004',
            message = 'pgflow is not installed in this database',
            hint = 'Apply pgflow''s migrations, which the npm package @pgflow/core carries, '
            'for example with "make install-pgflow" from the sources of pgflow_worker.';
    end if;
    -- From 0.17 on it wants the queue's name as well.
    if pg_catalog.to_regprocedure('pgflow.start_tasks(text,bigint[],uuid)') is null
        and pg_catalog.to_regprocedure('pgflow.start_tasks(text,bigint[],uuid,text)') is null
    then
        raise exception using
            errcode = 'PW004',
            message = 'this version of pgflow is not supported',
            detail = 'The schema pgflow has no function start_tasks(text, bigint[], uuid), with or '
            'without a queue''s name.',
            hint = 'Use pgflow 0.3 to 0.17: apply the migrations of the npm package @pgflow/core.';
    end if;
    -- From pgmq 1.5 on it can be told what to read.
    if pg_catalog.to_regprocedure('pgmq.read(text,integer,integer)') is null
        and pg_catalog.to_regprocedure('pgmq.read(text,integer,integer,jsonb)') is null
    then
        raise exception using
            errcode = 'PW004',
            message = 'pgmq is missing or of a version that is not supported',
            hint = 'Install pgmq 1.4 or later, then: alter extension pgmq update;';
    end if;
    -- What a handler logs or raises may be any text, and must not keep its attempt from being stored.
    if pg_catalog.getdatabaseencoding() <> 'UTF8' then
        raise exception using
            errcode = 'PW004',
            message = pg_catalog.format(
                'the encoding of this database is %s, not UTF8', pg_catalog.getdatabaseencoding()
            ),
            hint = 'Use a database that was made with: create database my_database template template0 '
            'encoding ''UTF8'';';
    end if;
end
$$;

comment on function pgflow_worker._check_pgflow() is
'Raises PW004 if pgflow or pgmq is missing or of an unsupported version, or the encoding is not UTF8.';

revoke execute on function pgflow_worker._check_pgflow() from public;

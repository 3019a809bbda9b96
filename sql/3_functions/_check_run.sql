create function pgflow_worker._check_run(run_id uuid, lock boolean default false)
returns table (flow_slug text, status text, input jsonb)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgflow_worker._check_pgflow();
    if lock then
        perform from pgflow.runs as run where run.run_id = _check_run.run_id for update;
    end if;
    return query
    select run.flow_slug, run.status, run.input
    from pgflow.runs as run where run.run_id = _check_run.run_id;
    if not found then
        raise exception using
            errcode = 'PW002',
            message = coalesce('run ' || run_id || ' does not exist', 'run_id is null'),
            hint = 'A run that another transaction starts is seen when that has committed. The latest runs: '
            'select * from pgflow.runs order by started_at desc limit 10;';
    end if;
end
$$;

comment on function pgflow_worker._check_run(uuid, boolean) is
'A run''s flow, status and input, its row locked if wanted. Raises PW002 if there is no such run.';

revoke execute on function pgflow_worker._check_run(uuid, boolean) from public;

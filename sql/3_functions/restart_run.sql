create function pgflow_worker.restart_run(run_id uuid)
returns uuid
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    former record;
begin
    select run.* into former from pgflow_worker._check_run(run_id) as run;
    if former.status = 'started' then
        raise exception using
            errcode = 'PW016',
            message = pg_catalog.format('run %s has not ended', run_id),
            hint = pg_catalog.format('Wait for it, or cancel it first: select * from pgflow_worker.cancel_run(%L);', run_id);
    end if;
    return pgflow_worker.start_flow(former.flow_slug, former.input);
end
$$;

comment on function pgflow_worker.restart_run(uuid) is
'Starts another run of the same flow with the same input, from the beginning; returns its run_id. The former run '
'stays as it is. Raises PW016 if that has not ended, PW002 if there is none.';

revoke execute on function pgflow_worker.restart_run(uuid) from public;

create function pgflow_worker.undeploy(module text)
returns integer
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    busy record;
    flows integer;
begin
    lock table pgflow_worker.modules in share row exclusive mode;
    if not exists (
        select from pgflow_worker.modules as stored
        where stored.module = undeploy.module and stored.current
    ) then
        raise exception using
            errcode = 'PW007',
            message = pg_catalog.format('module "%s" is not deployed', module),
            hint = (
                select 'Deployed modules: '
                    || coalesce(pg_catalog.string_agg(stored.module, ', ' order by stored.module), 'none') || '.'
                from pgflow_worker.modules as stored where stored.current
            );
    end if;
    select flow.flow_slug, slot.pid
    into busy
    from pgflow_worker.flows as flow
    cross join lateral pgflow_worker._slots(flow.flow_slug) as slot
    where flow.module = undeploy.module and slot.pid is not null
    limit 1;
    if found then
        raise exception using
            errcode = 'PW009',
            message = pg_catalog.format('flow "%s" has a running worker, pid %s', busy.flow_slug, busy.pid),
            hint = pg_catalog.format(
                'Wait until it ends, sooner after: select pgflow_worker.pause(%L);', busy.flow_slug
            );
    end if;
    for busy in
        select run.flow_slug, pg_catalog.count(*) as runs
        from pgflow.runs as run
        join pgflow_worker.flows as flow using (flow_slug)
        where flow.module = undeploy.module and run.status = 'started'
        group by run.flow_slug
        order by run.flow_slug
    loop
        raise notice using
            message = pg_catalog.format(
                'unfinished runs of flow "%s", on which nothing will work: %s', busy.flow_slug, busy.runs
            ),
            hint = pg_catalog.format(
                'They go on after: select * from pgflow_worker.rollback_deploy(%L);', undeploy.module
            );
    end loop;
    delete from pgflow_worker.flows as flow where flow.module = undeploy.module;
    get diagnostics flows = row_count;
    update pgflow_worker.modules as stored set current = false
    where stored.module = undeploy.module and stored.current;
    return flows;
end
$$;

comment on function pgflow_worker.undeploy(text) is
'Forgets a deployed module and its flows; their runs and data stay. Returns the number of flows. '
'Raises PW007 if the module is not deployed, PW009 if a worker of one of its flows is running. '
'Runs as the extension''s owner.';

revoke execute on function pgflow_worker.undeploy(text) from public;

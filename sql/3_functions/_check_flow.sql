create function pgflow_worker._check_flow(flow_slug text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    deployed text;
begin
    if exists (
        select from pgflow_worker.flows as flow where flow.flow_slug = _check_flow.flow_slug
    ) then
        return;
    end if;
    select pg_catalog.string_agg(flow.flow_slug, ', ' order by flow.flow_slug)
    into deployed
    from pgflow_worker.flows as flow;
    raise exception using
        errcode = 'PW001',
        message = case
            when flow_slug is null then 'flow_slug is null'
            else pg_catalog.format('flow "%s" is not deployed', flow_slug)
        end,
        hint = 'Deployed flows: ' || coalesce(deployed, 'none')
        || '. Deploy a module with: select * from pgflow_worker.deploy(''my_module'', source);';
end
$$;

comment on function pgflow_worker._check_flow(text) is
'Raises PW001, naming the deployed flows, if this one is not among them.';

revoke execute on function pgflow_worker._check_flow(text) from public;

create function pgflow_worker.flow_diagram(flow_slug text)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    known text;
begin
    if not exists (select from pgflow.flows as flow where flow.flow_slug = flow_diagram.flow_slug) then
        select pg_catalog.string_agg(flow.flow_slug, ', ' order by flow.flow_slug)
        into known
        from pgflow.flows as flow;
        raise exception using
            errcode = 'PW001',
            message = case
                when flow_slug is null then 'flow_slug is null'
                else pg_catalog.format('flow "%s" is not in this database', flow_slug)
            end,
            hint = 'Flows in this database: ' || coalesce(known, 'none')
            || '. Deploy a module with: select * from pgflow_worker.deploy(''my_module'', source);';
    end if;
    return pgflow_worker._flowchart(flow_slug, flow_slug, '{}');
end
$$;

comment on function pgflow_worker.flow_diagram(text) is
'A flow''s steps and dependencies, as pgflow has them, as the text of a Mermaid flowchart; a map step has double '
'sides. Deployed or not. Raises PW001 for an unknown flow.';

revoke execute on function pgflow_worker.flow_diagram(text) from public;

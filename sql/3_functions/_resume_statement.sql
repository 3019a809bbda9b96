create function pgflow_worker._resume_statement(flow_slug text)
returns text
language sql
stable
set search_path = pg_catalog, pg_temp
as $$
    select pg_catalog.format(
        'select pgflow_worker.resume(%s);',
        (
            select pg_catalog.quote_literal(pause.flow_slug)
            from pgflow_worker.pauses as pause
            where pause.flow_slug = _resume_statement.flow_slug
        )
    )
$$;

comment on function pgflow_worker._resume_statement(text) is
'The statement that ends a flow''s pause: its own, or else that of all flows.';

revoke execute on function pgflow_worker._resume_statement(text) from public;

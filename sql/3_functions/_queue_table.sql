create function pgflow_worker._queue_table(flow_slug text, prefix text)
returns text
language sql
immutable
set search_path = pg_catalog, pg_temp
as $$
    select 'pgmq.' || pg_catalog.quote_ident(prefix || '_' || pg_catalog.lower(flow_slug))
$$;

comment on function pgflow_worker._queue_table(text, text) is
'The name, as SQL, of the table in which pgmq keeps a flow''s messages (prefix q) or archived messages (prefix a).';

revoke execute on function pgflow_worker._queue_table(text, text) from public;

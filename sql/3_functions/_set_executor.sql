create function pgflow_worker._set_executor(flow_slug text, address text, step_slug text, send_secrets boolean)
returns jsonb
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    from pgflow_worker import server

    return server.set_executor(plpy, flow_slug, address, step_slug, send_secrets)
$$;

comment on function pgflow_worker._set_executor(text, text, text, boolean) is
'The part of set_executor() in Python, after _load(); its answer is for _raise().';

revoke execute on function pgflow_worker._set_executor(text, text, text, boolean) from public;

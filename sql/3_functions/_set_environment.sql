create function pgflow_worker._set_environment(path text)
returns jsonb
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    from pgflow_worker import server

    return server.set_environment(plpy, path)
$$;

comment on function pgflow_worker._set_environment(text) is
'The part of set_environment() in Python, after _load(); its answer is for _raise().';

revoke execute on function pgflow_worker._set_environment(text) from public;

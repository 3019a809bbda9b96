create function pgflow_worker._set_secrets(path text)
returns jsonb
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    from pgflow_worker import server

    return server.set_secrets(plpy, path)
$$;

comment on function pgflow_worker._set_secrets(text) is
'The part of set_secrets() in Python, after _load(); its answer is for _raise().';

revoke execute on function pgflow_worker._set_secrets(text) from public;

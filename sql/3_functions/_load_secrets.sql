create function pgflow_worker._load_secrets()
returns jsonb
language plpython3u
security definer
set search_path = pg_catalog, pg_temp
as $$
    # As the owner, because a worker's role may read neither Vault nor the setting. The values stay in Python.
    from pgflow_worker import server

    return server.load_secrets(plpy)
$$;

comment on function pgflow_worker._load_secrets() is
'Makes the secrets that the flow of a running call declares known to its handlers. It returns no values, and '
'outside such a call it does nothing; its answer is for _raise(): PW014.';

revoke execute on function pgflow_worker._load_secrets() from public;

create function pgflow_worker._deploy(
    module text, source text, dry_run boolean, allow_data_loss boolean
)
returns jsonb
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    from pgflow_worker import server

    return server.deploy(plpy, module, source, dry_run, allow_data_loss)
$$;

comment on function pgflow_worker._deploy(text, text, boolean, boolean) is
'The part of deploy() in Python, after _load(); its answer is for _raise().';

revoke execute on function pgflow_worker._deploy(text, text, boolean, boolean) from public;

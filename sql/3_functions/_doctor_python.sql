create function pgflow_worker._doctor_python()
returns jsonb
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    from pgflow_worker import server

    return server.doctor(plpy)
$$;

comment on function pgflow_worker._doctor_python() is
'The part of _doctor_code() in Python, after _load(); an error is for _raise(). It imports the deployed modules, '
'which runs their top-level code.';

revoke execute on function pgflow_worker._doctor_python() from public;

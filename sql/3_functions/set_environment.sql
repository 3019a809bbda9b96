create function pgflow_worker.set_environment(path text)
returns void
language plpython3u
set search_path = pg_catalog, pg_temp
as $$
    plpy.execute("select pgflow_worker._load()")
    from pgflow_worker import server

    server.set_environment(plpy, path)
$$;

comment on function pgflow_worker.set_environment(text) is
'Names the virtual environment whose packages the modules may import; null for none. It must belong '
'to the server''s Python and nobody but root and the server''s user may be able to write to it. '
'Raises PW008. Sessions that are running keep the former environment.';

revoke execute on function pgflow_worker.set_environment(text) from public;

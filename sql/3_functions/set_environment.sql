create function pgflow_worker.set_environment(path text)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    -- Not through the environment that is set now: it may be what has to be replaced.
    perform pgflow_worker._raise(pgflow_worker._load(with_environment => false));
    perform pgflow_worker._raise(pgflow_worker._set_environment(path));
end
$$;

comment on function pgflow_worker.set_environment(text) is
'Names the virtual environment whose packages the modules may import; null for none. It must belong '
'to the server''s Python and nobody but root and the server''s user may be able to write to it. '
'Raises PW008. Sessions that are running keep the former environment. Runs as the extension''s owner.';

revoke execute on function pgflow_worker.set_environment(text) from public;

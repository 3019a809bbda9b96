create function pgflow_worker.set_secrets(path text)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgflow_worker._raise(pgflow_worker._load(with_environment => false));
    perform pgflow_worker._raise(pgflow_worker._set_secrets(path));
end
$$;

comment on function pgflow_worker.set_secrets(text) is
'Names the directory of the files that hold flows'' secrets where there is no Vault; null for none. Nobody but root '
'and the server''s user may be able to write to it, and it must not be in the data directory, and so in backups. '
'Raises PW014. Runs as the extension''s owner.';

revoke execute on function pgflow_worker.set_secrets(text) from public;

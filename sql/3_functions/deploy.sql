create function pgflow_worker.deploy(
    module text,
    source text default null,
    dry_run boolean default false,
    allow_data_loss boolean default false
)
returns table (flow_slug text, status text, changes text [])
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    answer jsonb;
begin
    perform pgflow_worker._check_pgflow();
    perform pgflow_worker._raise(pgflow_worker._load());
    answer := pgflow_worker._deploy(module, source, dry_run, allow_data_loss);
    perform pgflow_worker._raise(answer);
    if not dry_run then
        perform pgflow_worker._grant_queues();
    end if;
    return query
    select deployed.flow_slug, deployed.status, deployed.changes
    from pg_catalog.jsonb_to_recordset(answer -> 'deployed')
        as deployed (flow_slug text, status text, changes text []);
end
$$;

comment on function pgflow_worker.deploy(text, text, boolean, boolean) is
'Stores a Python module and makes its flows runnable; with source null, the text of the module that '
'the server can import under that name. A row per flow: compiled (new), verified (nothing changed), '
'updated (options changed, each listed), recompiled (other steps: the flow and all its runs were '
'deleted, only with allow_data_loss), removed (no longer in the module; its runs stay), mismatch '
'(other steps, only with dry_run, else an error), stored (a module without flows). Messages that tasks '
'have lost with their queue are sent again. '
'Runs as the extension''s owner, and so does what the module does while it is imported here. '
'Errors: PW003, PW004, PW005, PW006, PW007, PW009, PW014.';

revoke execute on function pgflow_worker.deploy(text, text, boolean, boolean) from public;

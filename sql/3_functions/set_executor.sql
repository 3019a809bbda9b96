create function pgflow_worker.set_executor(
    flow_slug text, address text, step_slug text default null, send_secrets boolean default false
)
returns void
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
begin
    perform pgflow_worker._raise(pgflow_worker._load(with_environment => true));
    perform pgflow_worker._raise(
        pgflow_worker._set_executor(flow_slug, address, step_slug, coalesce(send_secrets, false))
    );
end
$$;

comment on function pgflow_worker.set_executor(text, text, text, boolean) is
'Lets a flow''s handlers that are async or have thread=True, or one step''s, run on a Dask cluster: address is the '
'scheduler''s, such as tcp://10.0.0.7:8786; null runs the step in this server, or without a step all of the flow''s. '
'The next call of work() follows it. send_secrets: whether the flow''s secrets may be sent there; each call says it '
'anew. Whoever can reach the scheduler can run code on the cluster and in this server. Raises PW001 for an unknown '
'flow, PW002 for an address that is none or a step that cannot run there. Runs as the extension''s owner.';

revoke execute on function pgflow_worker.set_executor(text, text, text, boolean) from public;

create function pgflow_worker.rollback_deploy(
    module text,
    version integer default null,
    dry_run boolean default false,
    allow_data_loss boolean default false
)
returns table (flow_slug text, status text, changes text [])
language plpgsql
security definer
set search_path = pg_catalog, pg_temp
as $$
declare
    former text;
begin
    lock table pgflow_worker.modules in share row exclusive mode;
    select stored.source
    into former
    from pgflow_worker.modules as stored
    where stored.module = rollback_deploy.module
        and case
            when rollback_deploy.version is null then not stored.current
            else stored.version = rollback_deploy.version
        end
    order by stored.version desc
    limit 1;
    if not found then
        raise exception using
            errcode = 'PW007',
            message = case
                when version is null then pg_catalog.format('module "%s" has no former version', module)
                else pg_catalog.format('module "%s" has no version %s', module, version)
            end,
            hint = 'Versions: select module, version, current, deployed_at from pgflow_worker.modules order by 1, 2;';
    end if;
    return query
    select deployed.flow_slug, deployed.status, deployed.changes
    from pgflow_worker.deploy(module, former, dry_run, allow_data_loss) as deployed;
end
$$;

comment on function pgflow_worker.rollback_deploy(text, integer, boolean, boolean) is
'Deploys a stored module''s text of before the last deploy again, or of any version, as a new version; for an '
'undeployed module the last one. Rows and errors are those of deploy(); PW007 if there is no such version.';

revoke execute on function pgflow_worker.rollback_deploy(text, integer, boolean, boolean) from public;

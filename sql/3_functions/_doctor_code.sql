create function pgflow_worker._doctor_code()
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    answer jsonb;
begin
    -- To import a module is to run it.
    if not pg_catalog.has_function_privilege('pgflow_worker._doctor_python()', 'execute') then
        return query values (
            'note',
            pg_catalog.format('role "%s" may not deploy, so that no module was imported', current_user),
            'whether code, environment, clusters and Python files are in order is not known',
            pg_catalog.format(
                '\connect - %I',
                (
                    select pg_catalog.pg_get_userbyid(extension.extowner)
                    from pg_catalog.pg_extension as extension
                    where extension.extname = 'pgflow_worker'
                )
            )
        );
        return;
    end if;
    answer := pgflow_worker._load(with_environment => false);
    if answer ? 'raise' then
        return query values (
            'error',
            answer #>> '{raise,message}',
            pg_catalog.concat_ws(' ', 'every call fails with ' || (answer #>> '{raise,sqlstate}') || '.', answer #>> '{raise,detail}'),
            case
                when answer #>> '{raise,hint}' like '%alter extension%' and exists (
                    select from pg_catalog.pg_available_extensions as available
                    where available.name = 'pgflow_worker'
                        and available.default_version <> available.installed_version
                )
                    then 'alter extension pgflow_worker update;'
                when answer #>> '{raise,hint}' like '%make install%' then 'make install'
                else '-- ' || (answer #>> '{raise,hint}')
            end
        );
        return;
    end if;
    answer := pgflow_worker._doctor_python();
    perform pgflow_worker._raise(answer);
    return query
    select
        found.severity, found.what, found.why,
        coalesce(found.cure, pgflow_worker._doctor_deploy(found.module, found.dry_run))
    from pg_catalog.jsonb_to_recordset(answer -> 'findings')
        as found (severity text, what text, why text, cure text, module text, dry_run boolean);
end
$$;

comment on function pgflow_worker._doctor_code() is
'The findings of doctor() about the stored modules, the environment and the Python files, for roles that may deploy.';

revoke execute on function pgflow_worker._doctor_code() from public;

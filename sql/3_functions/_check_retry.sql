create function pgflow_worker._check_retry(run_id uuid)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    -- Of the functions that leave a failed run as it is, and go on with it. Those of another version: run
    -- tests/versions/test_runs.py, read what has changed in them, and add the value that the detail has.
    tested constant text [] := array[
        'dfa103ebf9da26d58885c30120080e40', -- 0.3.0
        'a2ed778396dc24bced6f7670be1771fe', -- 0.3.1
        'd43ea103f4dec5c9a79ab9c69c69fc2c', -- 0.4.0
        'ecdc1a738188a4fb217000d612456335', -- 0.4.2 and 0.5.0
        'c0f6451ee08ff264023c566a68f48409', -- 0.5.3 and 0.6.0
        '454d4fffc1fcbed1a96597f95fa8bb3d', -- 0.7.0
        '995204436ac7d5247c6038fbcbcdcb6c', -- 0.7.2 to 0.11.0
        '9e50aeb2cac4157e8236bdfd4f9b4813', -- 0.12.0
        'b08c0dbbbda08f74c0c310d441602203', -- 0.13.0 and 0.13.2
        'fbb0f99624427c355fbcfba6176c7b2f', -- 0.14.1
        '935041688ac95eff04a991f9814f3ad0', -- 0.15.1 and 0.16.0
        '1cf106b2c84ea7824207ec22a64aa4e7' -- 0.17.0
    ];
    installed constant text := (
        select pg_catalog.md5(pg_catalog.string_agg(
            proc.proname || proc.prosrc, '' order by proc.proname::text collate pg_catalog."C"
        ))
        from pg_catalog.pg_proc as proc
        where proc.pronamespace = 'pgflow'::regnamespace
            and proc.proname in (
                'start_tasks', 'complete_task', 'fail_task', 'start_ready_steps', 'maybe_complete_run',
                'cascade_complete_taskless_steps', 'cascade_resolve_conditions', '_cascade_force_skip_steps'
            )
    );
begin
    if installed <> all(tested) then
        raise exception using
            errcode = 'PW004',
            message = 'retry_run() was not tested with this version of pgflow',
            detail = 'Its functions: ' || installed,
            hint = pg_catalog.format('From the beginning: select pgflow_worker.restart_run(%L);', run_id);
    end if;
end
$$;

comment on function pgflow_worker._check_retry(uuid) is
'Raises PW004 if retry_run() was not tested with the installed version of pgflow.';

revoke execute on function pgflow_worker._check_retry(uuid) from public;

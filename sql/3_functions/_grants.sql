create function pgflow_worker._grants(level text)
returns table (privileges text, object text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    levels constant text [] := array['monitor', 'operate', 'deploy'];
begin
    -- Never TRIGGER or REFERENCES: a trigger runs as whoever works on the table.
    return query
    with member as (
        select depend.classid, depend.objid
        from pg_catalog.pg_depend as depend
        join pg_catalog.pg_extension as extension on extension.oid = depend.refobjid
        where depend.refclassid = 'pg_catalog.pg_extension'::regclass
            and depend.deptype = 'e'
            and extension.extname = 'pgflow_worker'
    ),
    relation as (
        select class.oid::regclass as name, class.relname, class.relkind = 'r' as is_table
        from member
        join pg_catalog.pg_class as class on class.oid = member.objid
        where member.classid = 'pg_catalog.pg_class'::regclass and class.relkind in ('r', 'v')
    ),
    routine as (
        select proc.oid::regprocedure as name, proc.proname
        from member
        join pg_catalog.pg_proc as proc on proc.oid = member.objid
        where member.classid = 'pg_catalog.pg_proc'::regclass
    ),
    queue as (
        select
            to_regclass(pgflow_worker._queue_table(flow.flow_slug, part.prefix)) as name,
            part.prefix,
            part.privileges
        from (
            select deployed.flow_slug from pgflow_worker.flows as deployed
            union
            select known.flow_slug from pgflow.flows as known
        ) as flow
        cross join (
            values ('q', 'select, insert, update, delete'), ('a', 'select, insert')
        ) as part (prefix, privileges)
    ),
    given (minimum, privileges, object) as (
        select 'monitor', 'usage', 'schema ' || name
        from pg_catalog.unnest(array['pgflow_worker', 'pgflow', 'pgmq']) as name
        union all
        select 'monitor', 'select', pg_catalog.format('table %s', relation.name)
        from relation
        where relation.relname <> 'modules'
        union all
        select 'monitor', 'select', pg_catalog.format('table %s', class.oid::regclass)
        from pg_catalog.pg_class as class
        where class.relnamespace = 'pgflow'::regnamespace and class.relkind in ('r', 'p', 'v')
        union all
        select 'monitor', 'select', pg_catalog.format('table %s', queue.name)
        from queue
        where queue.name is not null and queue.prefix = 'q'
        union all
        select 'monitor', 'execute', pg_catalog.format('routine %s', routine.name)
        from routine
        where routine.proname in (
            'flow_diagram', 'run_diagram', 'run_timeline', '_flowchart', '_run_summary', '_run_spans', '_duration_text',
            'doctor', '_check_pgflow', '_cron_has_seconds', '_cron_jobs', '_cron_jobs_of_nobody', '_may_see_jobs',
            '_slots', '_stalled_tasks', '_job_prefix', '_check_run',
            '_flow_status', '_pause_reason', '_progress', '_queue_table', '_recent_failures', '_worker_status'
        ) or routine.proname like '\_doctor\_%' and routine.proname <> '_doctor_python'

        union all
        select 'operate', 'usage', 'schema realtime'
        union all
        select
            'operate',
            case relation.relname
                when 'flows' then 'update (workers)'
                when 'pauses' then 'insert (flow_slug, reason), update (reason), delete'
                when 'attempts' then 'insert, delete'
                when 'invocations' then 'insert, delete'
                when 'living' then 'insert'
                else 'insert, update, delete'
            end,
            pg_catalog.format('table %s', relation.name)
        from relation
        where relation.is_table and relation.relname not in ('modules', 'settings', 'executors')
        union all
        select 'operate', 'insert, update', 'table pgflow.' || name
        from pg_catalog.unnest(array['runs', 'step_states', 'step_tasks', 'workers']) as name
        union all
        select 'operate', queue.privileges, pg_catalog.format('table %s', queue.name)
        from queue
        where queue.name is not null
        union all
        select 'operate', 'execute', pg_catalog.format('routine %s', routine.name)
        from routine
        where routine.proname in (
            'work', 'work_batch', 'replay_task', 'pause', 'resume', 'schedule_worker', 'unschedule_worker',
            'start_flow', 'wait_for_run', 'restart_run', 'cancel_run', 'retry_run'
        )
            or (
                routine.proname like '\_%'
                and routine.proname not in (
                    '_deploy', '_doctor_python', '_set_environment', '_set_executor', '_set_secrets', '_grants', '_grant_queues',
                    '_send_missing'
                )
            )
        union all
        select 'operate', 'execute', pg_catalog.format('routine %s', proc.oid::regprocedure)
        from pg_catalog.pg_proc as proc
        join pg_catalog.pg_namespace as namespace on namespace.oid = proc.pronamespace
        where not proc.prosecdef
            and (namespace.nspname, proc.proname) in (
                ('pgflow', 'start_flow'),
                ('pgflow', 'start_tasks'),
                ('pgflow', 'complete_task'),
                ('pgflow', 'fail_task'),
                ('pgflow', 'start_ready_steps'),
                ('pgflow', 'cascade_complete_taskless_steps'),
                ('pgflow', 'maybe_complete_run'),
                ('pgflow', 'calculate_retry_delay'),
                ('pgflow', 'set_vt_batch'),
                ('pgflow', 'cascade_resolve_conditions'),
                ('pgflow', '_cascade_force_skip_steps'),
                ('pgflow', '_archive_task_message'),
                ('pgmq', 'format_table_name'),
                ('pgmq', 'read'),
                ('pgmq', 'archive'),
                ('pgmq', 'set_vt'),
                ('pgmq', 'send_batch'),
                ('pgmq', '_send_batch'),
                ('pgmq', '_validate_batch_params'),
                ('realtime', 'send')
            )

        union all
        select 'deploy', 'execute', pg_catalog.format('routine %s', routine.name)
        from routine
        where routine.proname in (
            'deploy', 'undeploy', 'rollback_deploy', 'set_environment', 'set_executor', 'set_secrets', '_doctor_python',
            'prune_data_older_than'
        )
        union all
        -- Who may do this could remove what has been done; operate may not.
        select 'deploy', 'delete', 'table pgflow.' || name
        from pg_catalog.unnest(array['runs', 'step_states', 'step_tasks', 'workers']) as name
        union all
        select 'deploy', 'delete', pg_catalog.format('table %s', queue.name)
        from queue
        where queue.name is not null and queue.privileges = 'select, insert'
    )
    select given.privileges, given.object
    from given
    where pg_catalog.array_position(levels, given.minimum)
        <= pg_catalog.array_position(levels, _grants.level);
end
$$;

comment on function pgflow_worker._grants(text) is
'What a level of grant_usage() may do, with what lower levels may, as the parts of GRANT statements. The '
'objects are looked up, so that new helper functions, tables and flows'' queues are among them.';

revoke execute on function pgflow_worker._grants(text) from public;

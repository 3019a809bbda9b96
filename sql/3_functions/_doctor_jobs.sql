create function pgflow_worker._doctor_jobs()
returns table (severity text, what text, why text, cure text)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $body$
declare
    here constant text := pg_catalog.current_database();
    has_cron constant boolean := exists (
        select from pg_catalog.pg_extension as extension where extension.extname = 'pg_cron'
    );
    job record;
    label text;
    command text;
    role oid;
begin
    if has_cron and not pgflow_worker._may_see_jobs() then
        return query values (
            'note',
            pg_catalog.format('role "%s" may not see pg_cron''s jobs', current_user),
            'what is wrong with them is not known',
            pg_catalog.format('grant usage on schema cron to %I;', current_user)
        );
        return;
    end if;
    if has_cron and not exists (
        select from pg_catalog.pg_roles as caller
        where caller.rolname = current_user and (caller.rolsuper or caller.rolbypassrls)
    ) then
        return query values (
            'note',
            pg_catalog.format('role "%s" sees its own jobs of pg_cron only', current_user),
            'what is wrong with others is not known',
            pg_catalog.format(
                '\connect - %I',
                (
                    select pg_catalog.pg_get_userbyid(extension.extowner)
                    from pg_catalog.pg_extension as extension
                    where extension.extname = 'pg_cron'
                )
            )
        );
    end if;
    for job in
        select nobodys.*, ours.jobid is not null as is_ours
        from pgflow_worker._cron_jobs_of_nobody() as nobodys
        left join pgflow_worker._cron_jobs() as ours on ours.jobid = nobodys.jobid
    loop
        return query values (
            'error',
            pg_catalog.format(
                'job %s%s runs as role "%s", which does not exist', job.jobid, ' "' || job.name || '"', job.username
            ),
            'pg_cron''s launcher may fail over it again and again, and then no job runs at all',
            case
                when job.is_ours then pg_catalog.format(
                    'create role %I login; select pgflow_worker.grant_usage(%L, ''operate'');', job.username, job.username
                )
                else pg_catalog.format('select cron.unschedule(%s);', job.jobid)
            end
        );
    end loop;
    for job in select * from pgflow_worker._cron_jobs() loop
        label := pg_catalog.format('job %s%s', job.jobid, ' "' || job.name || '"');
        command := case
            when job.call like '%$%' then pg_catalog.quote_literal(job.call)
            when job.call is not null then '$$' || job.call || '$$'
            else pgflow_worker._doctor_command(job.flow_slug)
        end;
        if not job.active then
            return query values (
                'warning',
                label || ' is not active',
                'it calls no worker',
                pg_catalog.format('select cron.alter_job(%s, active => true);', job.jobid)
            );
        end if;
        if not job.is_alone then
            return query values (
                'error',
                label || ' has more than one statement',
                'they run in one transaction, where the worker fails with PW011 as soon as there is something to do',
                pg_catalog.format('select cron.alter_job(%s, command => %s);', job.jobid, command)
            );
        elsif job.is_bare is not true then
            return query values (
                'warning',
                label || ' is more than a CALL',
                'where the worker cannot commit it fails with PW011',
                pg_catalog.format('select cron.alter_job(%s, command => %s);', job.jobid, command)
            );
        end if;
        if job.schedule ~ '^\s*(\S+\s+){5}\S+\s*$' then
            return query values (
                'warning',
                pg_catalog.format('%s has the schedule "%s" of six fields', label, job.schedule),
                'pg_cron takes the first five, which begin with minutes, not seconds',
                pgflow_worker._doctor_often(job.jobid, job.flow_slug)
            );
        elsif job.schedule ~ '^\s*(\*|\*/1)(\s+\*){4}\s*$' and job.mode <> 'wait' then
            return query values (
                'note',
                pg_catalog.format('%s runs once a minute with the mode %s', label, job.mode),
                'a task waits up to a minute for it',
                pgflow_worker._doctor_often(job.jobid, job.flow_slug)
            );
        end if;

        if not exists (
            select from pg_catalog.pg_database as db where db.datname = job.database and db.datallowconn
        ) then
            return query values (
                'error',
                pg_catalog.format('%s is for database "%s", which does not exist', label, job.database),
                'it cannot run',
                pg_catalog.format('select cron.alter_job(%s, database => %L);', job.jobid, here)
            );
        end if;
        role := (select r.oid from pg_catalog.pg_roles as r where r.rolname = job.username);
        continue when role is null;
        if not (select r.rolcanlogin from pg_catalog.pg_roles as r where r.oid = role) then
            return query values (
                'error',
                pg_catalog.format('%s runs as role "%s", which may not log in', label, job.username),
                'it cannot run',
                pg_catalog.format('alter role %I login;', job.username)
            );
        end if;
        -- What follows is known of this database only.
        continue when job.database <> here;
        if not pg_catalog.has_schema_privilege(role, 'pgflow_worker', 'usage')
            or not pg_catalog.has_function_privilege(
                role, 'pgflow_worker.work(text, integer, integer, text, interval, jsonb)', 'execute'
            )
        then
            return query values (
                'error',
                pg_catalog.format('%s runs as role "%s", which may not call the worker', label, job.username),
                'every call fails',
                pg_catalog.format('select pgflow_worker.grant_usage(%L, ''operate'');', job.username)
            );
        end if;
        if not exists (
            select from pgflow_worker.flows as flow where flow.flow_slug = coalesce(job.flow_slug, flow.flow_slug)
        ) then
            return query values (
                'error',
                pg_catalog.format('%s works for flow "%s", which is not deployed', label, job.flow_slug),
                'every call fails with PW001',
                pg_catalog.format('select cron.unschedule(%s);', job.jobid)
            );
        end if;
    end loop;

    return query
    select
        'note',
        pg_catalog.format(
            '%s jobs call the worker of flow "%s", which has %s slot%s',
            jobs.number, flow.flow_slug, flow.workers, case when flow.workers > 1 then 's' end
        ),
        'a job without a slot is skipped while the others work',
        pg_catalog.format(
            'update pgflow_worker.flows set workers = %s where flow_slug = %L;',
            least(jobs.number, 32), flow.flow_slug
        )
    from pgflow_worker.flows as flow
    join (
        select known.flow_slug, pg_catalog.count(*) as number
        from pgflow_worker._cron_jobs() as known
        where known.active and known.database = here
        group by known.flow_slug
    ) as jobs on jobs.flow_slug = flow.flow_slug
    where jobs.number > flow.workers
    order by flow.flow_slug;
end
$body$;

comment on function pgflow_worker._doctor_jobs() is
'The findings of doctor() about pg_cron''s jobs that call the worker.';

revoke execute on function pgflow_worker._doctor_jobs() from public;

create function pgflow_worker._cron_jobs()
returns table (
    jobid bigint,
    name text,
    flow_slug text,
    mode text,
    max_duration interval,
    schedule text,
    call text,
    is_bare boolean,
    is_alone boolean,
    database text,
    username text,
    active boolean
)
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $body$
declare
    job jsonb;
    command text;
    arguments text;
begin
    if not pgflow_worker._may_see_jobs() then
        return;
    end if;
    for job in execute pg_catalog.format(
        'select pg_catalog.to_jsonb(job) from %s as job where job.command ~* %L order by job.jobid',
        'cron.job', '\mpgflow_worker"?\s*\.\s*"?work"?\s*\('
    )
    loop
        jobid := (job ->> 'jobid')::bigint;
        name := job ->> 'jobname';
        schedule := job ->> 'schedule';
        database := job ->> 'database';
        username := job ->> 'username';
        active := coalesce((job ->> 'active')::boolean, true);
        -- Without comments.
        command := pg_catalog.btrim(
            pg_catalog.regexp_replace(job ->> 'command', '--[^\n]*|/\*([^*]|\*[^/])*\*/', ' ', 'g'), E' \n\t\r;'
        );
        call := (pg_catalog.regexp_match(
            command,
            $re$(call\s+"?pgflow_worker"?\s*\.\s*"?work"?\s*\((?:[^()']|'[^']*'|\([^()]*\))*\))$re$, 'i'
        ))[1];
        is_bare := command = call;
        -- Without what is quoted.
        is_alone := pg_catalog.regexp_replace(
            pg_catalog.regexp_replace(command, $re$'[^']*'$re$, '', 'g'), '\$(\w*?)\$.*?\$\1\$', '', 'g'
        ) not like '%;%';
        arguments := pg_catalog.regexp_replace(call, '^[^(]*\(', '');
        flow_slug := pg_catalog.replace(
            coalesce(
                (pg_catalog.regexp_match(arguments, $re$\mflow_slug\s*(?:=>|:=)\s*'((?:[^']|'')*)'$re$, 'i'))[1],
                (pg_catalog.regexp_match(arguments, $re$^\s*'((?:[^']|'')*)'$re$))[1]
            ),
            '''''', ''''
        );
        mode := coalesce(
            (pg_catalog.regexp_match(arguments, $re$\mmode\s*=>\s*'(\w+)'$re$, 'i'))[1],
            (pg_catalog.regexp_match(arguments, $re$^[^,]*,[^,]*,[^,]*,\s*'(\w+)'$re$))[1],
            'batch'
        );
        begin
            max_duration := coalesce(
                (pg_catalog.regexp_match(arguments, $re$\mmax_duration\s*=>\s*(?:interval\s*)?'([^']*)'$re$, 'i'))[1],
                '55 seconds'
            )::interval;
        -- The call itself fails, and its run says why.
        exception
            when invalid_datetime_format or datetime_field_overflow or interval_field_overflow then
                max_duration := null;
        end;
        return next;
    end loop;
end
$body$;

comment on function pgflow_worker._cron_jobs() is
'The jobs of pg_cron in this database that call work(), as far as the caller may see them, and what they call: '
'flow_slug null is every flow. call: the CALL in the command, null if none is recognised; is_bare: whether it is all '
'of it; is_alone: whether it is the only statement.';

revoke execute on function pgflow_worker._cron_jobs() from public;

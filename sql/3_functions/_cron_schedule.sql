create function pgflow_worker._cron_schedule(every interval)
returns text
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    seconds numeric := extract(epoch from every);
begin
    if seconds between 1 and 59 and seconds = pg_catalog.trunc(seconds) then
        return pg_catalog.format('%s seconds', pg_catalog.trunc(seconds));
    elsif seconds in (60, 3600, 86400) then
        return case seconds when 60 then '* * * * *' when 3600 then '0 * * * *' else '0 0 * * *' end;
    elsif seconds between 60 and 3599 and seconds % 60 = 0 and 3600 % seconds = 0 then
        return pg_catalog.format('*/%s * * * *', pg_catalog.trunc(seconds / 60));
    elsif seconds between 3600 and 86399 and seconds % 3600 = 0 and 86400 % seconds = 0 then
        return pg_catalog.format('0 */%s * * *', pg_catalog.trunc(seconds / 3600));
    end if;
    raise exception using
        errcode = 'PW002',
        message = pg_catalog.format('pg_cron has no schedule for every %s', coalesce(every::text, 'null')),
        hint = 'Use 1 to 59 whole seconds, minutes of which an hour is a multiple, or hours of which a day is one.';
end
$$;

comment on function pgflow_worker._cron_schedule(interval) is
'The schedule that pg_cron understands for a period. Raises PW002 if there is none.';

revoke execute on function pgflow_worker._cron_schedule(interval) from public;

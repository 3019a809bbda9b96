create function pgflow_worker._duration_text(seconds double precision)
returns text
language plpgsql
stable
strict
set search_path = pg_catalog, pg_temp
as $$
declare
    whole bigint := pg_catalog.round(seconds);
    tenths numeric := pg_catalog.round(seconds::numeric, 1);
    ms numeric := pg_catalog.round(seconds::numeric * 1000, 1);
begin
    return case
        when ms < 10 then pg_catalog.format('%s ms', pg_catalog.trim_scale(ms))
        when pg_catalog.round(ms) < 1000 then pg_catalog.format('%s ms', pg_catalog.round(ms))
        when tenths < 60 then pg_catalog.format('%s s', tenths)
        when whole < 3600 then pg_catalog.format('%s min %s s', whole / 60, whole % 60)
        when whole < 86400 then pg_catalog.format('%s h %s min', whole / 3600, whole % 3600 / 60)
        else pg_catalog.format('%s d %s h', whole / 86400, whole % 86400 / 3600)
    end;
end
$$;

comment on function pgflow_worker._duration_text(double precision) is
'A duration for people, in at most two units: 0.4 ms, 40 ms, 3.4 s, 2 min 5 s, 1 h 2 min, 3 d 4 h.';

revoke execute on function pgflow_worker._duration_text(double precision) from public;

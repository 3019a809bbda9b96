-- Objects that tell who runs them. In a schema that is searched before pg_catalog they stand in for its operators and
-- functions; in one that is searched after it, for operators that pg_catalog has for similar types only.
set local search_path = pg_catalog, pg_temp; -- not to be caught by what is made here

create function @schema@.spring(what text) returns void language plpgsql as $$
begin
    raise notice 'sprung by %', current_user using detail = what;
end $$;

do $$
declare
    types constant text [] := array[
        'boolean', '"char"', 'integer', 'bigint', 'double precision', 'numeric', 'text', 'name', 'uuid', 'oid',
        'regclass', 'timestamptz', 'interval', 'jsonb', 'text[]'
    ];
    trap record;
begin
    for trap in
        select symbol, l, r, found.oprresult::regtype as result, found.oid is not null as known
        from unnest(array[
            '=', '<>', '<', '<=', '>', '>=', '+', '-', '*', '/', '||', '->', '->>', '#>>', '>>', '&', '~', '~~', '!~~'
        ]) as symbol
        cross join unnest(types) as l
        cross join unnest(types) as r
        left join pg_operator as found
            on found.oprnamespace = 'pg_catalog'::regnamespace
            and found.oprname = symbol
            and found.oprleft = l::regtype
            and found.oprright = r::regtype
    loop
        execute format(
            'create function @schema@.%I(%s, %s) returns %s language plpgsql as '
            '$trap$ begin perform @schema@.spring(%L); return %s; end $trap$',
            'op ' || trap.symbol, trap.l, trap.r,
            coalesce(trap.result, case when trap.symbol = '||' then 'text' else 'boolean' end::regtype),
            format('%s %s %s', trap.l, trap.symbol, trap.r),
            case when trap.known then format('$1 operator(pg_catalog.%s) $2', trap.symbol) else 'null' end
        );
        execute format(
            'create operator @schema@.%s (leftarg = %s, rightarg = %s, function = @schema@.%I)',
            trap.symbol, trap.l, trap.r, 'op ' || trap.symbol
        );
    end loop;

    for trap in
        select
            proc.proname,
            oidvectortypes(proc.proargtypes) as args,
            proc.prorettype::regtype as result,
            (select string_agg('$' || n, ', ') from generate_series(1, proc.pronargs) as n) as given
        from pg_proc as proc
        where proc.pronamespace = 'pg_catalog'::regnamespace
            and proc.prokind = 'f'
            and proc.provariadic = 0
            and not proc.proretset
            and not exists (
                select from unnest(proc.proargtypes::oid [] || proc.prorettype) as used
                join pg_type on pg_type.oid = used
                where pg_type.typtype = 'p'
            )
            and proc.proname in (
                'clock_timestamp', 'concat', 'current_database', 'current_setting', 'date_part', 'floor', 'format',
                'gen_random_uuid', 'hashtext', 'hashtextextended', 'jsonb_array_element', 'jsonb_array_length',
                'jsonb_typeof', 'length', 'lower', 'make_interval', 'md5', 'now', 'pg_advisory_unlock',
                'pg_advisory_xact_lock', 'pg_backend_pid', 'pg_try_advisory_lock', 'power', 'quote_ident', 'replace',
                'round', 'set_config', 'substr', 'trim_array'
            )
    loop
        execute format(
            'create function @schema@.%I(%s) returns %s language plpgsql as '
            '$trap$ begin perform @schema@.spring(%L); return pg_catalog.%I(%s); end $trap$',
            trap.proname, trap.args, trap.result, trap.proname, trap.proname, coalesce(trap.given, '')
        );
    end loop;
end $$;

-- Types as well, which also stand in for those of pg_catalog where they are searched first.
create function @schema@.spring_type(what pg_catalog.text) returns boolean language plpgsql as $$
begin
    raise notice 'sprung by %', current_user using detail = what;
    return true;
end $$;

do $$
declare
    trap name;
begin
    foreach trap in array array['text', 'jsonb', 'uuid', 'regclass', 'regnamespace', 'oid'] loop
        execute format(
            'create domain @schema@.%I as pg_catalog.%I check (@schema@.spring_type(%L))', trap, trap, trap
        );
    end loop;
end $$;

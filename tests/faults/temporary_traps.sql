-- Types, tables and views of the session's own, which are searched first unless pg_temp is named in the search_path.
create function pg_temp.spring(what pg_catalog.text) returns boolean language plpgsql as $$
begin
    raise notice 'sprung by %', current_user using detail = what;
    return true;
end $$;

do $$
declare
    relation name;
begin
    foreach relation in array array[
        'modules', 'flows', 'settings', 'pauses', 'attempts', 'runs', 'step_tasks', 'step_states', 'workers',
        'pg_extension', 'pg_config', 'pg_locks', 'pg_proc', 'pg_class', 'pg_namespace', 'q_kinds'
    ]
    loop
        execute format('create temp view %I as select pg_temp.spring(%L) as module', relation, relation);
    end loop;
    foreach relation in array array['text', 'jsonb', 'uuid', 'regclass', 'regnamespace', 'oid'] loop
        execute format(
            'create domain pg_temp.%I as pg_catalog.%I check (pg_temp.spring(%L))', relation, relation, relation
        );
    end loop;
end $$;

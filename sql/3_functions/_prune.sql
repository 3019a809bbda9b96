create function pgflow_worker._prune(
    part text,
    relation text,
    condition text,
    cutoff timestamptz,
    batch_size integer,
    inout page bigint,
    inout counts jsonb
)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
declare
    pages_at_a_time constant integer := 16;
    pages constant bigint := pg_catalog.pg_relation_size(relation)
        / pg_catalog.current_setting('block_size')::bigint;
    first tid;
    beyond tid;
    deleted integer;
    total integer := 0;
    pruned record;
begin
    -- Page by page, because the tables have no index on the time: so each page is read once.
    while page < pages and total < batch_size loop
        first := pg_catalog.format('(%s,0)', page)::tid;
        beyond := pg_catalog.format('(%s,0)', page + pages_at_a_time)::tid;
        if part = 'runs' then
            select removed.runs, removed.tasks
            into pruned
            from pgflow_worker._prune_runs(first, beyond, cutoff, batch_size - total) as removed;
            counts := counts || pg_catalog.jsonb_build_object(
                'runs', coalesce((counts ->> 'runs')::bigint, 0) + pruned.runs,
                'tasks', coalesce((counts ->> 'tasks')::bigint, 0) + pruned.tasks
            );
            total := total + pruned.runs + pruned.tasks;
            -- There may be more on these pages.
            exit when total >= batch_size;
        else
            execute pg_catalog.format(
                'delete from %s as old where old.ctid >= $2 and old.ctid < $3 and %s', relation, condition
            ) using cutoff, first, beyond;
            get diagnostics deleted = row_count;
            total := total + deleted;
        end if;
        page := page + pages_at_a_time;
    end loop;
    if part <> 'runs' then
        counts := counts || pg_catalog.jsonb_build_object(part, coalesce((counts ->> part)::bigint, 0) + total);
    end if;
    if page >= pages then
        page := null;
    end if;
end
$$;

comment on function pgflow_worker._prune(text, text, text, timestamptz, integer, bigint, jsonb) is
'Removes a batch of a table''s old rows, from a page on, and adds their number to the counts. The page to go on with; '
'null at the end.';

revoke execute on function pgflow_worker._prune(text, text, text, timestamptz, integer, bigint, jsonb) from public;

create function pgflow_worker._check_queue(flow_slug text)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
begin
    if pg_catalog.to_regclass(pgflow_worker._queue_table(flow_slug, 'q')) is null then
        raise exception using
            errcode = 'PW004',
            message = pg_catalog.format('the queue of flow "%s" does not exist', flow_slug),
            hint = 'Deploy the flow''s module again: that creates the queue.';
    end if;
end
$$;

comment on function pgflow_worker._check_queue(text) is
'Raises PW004 if the queue of a flow does not exist.';

revoke execute on function pgflow_worker._check_queue(text) from public;

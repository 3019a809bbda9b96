create function pgflow_worker._set_visibility(
    flow_slug text, message_ids bigint [], seconds integer []
)
returns setof bigint
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute pg_catalog.format(
        'update %s as message
        set vt = pg_catalog.clock_timestamp() + pg_catalog.make_interval(secs => given.seconds)
        from unnest($1, $2) as given (message_id, seconds)
        where message.msg_id = given.message_id
        returning message.msg_id',
        pgflow_worker._queue_table(flow_slug, 'q')
    ) using message_ids, seconds;
end
$$;

comment on function pgflow_worker._set_visibility(text, bigint [], integer []) is
'Makes messages of a flow visible after so many seconds each, 0 for now. Returns those that are in the queue. '
'pgflow has a function for this, set_vt_batch, but not in every version, nor for every version of pgmq.';

revoke execute on function pgflow_worker._set_visibility(text, bigint [], integer []) from public;

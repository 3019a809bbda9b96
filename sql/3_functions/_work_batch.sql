create function pgflow_worker._work_batch(
    flow_slug text, batch_size integer, max_concurrent integer, ignore_delay boolean
)
returns jsonb
language plpython3u
as $$
    from pgflow_worker import server

    return server.work_batch(plpy, flow_slug, batch_size, max_concurrent, ignore_delay)
$$;

comment on function pgflow_worker._work_batch(text, integer, integer, boolean) is
'The part of work_batch() behind the gate and after _load(); its answer is for _raise(). '
'It has no search_path of its own, because handlers get the caller''s; its statements set one.';

revoke execute on function pgflow_worker._work_batch(text, integer, integer, boolean) from public;

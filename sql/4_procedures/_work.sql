create procedure pgflow_worker._work(
    flow_slug text,
    batch_size integer,
    max_concurrent integer,
    mode text,
    max_seconds double precision,
    inout result jsonb
)
language plpython3u
as $$
    from pgflow_worker import server

    return (server.work(plpy, flow_slug, batch_size, max_concurrent, mode, max_seconds),)
$$;

comment on procedure pgflow_worker._work(text, integer, integer, text, double precision, jsonb) is
'The part of work() behind the gate and after _load(); its answer is for _raise(). '
'It commits, so that it cannot have a search_path of its own; its statements set one.';

revoke execute on procedure
pgflow_worker._work(text, integer, integer, text, double precision, jsonb) from public;

create function pgflow_worker._raise(answer jsonb)
returns void
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    state text := answer #>> '{raise,sqlstate}';
    text_of_error text := answer #>> '{raise,message}';
    text_of_detail text := answer #>> '{raise,detail}';
    text_of_hint text := answer #>> '{raise,hint}';
begin
    if state is null then
        return;
    end if;
    -- An option of RAISE may not be null.
    if text_of_detail is not null and text_of_hint is not null then
        raise exception using
            errcode = state, message = text_of_error, detail = text_of_detail, hint = text_of_hint;
    elsif text_of_detail is not null then
        raise exception using errcode = state, message = text_of_error, detail = text_of_detail;
    elsif text_of_hint is not null then
        raise exception using errcode = state, message = text_of_error, hint = text_of_hint;
    else
        raise exception using errcode = state, message = text_of_error;
    end if;
end
$$;

comment on function pgflow_worker._raise(jsonb) is
'Raises the error that an answer of the Python package carries, if it does. Python itself could only '
'raise it with "plpy.Error: " before the message and a Python traceback as context.';

revoke execute on function pgflow_worker._raise(jsonb) from public;

create function pgflow_worker._doctor_check(subject text)
returns table (severity text, what text, why text, cure text)
language plpgsql
set search_path = pg_catalog, pg_temp
as $$
begin
    return query execute pg_catalog.format('select * from pgflow_worker.%I()', '_doctor_' || subject);
-- Whatever it is, it must not keep the other checks from being made. What checks expect they handle themselves.
exception
    when others then
        return query values (
            'note',
            pg_catalog.format('check "%s" could not be made: %s', subject, sqlerrm),
            'what it looks for is not known',
            pg_catalog.format('select * from pgflow_worker._doctor_%s();', subject)
        );
end
$$;

comment on function pgflow_worker._doctor_check(text) is
'The findings of one subject of doctor(); an error becomes a finding.';

revoke execute on function pgflow_worker._doctor_check(text) from public;

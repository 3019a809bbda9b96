create function pgflow_worker._is_own_transaction(writer xid)
returns boolean
language plpgsql
stable
set search_path = pg_catalog, pg_temp
as $$
declare
    own constant bigint := pg_catalog.pg_current_xact_id_if_assigned()::text::bigint;
    ahead bigint;
begin
    if own is null then
        return false;
    end if;
    -- The ids of subtransactions follow that of their transaction. An xid has 32 bits of 64.
    ahead := (writer::text::bigint - own) & 4294967295;
    -- What is visible and still in progress is the caller's own.
    return ahead < 2147483648
        and pg_catalog.pg_xact_status((own + ahead)::text::xid8) = 'in progress';
exception when invalid_parameter_value then
    -- Written so long ago that it seems to lie ahead.
    return false;
end
$$;

comment on function pgflow_worker._is_own_transaction(xid) is
'Whether a row that can be seen, with this xmin, was written by the current transaction, or by a subtransaction of it.';

revoke execute on function pgflow_worker._is_own_transaction(xid) from public;

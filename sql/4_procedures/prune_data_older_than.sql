create procedure pgflow_worker.prune_data_older_than(
    age interval,
    batch_size integer default 1000,
    inout result jsonb default null
)
language plpgsql
as $$
declare
    prunable pg_catalog.record;
    page pg_catalog.int8;
    committed pg_catalog.bool;
begin
    -- Its arguments are checked before it can be in the wrong transaction.
    perform from pgflow_worker._prunable(age, batch_size);
    call pgflow_worker._commit(committed);
    if not committed then
        raise exception using
            errcode = 'PW011',
            message = 'prune_data_older_than() cannot run inside a transaction, because it commits every batch',
            hint = 'Call it on its own: outside BEGIN and functions, as the only statement of its job.';
    end if;
    result := '{}';
    for prunable in select * from pgflow_worker._prunable(age, batch_size) loop
        page := 0;
        while page is not null loop
            select pruned.page, pruned.counts
            into page, result
            from pgflow_worker._prune(
                prunable.part, prunable.relation, prunable.condition, prunable.cutoff, batch_size, page, result
            ) as pruned;
            commit;
        end loop;
    end loop;
end
$$;

comment on procedure pgflow_worker.prune_data_older_than(interval, integer, jsonb) is
'Removes what is older: runs that ended before, with their steps and tasks; attempts, but those of active runs; '
'invocations; archived messages; workers that pgflow has not heard of since; and what pg_cron has recorded of its '
'calls of the worker, if the caller may. Returns how many. Commits about every batch_size rows: it must be the only '
'statement of its command, outside a transaction. Errors: PW002, PW004, PW011.';

revoke execute on procedure pgflow_worker.prune_data_older_than(interval, integer, jsonb) from public;

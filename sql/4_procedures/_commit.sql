create procedure pgflow_worker._commit(inout committed boolean default null)
language plpython3u
as $$
    try:
        plpy.commit()
    except plpy.spiexceptions.InvalidTransactionTermination:
        return (False,)
    return (True,)
$$;

comment on procedure pgflow_worker._commit(boolean) is
'Commits; false if the caller''s transaction does not allow that. PL/pgSQL cannot catch its COMMIT''s error. It '
'cannot have a search_path of its own, because it commits.';

revoke execute on procedure pgflow_worker._commit(boolean) from public;

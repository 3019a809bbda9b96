create function pgflow_worker._load()
returns void
language plpython3u
security definer
set search_path = pg_catalog, pg_temp
as $$
    # As the owner, because a worker's role may read neither the stored sources nor pg_config.
    import os
    import sys

    [installed] = plpy.execute(
        """select extension.extversion as version, config.setting as sharedir
        from pg_catalog.pg_extension as extension, pg_catalog.pg_config() as config
        where extension.extname = 'pgflow_worker' and config.name = 'SHAREDIR'"""
    )
    directory = os.path.join(installed["sharedir"], "pgflow_worker", installed["version"])
    package = sys.modules.get("pgflow_worker")
    if package is None or package.__path__ != [os.path.join(directory, "pgflow_worker")]:
        if not os.path.isdir(directory):
            plpy.error(
                f'the Python files of pgflow_worker {installed["version"]} are not installed',
                detail=f"There is no directory {directory}.",
                hint="Run make install for this server, or update the extension to the version "
                "that is installed: alter extension pgflow_worker update;",
                sqlstate="PW010",
            )
        # After an update of the extension the session still holds the former version's files.
        for name in [n for n in sys.modules if n.partition(".")[0] == "pgflow_worker"]:
            del sys.modules[name]
        sys.path[:] = [p for p in sys.path if os.path.basename(os.path.dirname(p)) != "pgflow_worker"]
        sys.path.insert(0, directory)

    from pgflow_worker import server

    server.load(plpy, installed["version"])
$$;

comment on function pgflow_worker._load() is
'Makes the Python package of the installed version, the environment and the stored modules known to '
'this session. Raises PW010 if the package is not there.';

revoke execute on function pgflow_worker._load() from public;

create function pgflow_worker._load(with_environment boolean default true)
returns jsonb
language plpython3u
security definer
set search_path = pg_catalog, pg_temp
as $$
    # As the owner, because a worker's role may read neither the stored sources nor pg_config.
    import json
    import os
    import sys

    if sys.version_info < (3, 11):
        return json.dumps({"raise": {
            "sqlstate": "PW010",
            "message": f"this server's Python is {sys.version.split()[0]}, 3.11 is needed",
            "hint": "Use a PostgreSQL whose PL/Python was built with a later Python.",
        }})

    try:
        [installed] = plpy.execute(
            """select extension.extversion as version, config.setting as sharedir
            from pg_catalog.pg_extension as extension, pg_catalog.pg_config() as config
            where extension.extname = 'pgflow_worker' and config.name = 'SHAREDIR'"""
        )
    except plpy.spiexceptions.QueryCanceled as error:
        # That arrived while the interpreter started.
        return json.dumps({"raise": {"sqlstate": "57014", "message": str(error)}})
    directory = os.path.join(installed["sharedir"], "pgflow_worker", installed["version"])
    package = sys.modules.get("pgflow_worker")
    if package is None or package.__path__ != [os.path.join(directory, "pgflow_worker")]:
        if not os.path.isdir(directory):
            return json.dumps({"raise": {
                "sqlstate": "PW010",
                "message": f'the Python files of pgflow_worker {installed["version"]} are missing',
                "detail": f"There is no directory {directory}.",
                "hint": "Run make install for this server, or update the extension to the version "
                "that is installed: alter extension pgflow_worker update;",
            }})
        # After an update of the extension the session still holds the former version's files.
        for name in [n for n in sys.modules if n.partition(".")[0] == "pgflow_worker"]:
            del sys.modules[name]
        sys.path[:] = [p for p in sys.path if os.path.basename(os.path.dirname(p)) != "pgflow_worker"]
        sys.path.insert(0, directory)

    from pgflow_worker import server

    return server.load(plpy, installed["version"], with_environment)
$$;

comment on function pgflow_worker._load(boolean) is
'Makes the Python package of the installed version, the environment and the stored modules known to '
'this session. The answer is for _raise(): PW008 for the environment, PW010 for missing files.';

revoke execute on function pgflow_worker._load(boolean) from public;

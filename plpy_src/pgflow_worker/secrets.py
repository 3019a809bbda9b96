"""Secrets: values that a flow declares and its handlers get by name, from Vault or from files.

from pgflow_worker import Flow, secret

flow = Flow("translate", secrets=["openai_api_key"])

@flow.step
def english(flow_input):
    return translated(flow_input["text"], api_key=secret("openai_api_key"))

Imported only for flows that declare secrets and by modules that use them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from pgflow_worker.database import Database, Statement
from pgflow_worker.errors import DatabaseError, SecretUnavailable
from pgflow_worker.files import belongs_to_others, distrust, others_may_write, quoted
from pgflow_worker.registry import Registry
from pgflow_worker.tracebacks import hide

# Shorter ones are not hidden: they would be found in the middle of words.
MIN_HIDDEN = 4
MIN_HIDDEN_LINE = 8  # of a secret of several lines, such as a private key
MAX_BYTES = 65_536

# The view's code runs as the extension's owner: only a superuser may have put it there.
_VAULT = Statement(
    """select pg_catalog.bool_and(role.rolsuper or role.rolname = current_user) as trusted
    from pg_catalog.pg_class as class
    join pg_catalog.pg_namespace as namespace on namespace.oid = class.relnamespace
    join pg_catalog.pg_roles as role on role.oid in (class.relowner, namespace.nspowner)
    where class.oid = pg_catalog.to_regclass('vault.decrypted_secrets')"""
)
_VALUES = Statement(
    """select name, decrypted_secret as value from vault.decrypted_secrets
    where name operator(pg_catalog.=) any ($1)""",
    ("text[]",),
)
_DATA_DIRECTORY = Statement("select pg_catalog.current_setting('data_directory') as path")

# The flow whose handlers run, and its secrets: one for the process, because handlers run in threads
# that may be anybody's. Replaced as one.
_running: tuple[str, Mapping[str, str] | None] | None = None


def secret(name: str) -> str:
    """The value of a secret that the running flow has declared: `Flow("f", secrets=[name])`.

    Raises LookupError for another name, RuntimeError where no handler runs.
    """
    if _running is None:
        raise RuntimeError(
            f'secret "{name}" was asked for while no handler runs: a flow\'s secrets are there for '
            "its handlers, and not for a module that is imported"
        )
    flow_slug, values = _running
    if values is None:
        raise LookupError(
            f'the secrets of flow "{flow_slug}" are not sent to the cluster that runs this step: '
            "see send_secrets of pgflow_worker.set_executor()"
        )
    if name not in values:
        raise LookupError(
            f'flow "{flow_slug}" does not declare secret "{name}": '
            f'write Flow("{flow_slug}", secrets=["{name}"])'
        )
    return values[name]


@contextmanager
def given(flow_slug: str, values: Mapping[str, str]) -> Iterator[None]:
    """Let secret() answer for a flow, and keep the values out of texts, see hide()."""
    global _running
    former = _running
    give(flow_slug, values)
    try:
        yield
    finally:
        _running = former


def give(flow_slug: str, values: Mapping[str, str] | None) -> None:
    """The same for good, in a process that has no other flow. None: it may not have them."""
    global _running
    hide(form for value in (values or {}).values() for form in _forms(value))
    _running = flow_slug, values


def read(database: Database, flow_slug: str, names: Sequence[str]) -> dict[str, str]:
    """A flow's secrets from Vault, or if it is not installed from the directory that is set.

    To be called as the extension's owner. Raises SecretUnavailable.
    """
    trusted = database.execute(_VAULT)[0]["trusted"]
    if trusted is None:
        directory = Registry(database).settings().get("secrets")
        return _from_files(directory, flow_slug, names)
    if not trusted:
        raise SecretUnavailable(
            f"{_needs(flow_slug, names[0])}, but Vault is not a superuser's",
            detail="What belongs to another role could run its code as the extension's owner.",
            hint='Give schema "vault" and its view "decrypted_secrets" to a superuser.',
        )
    return _from_vault(database, flow_slug, names)


def directory_to_set(database: Database, path: str) -> str:
    """The real path of a directory that may hold secrets. Raises SecretUnavailable."""
    if database.execute(_VAULT)[0]["trusted"] is not None:
        raise SecretUnavailable(
            "secrets are read from Vault here, not from files",
            hint="Create them there: select vault.create_secret('...', 'openai_api_key');",
        )
    if not os.path.isabs(path):
        raise SecretUnavailable(
            f'directory of secrets "{path}" is not an absolute path', hint="Give the whole path."
        )
    # Not through a link, which others may change later.
    real = os.path.realpath(path)
    if not os.path.isdir(real):
        raise SecretUnavailable(
            f'"{path}" is not a directory that the server can find', hint=_make_directory(path)
        )
    data_directory = os.path.realpath(database.execute(_DATA_DIRECTORY)[0]["path"])
    if os.path.commonpath([real, data_directory]) == data_directory:
        raise SecretUnavailable(
            f'"{path}" is in the server\'s data directory, and so in its backups',
            hint=_make_directory("/etc/pgflow_worker/secrets"),
        )
    parent = real
    while parent != os.path.dirname(parent):
        parent = os.path.dirname(parent)
        _check_directory(parent, os.stat(parent), is_parent=True)
    _check_directory(real, os.stat(real))
    return real


def _from_vault(database: Database, flow_slug: str, names: Sequence[str]) -> dict[str, str]:
    try:
        rows = database.execute(_VALUES, list(names))
    except DatabaseError as error:
        if not error.sqlstate.startswith(("22", "38", "39", "42", "P0")):
            raise  # it tells of the server, not of Vault
        raise SecretUnavailable(
            f"{_needs(flow_slug, names[0])}, but Vault cannot be read: {error}",
            hint="As the extension's owner: select name from vault.decrypted_secrets;",
        ) from None
    found = {row["name"]: row["value"] for row in rows}
    for name in names:
        create = f"select vault.create_secret('...', '{name}');"
        if name not in found:
            raise SecretUnavailable(
                f"{_needs(flow_slug, name)}, and Vault has none of that name",
                hint=f"Create it: {create}",
            )
        if not found[name]:
            raise SecretUnavailable(
                f"{_needs(flow_slug, name)}, and in Vault it is empty",
                hint="Give it a value: vault.update_secret().",
            )
    return found


def _from_files(directory: str | None, flow_slug: str, names: Sequence[str]) -> dict[str, str]:
    if directory is None:
        path = "/etc/pgflow_worker/secrets"
        raise SecretUnavailable(
            f"{_needs(flow_slug, names[0])}, and no directory of secrets is set",
            hint=f"{_make_directory(path)} {_make_file(os.path.join(path, names[0]))}",
        )
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise SecretUnavailable(
            f'{_needs(flow_slug, names[0])}, but "{directory}" cannot be read: {error.strerror}',
            hint=_make_directory(directory),
        ) from None
    try:
        try:
            _check_directory(directory, os.fstat(descriptor))
        except SecretUnavailable as error:
            text = f"{_needs(flow_slug, names[0])}, but {error}"
            raise SecretUnavailable(text, hint=error.hint) from None
        return {name: _from_file(descriptor, directory, flow_slug, name) for name in names}
    finally:
        os.close(descriptor)


def _from_file(descriptor: int, directory: str, flow_slug: str, name: str) -> str:
    path = os.path.join(directory, name)
    needs = _needs(flow_slug, name)
    try:
        # A link is refused; a FIFO does not block.
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except FileNotFoundError:
        raise SecretUnavailable(
            f'{needs}, and there is no file "{path}"', hint=_make_file(path)
        ) from None
    except OSError as error:
        text = "is a link" if error.errno == errno.ELOOP else f"cannot be read: {error.strerror}"
        raise SecretUnavailable(
            f'{needs}, but file "{path}" {text}', hint=_make_file(path)
        ) from None
    try:
        problem, cure = _problem(os.fstat(file))
        if problem is None:
            with open(file, "rb", closefd=False) as opened:
                content = opened.read(MAX_BYTES + 1)
            problem = _problem_of_content(content)
    finally:
        os.close(file)
    if problem is not None:
        hint = f"As root: {cure} {quoted(path)}" if cure else _make_file(path)
        raise SecretUnavailable(f'{needs}, but file "{path}" {problem}', hint=hint)
    return content.decode().removesuffix("\n")


def _problem(status: os.stat_result) -> tuple[str | None, str | None]:
    """Why a file is not taken for a secret's, and the command that changes it."""
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        return "is no regular file", None
    if belongs_to_others(status):
        return "belongs to another user than the server's and root", f"chown {_user()}"
    if status.st_uid == os.geteuid():
        if mode not in (0o600, 0o400):
            return f"has mode {mode:04o}, not 0600 or 0400", "chmod 600"
    # Who may read root's own is for root to decide: the server's group, for one.
    elif others_may_write(status):
        return f"can be written by others (mode {mode:04o})", "chmod go-w"
    return None, None


def _problem_of_content(content: bytes) -> str | None:
    if len(content) > MAX_BYTES:
        return f"has more than {MAX_BYTES:,} bytes"
    try:
        text = content.decode()
    except UnicodeDecodeError:  # whose own text shows a part of the content
        return "is not UTF-8"
    return None if text.removesuffix("\n") else "is empty"


def _check_directory(path: str, status: os.stat_result, *, is_parent: bool = False) -> None:
    found = distrust(path, status, is_parent=is_parent)
    if found is not None:
        problem, hint = found
        raise SecretUnavailable(f"{problem}, who could put other secrets there", hint=hint)


def _forms(value: str) -> Iterator[str]:
    """A secret as texts may show it: as it is, escaped, in a URL, and its single lines."""
    lines = [line.strip() for line in value.splitlines()]
    long_lines = [line for line in lines if len(line) >= MIN_HIDDEN_LINE]
    for text in (value, value.strip(), *long_lines):
        if len(text) >= MIN_HIDDEN:
            yield text
            yield repr(text)[1:-1]
            yield json.dumps(text)[1:-1]
            yield json.dumps(text, ensure_ascii=False)[1:-1]
            yield "".join(map(_in_url, text))


def _in_url(character: str) -> str:
    if character.isascii() and (character.isalnum() or character in "-._~"):
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode())


def _needs(flow_slug: str, name: str) -> str:
    return f'flow "{flow_slug}" needs secret "{name}"'


def _make_file(path: str) -> str:
    return (
        f"As root: install -o {_user()} -m 600 /dev/stdin {quoted(path)} "
        "and then the value, Enter and Ctrl-D."
    )


def _make_directory(path: str) -> str:
    literal = path.replace("'", "''")
    return (
        f"As root: install -d -o {_user()} -m 700 {quoted(path)} "
        f"and then: select pgflow_worker.set_secrets('{literal}');"
    )


def _user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())

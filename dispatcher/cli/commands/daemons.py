"""serve, manager, proxy, reload."""

from __future__ import annotations

import gc
import os
import shlex
import signal
from pathlib import Path

import click

from dispatcher.cli.context import Cli, pass_cli
from dispatcher.cli.parent_death import end_with_parent
from dispatcher.config import default_paths
from dispatcher.plugin.errors import Unavailable

_NAMED = 5  # agents by name in a message


@click.command(epilog="\b\nExamples:\n  dispatcher serve\n  dispatcher --config dispatcher.toml serve")
@pass_cli
def serve(cli: Cli) -> int:
    """Run manager and proxy together until Ctrl-C or SIGTERM.  Agents continue to run.

    SIGHUP makes both reload the configuration.
    """
    from dispatcher.cli.serve import Daemons, global_options

    _same_configuration(cli)
    daemons = Daemons(cli.config(), global_options(cli.config_path), cli.out.note)

    def ready() -> None:
        from dispatcher.cli.doctor.installation import encryption

        daemons.say_where()
        for finding in encryption(daemons.config):
            cli.out.note(f"warning: {finding.what} ({finding.fix})")

    live: list[str] = []
    code = daemons.run(ready, before_stop=lambda: live.extend(daemons.live_agents()))
    if code == 0:
        program = shlex.join(["dispatcher", *global_options(cli.config_path)])
        cli.out.note(f"manager and proxy have ended; {_what_goes_on(live, program)}")
    return code


def _what_goes_on(agents: list[str], program: str) -> str:
    if not agents:
        return "no agent is running"
    many = len(agents) > 1
    named = ", ".join(agents[:_NAMED]) + (", ..." if len(agents) > _NAMED else "")
    return (
        f"{len(agents)} agent{'s keep' if many else ' keeps'} running: {named} "
        f"(`{program} serve` serves {'them' if many else 'it'} again, then `{program} stop NAME` stops one)"
    )


@click.command(epilog="\b\nExample:\n  dispatcher --config /etc/dispatcher/dispatcher.toml manager")
@pass_cli
def manager(cli: Cli) -> int:
    """Run the manager in the foreground.  It owns users, agents, providers and the database.

    As root it gives each agent a user id of its own; as an ordinary user it isolates agents less.
    """
    gc.disable()  # imported modules stay; the manager enables it once it is ready
    end_with_parent()
    _same_configuration(cli)
    config = cli.config()
    from dispatcher.manager import daemon

    return daemon.run(config, cli.config_path)


@click.command(epilog="\b\nExample:\n  dispatcher --config /etc/dispatcher/dispatcher.toml proxy")
@click.option("--check", is_flag=True, help="Only check that a proxy of this user could use the configuration.")
@pass_cli
def proxy(cli: Cli, *, check: bool) -> int:
    """Run the proxy in the foreground.  It serves the web; started as root, it changes to proxy.user."""
    end_with_parent()
    _same_configuration(cli)
    config = cli.config()
    from dispatcher.proxy import daemon

    if check:
        daemon.check(config)
        return 0
    return daemon.run(config)


@click.command(epilog="\b\nExample:\n  dispatcher reload")
@pass_cli
def reload(cli: Cli) -> None:
    """Make manager and proxy reload the configuration without dropping a request.

    An invalid configuration changes nothing.
    """
    from dispatcher.cli.doctor.installation import renewal_faults

    url = cli.url
    answer = cli.client().reload()
    changed, unstartable = answer.get("changed", []), answer.get("faults", [])
    if url.startswith("unix:") and (faults := list(renewal_faults(cli.config()))):
        raise Unavailable("The manager has reloaded the configuration, the proxy has not", why="; ".join(faults))
    reloaded = _reload_proxy(Path(url.removeprefix("unix://")).parent) if url.startswith("unix:") else False
    lines = changed or ["the manager: no changes"]
    lines += ["the proxy reloads the configuration" if reloaded else "no proxy is running on this machine"]
    cli.out.result({"changed": changed, "faults": unstartable, "proxy": reloaded}, "\n".join(lines))
    for fault in unstartable:
        cli.out.note(f"warning: agents cannot start: {fault}")


def _reload_proxy(run_dir: Path) -> bool:
    """Send SIGHUP to the proxy of this run directory; False when none runs.

    :raises Unavailable: it runs and may not be signalled.
    """
    from dispatcher.cli.serve import proxy_process

    found = proxy_process(run_dir)
    if found is None:
        return False
    pid, owner = found
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return False
    # The file is the proxy's user's, which may not choose another process.
    if b"proxy" not in arguments or b"\nUid:\t%d\t" % owner not in status:
        return False
    try:
        os.kill(pid, signal.SIGHUP)
    except ProcessLookupError:
        return False
    except PermissionError as error:
        raise Unavailable(
            "The manager has reloaded the configuration, the proxy has not",
            why=f"you may not send a signal to process {pid}",
            fix="become root, or: systemctl reload dispatcher-proxy",
        ) from error
    return True


def _same_configuration(cli: Cli) -> None:
    """Make a reload in this process find the same file: that of ``--config``, or the default of its first user."""
    if cli.config_path is not None:
        os.environ["DISPATCHER_CONFIG"] = str(cli.config_path.absolute())
    default_paths.keep_config_file()

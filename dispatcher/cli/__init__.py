"""The program `dispatcher`: parses options, runs one command, turns errors into exit codes.

Commands are imported when they run.  Nothing here may import pydantic, sqlalchemy, flask, rich or
importlib.metadata: `dispatcher --help` and commands that only send requests to the manager must start fast.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from dispatcher import __version__
from dispatcher.cli.context import Cli, did_you_mean
from dispatcher.cli.lazy import Lazy, LazyGroup
from dispatcher.cli.ui.output import Output, clean
from dispatcher.cli.ui.streams import output_of_the_main_thread
from dispatcher.plugin.errors import BadRequest, DispatcherError

#: pydantic's plugins: to look for them, it reads the metadata of all distributions, and ends with a damaged one.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
SECTIONS = {
    "Run": {
        "serve": Lazy("daemons", "serve", "Run manager and proxy together."),
        "manager": Lazy("daemons", "manager", "Run the manager."),
        "proxy": Lazy("daemons", "proxy", "Run the proxy."),
        "demo": Lazy("demo", "demo", "Try dispatcher in a browser, with two users and a demo app."),
        "reload": Lazy("daemons", "reload", "Reload the configuration without dropping a request."),
    },
    "Users and agents": {
        "add": Lazy("agents", "add", "Add a user with an agent, or another agent for a user."),
        "import": Lazy("import_users", "import_users", "Add many users from a CSV file."),
        "remove": Lazy("agents", "remove", "Remove an agent and its data."),
        "passwd": Lazy("agents", "passwd", "Set a user's password."),
        "tokens": Lazy("tokens", "tokens", "Create, list and revoke API tokens."),
        "list": Lazy("inspection", "list_agents", "List all agents."),
        "running": Lazy("inspection", "running", "List running agents."),
        "info": Lazy("inspection", "info", "Show everything about an agent."),
        "start": Lazy("agents", "start", "Start or wake an agent."),
        "stop": Lazy("agents", "stop", "Stop an agent."),
        "suspend": Lazy("agents", "suspend", "Suspend an agent and keep its memory."),
        "restart": Lazy("agents", "restart", "Restart an agent with its app's current configuration."),
        "reset-data": Lazy("agents", "reset_data", "Delete an agent's data."),
        "purge": Lazy("agents", "purge", "Delete the kept data of an agent (old copies)."),
    },
    "Inspect": {
        "logs": Lazy("inspection", "logs", "Show an agent's output."),
        "why": Lazy("inspection", "why", "Explain an agent's state."),
        "top": Lazy("inspection", "top", "Show agents' memory and CPU use, continuously."),
        "memory-usage": Lazy("inspection", "memory_usage", "Show the memory of running agents."),
        "sessions": Lazy("inspection", "sessions", "List and end sessions."),
        "auth": Lazy("directory", "auth", "Test sign-ins, release names."),
        "sync": Lazy("directory", "sync", "Read groups from directories, and find users who have left."),
    },
    "Installation": {
        "init": Lazy("init", "init", "Write a first configuration."),
        "providers": Lazy("providers", "providers", "List, check and describe providers."),
        "plugin": Lazy("plugins", "plugin", "List, write and check plugins."),
        "config": Lazy("configuration", "config", "Check and show the configuration."),
        "doctor": Lazy("doctor", "doctor", "Check machine, providers and installation."),
    },
}
#: Errors of writing to a full disk, over a quota, or to a broken device.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
ALIASES = {"memory_usage": "memory-usage", "plugins": "plugin", "reset_data": "reset-data"}

EPILOG = """\b
Examples:
  dispatcher demo                    try it
  dispatcher add alice               asks for a password
  dispatcher start alice
  dispatcher list --json             for programs

These options may stand before or after the command.
Exit codes: 0 done, 1 failed, 2 usage, 3 not found, 4 conflict, 5 manager unreachable."""


@click.group(
    cls=LazyGroup,
    sections=SECTIONS,
    aliases=ALIASES,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EPILOG,
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Configuration file [$DISPATCHER_CONFIG].",
)
@click.option(
    "--manager",
    metavar="URL",
    help="unix:///PATH/manager.sock or https://HOST:4443 [$DISPATCHER_MANAGER].",
)
@click.option(
    "-k",
    "--no-check-certificate",
    is_flag=True,
    help="Do not check the manager's certificate (https only).",
)
@click.option("--no-ssl", is_flag=True, help="HTTP without TLS (loopback addresses only).")
@click.option(
    "--sslcert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Trust this certificate or certificate authority.",
)
@click.option(
    "--client-cert",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The administrator's certificate and key, instead of a token.",
)
@click.option("--fingerprint", metavar="SHA256", help="Trust the certificate with this fingerprint.")
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The administrator's token for https [$DISPATCHER_TOKEN].",
)
@click.option("--json", is_flag=True, help="Print JSON.")
@click.version_option(__version__, prog_name="dispatcher")
@click.pass_context
def program(
    ctx: click.Context,
    config: Path | None,
    manager: str | None,
    no_check_certificate: bool,
    no_ssl: bool,
    sslcert: Path | None,
    client_cert: Path | None,
    fingerprint: str | None,
    token_file: Path | None,
    json: bool,
) -> None:
    """Run many instances of a web application, one isolated agent per user, behind one login."""
    ctx.obj = Cli(
        config_path=config,
        manager=manager,
        check_certificate=not no_check_certificate,
        tls=not no_ssl,
        sslcert=sslcert,
        client_cert=client_cert,
        fingerprint=fingerprint,
        token_file=token_file,
    )
    ctx.obj.out.json = json
    ctx.call_on_close(ctx.obj.close)
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    :param arguments: without the program's name; by default the process's own.
    """
    _open_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with output_of_the_main_thread():
            result = program.main(
                args=None if arguments is None else list(arguments), prog_name="dispatcher", standalone_mode=False
            )
        sys.stdout.flush()
    except (
        click.exceptions.NoArgsIsHelpError
    ) as error:  # a group without a command: the message is its help, of many lines
        click.echo(error.format_message(), err=True)
        return BadRequest.exit_code
    except click.UsageError as error:
        return _usage(error)
    except click.ClickException as error:
        return _fail(error.format_message(), 1)
    except DispatcherError as error:
        problems = error.details.get("problems") or ()
        code = _fail(f"{error.what}:" if len(problems) > 1 else str(error), error.exit_code)
        if len(problems) > 1:
            lines = [*problems, *([f"({error.fix})"] if error.fix else [])]
            click.echo("\n".join(f"  {clean(str(line))}" for line in lines), err=True)
        for line in error.details.get("log") or ():
            click.echo(f"  | {clean(str(line))}", err=True)
        return code
    except (KeyboardInterrupt, click.Abort):
        click.echo("", err=True)
        return 130
    except BrokenPipeError:
        # The reader has ended (`| head`); Python must not report this again when it exits.
        _discard_output()
        return 0
    except OSError as error:
        if error.errno not in _FULL:
            raise
        _discard_output()
        return _fail(f"Cannot write the output: {error.strerror} (free some space, or redirect the output)", 1)
    return result if isinstance(result, int) else 0


def _discard_output() -> None:
    """Discard buffered output, which Python would try to write when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_standard_streams() -> None:
    """Open the null device for standard streams that were closed at the start."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process


def _usage(error: click.UsageError) -> int:
    command = error.ctx.command_path if error.ctx else "dispatcher"
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption) and error.ctx:
        parameters = [*error.ctx.command.params, *program.params]
        known = [name for parameter in parameters for name in parameter.opts if name.startswith("--")]
        message = f"No such option {error.option_name!r}{did_you_mean(error.option_name, known)}"
    return _fail(f"{message} (see `{command} --help`)", BadRequest.exit_code)


def _fail(message: str, code: int) -> int:
    Output().note(" ".join(message.split("\n")))
    return code

"""init: writes a first configuration, checks it, and says what to do next."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from dispatcher.cli.commands.configuration import checked
from dispatcher.cli.context import Cli, pass_cli
from dispatcher.config import default_paths
from dispatcher.plugin.errors import BadRequest, ConfigError, Conflict, DispatcherError

if TYPE_CHECKING:
    from dispatcher.config.load import Config

LISTEN = "127.0.0.1:8080"
DEMO = "demo"  # the name of the app that is built in
_EPILOG = """\b
Examples:
  dispatcher init                            ask
  dispatcher init --yes                      the built-in demo app on 127.0.0.1:8080
  dispatcher --config lab.toml init --app lab --command \\
      '/opt/apps/bin/jupyter-lab --ServerApp.sock={socket} --ServerApp.root_dir={data}'
  dispatcher init --provider docker --image busybox:1.36 --port 8080 \\
      --app files --command 'httpd -f -p {port} -h {data}'"""


@click.command(epilog=_EPILOG)
@click.option("--app", metavar="NAME", help="Name of the app.")
@click.option("--title", metavar="TEXT", help="Title of the app in the portal.")
@click.option("--provider", metavar="NAME", help="Isolation of agents: subprocess, docker or libvirt.")
@click.option("--command", metavar="TEXT", help="The app's command; {socket}, {port} and {data} are replaced.")
@click.option("--image", metavar="IMAGE", help="The app's image (docker, libvirt).")
@click.option("--port", type=click.IntRange(1, 65535), help="The app's TCP port in its container or machine.")
@click.option("--listen", metavar="HOST:PORT", help=f"Address of the proxy [{LISTEN}].")
@click.option("--public-url", metavar="URL", help="Address that users open, such as https://apps.example.org.")
@click.option("--tls-cert", metavar="FILE", help="The proxy's certificate.")
@click.option("--tls-key", metavar="FILE", help="The certificate's private key.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask; use the defaults.")
@pass_cli
def init(cli: Cli, /, *, yes: bool, **chosen: Any) -> None:
    """Check a commented configuration and write it.

    Writes the file that --config names, otherwise this user's default file.  An existing file is not changed, and
    an invalid configuration is not written.  On a terminal, asks for what the options leave open; elsewhere it
    needs options or --yes.
    """
    from dispatcher.cli.doctor.installation import encryption

    path = cli.config_path or default_paths.config_file()
    if os.path.lexists(path):
        raise Conflict(
            f"There is already a file {path}", fix="edit it, or choose another: dispatcher --config FILE init"
        )
    _complete(cli, chosen, yes=yes)
    text = configuration(**chosen)
    program = "dispatcher"
    if path != default_paths.config_file():
        program += f" --config {shlex.quote(str(path))}"
    found = _check(cli, text, path, f"{program} init {_options(chosen)}".rstrip())
    _create(path, text)
    for finding in encryption(found):
        cli.out.note(f"warning: {finding.what} ({finding.fix})")
    steps = {
        f"{program} doctor": "check this machine",
        f"{program} serve": "run manager and proxy, until Ctrl-C",
        f"{program} add NAME": "add a user, in another terminal; it asks for a password",
    }
    width = max(map(len, steps))
    lines = [f"  {step.ljust(width)}  # {purpose}" for step, purpose in steps.items()]
    cli.out.result(
        {"path": str(path), "next": list(steps)}, "\n".join([f"{path} was written and is valid.  Next:", *lines])
    )


def _complete(cli: Cli, chosen: dict[str, Any], *, yes: bool) -> None:
    """Ask for what no option has given, on a terminal.

    :raises BadRequest: there is no terminal and no option.
    """
    if yes:
        return
    if sys.stdin.isatty():
        _ask(chosen)
    elif all(value is None for value in chosen.values()):
        raise BadRequest(
            "Nothing was written",
            why="standard input is not a terminal, and answers are read from terminals only",
            fix="give them as options, see `dispatcher init --help`; --yes writes the demo app's configuration",
        )
    else:
        cli.out.note(
            "standard input is not a terminal: nothing is asked, what no option has given has its default"
        )


def _check(cli: Cli, text: str, path: Path, again: str) -> Config:
    """Check a configuration before it is written, and return it.

    :param again: the command that made it.
    :raises ConfigError: names every fault.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        draft = Path(directory, path.name)
        draft.write_text(text, encoding="utf-8")
        try:
            return checked(dataclasses.replace(cli, config_path=draft))
        except ConfigError as error:
            found = error.details.get("problems") or [str(error)]
            raise ConfigError(
                f"{path} was not written",
                why="; ".join(found),
                fix=f"correct it and repeat: {again}",
                details={"problems": found},
            ) from error


def _options(chosen: dict[str, Any]) -> str:
    """Return the options of `init` that stand for these values."""
    return shlex.join(
        word
        for key, value in chosen.items()
        if value is not None
        for word in (f"--{key.replace('_', '-')}", str(value))
    )


def _ask(chosen: dict[str, Any]) -> None:
    """Ask for what no option has given, the most important only; an answer that cannot be right is asked again."""
    from pydantic import AfterValidator

    from dispatcher.config.plugins import Plugins
    from dispatcher.plugin.names import app_name
    from dispatcher.plugin.options import Address, Origin

    def ask(key: str, question: str, default: str, kind: Any = str) -> None:
        if chosen[key] is None:
            check = _checked_by(kind)
            shown = bool(default)
            chosen[key] = (
                click.prompt(question, default=default, show_default=shown, value_proc=check, err=True) or None
            )

    providers = click.Choice(sorted(Plugins().available()))
    ask("app", "Name of the app (the demo is built in)", DEMO, Annotated[str, AfterValidator(app_name)])
    if chosen["app"] != DEMO:
        if chosen["provider"] is None:
            chosen["provider"] = click.prompt("Isolation", type=providers, default="subprocess", err=True)
        if chosen["provider"] != "subprocess":
            ask("image", "Image of the app", "")
        if chosen["provider"] != "libvirt":
            ask("command", "Command of the app; {socket} or {port} and {data} are filled in", "")
    ask("listen", "Address of the proxy; 0.0.0.0:8080 is for everybody on the network", LISTEN, Address)
    ask("public_url", "Address in browsers, if it is another (such as https://apps.example.org)", "", Origin)


def _checked_by(kind: Any) -> Callable[[str], str]:
    """Return a function for `click.prompt` that refuses what is not of a type of the configuration."""
    from pydantic import TypeAdapter, ValidationError

    def check(text: str) -> str:
        if text:
            try:
                TypeAdapter(kind).validate_python(text)
            except ValidationError as error:
                raise click.UsageError(error.errors()[0]["msg"].removeprefix("Value error, expected ")) from error
            except DispatcherError as error:
                raise click.UsageError(str(error)) from error
        return text

    return check


def configuration(
    *,
    app: str | None = None,
    title: str | None = None,
    provider: str | None = None,
    command: str | None = None,
    image: str | None = None,
    port: int | None = None,
    listen: str | None = None,
    public_url: str | None = None,
    tls_cert: str | None = None,
    tls_key: str | None = None,
) -> str:
    """Return the text of a configuration; what is None has a default, or is shown as a comment.

    :raises BadRequest: `command` cannot be split into words.
    """
    provider = provider or ("docker" if image else "subprocess")
    app = app or ("app" if command or image else DEMO)
    words = _words(command)
    if app == DEMO and not words and not image:
        words = [sys.executable, "-m", "dispatcher.demo", "--unix", "{socket}"]
    needs_network = port is not None or any("{port}" in word for word in words)
    table = _key(app)
    lines = [
        "# The configuration of dispatcher: docs/reference/configuration.md describes all keys.",
        "# `dispatcher config check` checks a change, `dispatcher reload` applies it.",
        "",
        "[proxy]",
        _line("listen", [listen or LISTEN]),
        _line("public_url", public_url, "https://apps.example.org"),
        _line("tls_cert", tls_cert and str(Path(tls_cert).absolute()), "/etc/dispatcher/tls/cert.pem"),
        _line("tls_key", tls_key and str(Path(tls_key).absolute()), "/etc/dispatcher/tls/key.pem"),
        "",
        "# Values for all apps; the table of an app can change them.",
        "[defaults]",
        _line("provider", provider),
        "# Default: a quarter of this host's memory.",
        _line("memory", None, "2G"),
        '# After this time without use an agent is suspended, which keeps its memory, or stopped ("stop").',
        _line("idle_timeout", "30m"),
        _line("idle_action", "suspend"),
        '# "none"; "private": other hosts, but not this one; "host": everything that this host reaches.',
        _line("network", "private" if needs_network else "none"),
        "",
        f"[apps.{table}]",
        _line("title", title or app.capitalize()),
        "# The app is ready when a request for this path gets a status below 500.",
        _line("health", None, "/"),
        "",
        f"[apps.{table}.{_key(provider)}]",
    ]
    lines += [_line(key, value) for key, value in (("image", image), ("command", words), ("port", port)) if value]
    if provider == "subprocess":
        lines += ["# More paths of this host that the app may read.", _line("read_only", None, ["/opt/apps"])]
    return "\n".join([*lines, ""])


def _words(command: str | None) -> list[str]:
    """Return the words of a command.

    :raises BadRequest: a quotation mark is not closed.
    """
    try:
        words = shlex.split(command or "")
    except ValueError as error:
        raise BadRequest("Cannot read --command", why=str(error), fix="close the quotation mark") from error
    return words


def _line(key: str, value: object, example: object = None) -> str:
    """Return `key = value` in TOML; without a value an example, as a comment."""
    import tomli_w

    shown = example if value is None else value
    if isinstance(shown, list):  # tomli_w writes each element on a line of its own
        words = [tomli_w.dumps({"": word}).partition(" = ")[2].strip() for word in shown]
        text = f"{key} = [{', '.join(words)}]"
    else:
        text = tomli_w.dumps({key: shown}).strip()
    return f"# {text}" if value is None else text


def _key(name: str) -> str:
    """Return a name as a part of a table's name in TOML."""
    import tomli_w

    return tomli_w.dumps({name: 0}).partition(" = ")[0]


def _create(path: Path, text: str) -> None:
    """Write a new file, and its directory where that is missing.

    :raises BadRequest: the path cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # Whatever the umask: who may write the file determines what agents run.
        with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o644)) as file:
            try:
                file.write(text)
                file.flush()
            except OSError:
                path.unlink()  # not half of it
                raise
    except OSError as error:
        raise BadRequest(
            f"Cannot write {path}",
            why=error.strerror or str(error),
            fix="choose another: dispatcher --config FILE init",
        ) from error

"""What an operator can set: the tables [providers.runc] and [apps.NAME.runc]."""

from typing import Annotated

from pydantic import Field

from dispatcher.plugin import AbsolutePath, Argument, Size, Table

Runtime = Annotated[str, Field(pattern=r"[\w./-]*(runc|crun)")]


class Options(Table):
    """[providers.runc].  `Table` refuses misspelt keys."""

    runtime: Runtime = Field(default="runc", description="the program: runc or crun, or the path of one")
    log_size: Size = Field(default=1024 * 1024, ge=4096, description="size at which a log file is rotated")
    log_files: int = Field(
        default=4, ge=1, le=100, description="log files kept per agent, the current one included"
    )


class AppOptions(Table):
    """[apps.NAME.runc]"""

    command: list[Argument] = Field(
        min_length=1, description="program and arguments; {socket} and {data} are replaced"
    )
    rootfs: AbsolutePath | None = Field(
        default=None, description="directory with the app's root file system; by default this host's, read-only"
    )
    read_only: list[AbsolutePath] = Field(default=[], description="additional paths of the host, read-only")
    writable: list[AbsolutePath] = Field(default=[], description="the same, writable if their modes allow it")
    init: bool = Field(
        default=True,
        description="run the app under tini as process 1, which passes on signals and reaps zombies (without rootfs)",
    )
    tmp_size: Size = Field(default=256 * 1024**2, description="size of /tmp and of /dev/shm, in memory")

"""The public, versioned interface for plugins: all that a plugin may import, in one flat module.

    from dispatcher.plugin import App, Provider, hookimpl

`__all__` changes only as `CHANGELOG.md` announces it.  Names are imported when they are first used, so
that a program that needs an error class does not import pydantic, and a shim next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dispatcher.plugin import system_calls
    from dispatcher.plugin.authenticator import (
        Authenticator,
        BaseAuthenticator,
        Ended,
        Identity,
        Redirect,
        WebAuthenticator,
        WebIdentity,
    )
    from dispatcher.plugin.deadline import Deadline, boot_id, boottime
    from dispatcher.plugin.endpoints import checked_unix_path, connect
    from dispatcher.plugin.errors import (
        BadRequest,
        Cancelled,
        ConfigError,
        Conflict,
        DeadlineExceeded,
        DispatcherError,
        Forbidden,
        InsecureEndpoint,
        ManagerUnreachable,
        NotFound,
        PluginError,
        ProviderError,
        SpecConflict,
        StartFailed,
        TooManyRequests,
        Unauthorized,
        Unavailable,
        Unsupported,
    )
    from dispatcher.plugin.hooks import hookimpl
    from dispatcher.plugin.inside import Inside
    from dispatcher.plugin.log_files import MAX_LINE, read_lines, remove_logs
    from dispatcher.plugin.model import (
        HANDLE_VERSION,
        AgentEvent,
        AgentSpec,
        App,
        BackendState,
        Capability,
        Depth,
        Endpoint,
        Finding,
        Handle,
        Isolation,
        Level,
        Limits,
        Network,
        Observation,
        Usage,
    )
    from dispatcher.plugin.names import backend_name, printable, slug
    from dispatcher.plugin.networks import METADATA_NETWORKS, denied_networks, listening_endpoints
    from dispatcher.plugin.options import (
        AbsolutePath,
        Address,
        Addresses,
        Argument,
        Count,
        Duration,
        Environment,
        Flag,
        IpNetworks,
        MaybeCount,
        MaybeDuration,
        MaybeNumber,
        MaybeSize,
        NetworkAddress,
        NetworkAddresses,
        Number,
        Origin,
        PortRange,
        Size,
        Table,
        UidRange,
        UrlPath,
        Variable,
        check_environment,
        matching,
    )
    from dispatcher.plugin.processes.command import SYSTEM_PATH, find_program, last_line, run_command
    from dispatcher.plugin.processes.process import Process, ProcessStat, exit_reason, process_stat
    from dispatcher.plugin.processes.shim import Shim
    from dispatcher.plugin.provider import API_VERSION, Closeable, Progress, Provider, ProviderContext, no_progress
    from dispatcher.plugin.seccomp import seccomp_profile
    from dispatcher.plugin.secret_files import SecretFiles, in_memory, make_owned, owned
    from dispatcher.plugin.ssh import SshMultiplexer
    from dispatcher.plugin.tracked_connections import (
        MAX_CONNECTIONS,
        NEW_CONNECTIONS,
        NEW_CONNECTIONS_BURST,
        NFT_EXCESS,
        find_nft,
        nft_fault,
    )
    from dispatcher.plugin.tree_removal import make_temporary, remove_tree

#: In the order in which a name is looked for: those that import little come first.
_MODULES = (
    "errors",
    "names",
    "deadline",
    "hooks",
    "model",
    "endpoints",
    "options",
    "networks",
    "tracked_connections",
    "authenticator",
    "provider",
    "tree_removal",
    "secret_files",
    "ssh",
    "log_files",
    "processes.process",
    "processes.command",
    "processes.shim",
    "inside",
    "seccomp",
)
#: Modules that are public as a whole.
_WHOLE = ("system_calls",)

__all__ = [
    "API_VERSION",
    "HANDLE_VERSION",
    "MAX_CONNECTIONS",
    "MAX_LINE",
    "METADATA_NETWORKS",
    "NEW_CONNECTIONS",
    "NEW_CONNECTIONS_BURST",
    "NFT_EXCESS",
    "SYSTEM_PATH",
    "AbsolutePath",
    "Address",
    "Addresses",
    "AgentEvent",
    "AgentSpec",
    "App",
    "Argument",
    "Authenticator",
    "BackendState",
    "BadRequest",
    "BaseAuthenticator",
    "Cancelled",
    "Capability",
    "Closeable",
    "ConfigError",
    "Conflict",
    "Count",
    "Deadline",
    "DeadlineExceeded",
    "Depth",
    "DispatcherError",
    "Duration",
    "Ended",
    "Endpoint",
    "Environment",
    "Finding",
    "Flag",
    "Forbidden",
    "Handle",
    "Identity",
    "InsecureEndpoint",
    "Inside",
    "IpNetworks",
    "Isolation",
    "Level",
    "Limits",
    "ManagerUnreachable",
    "MaybeCount",
    "MaybeDuration",
    "MaybeNumber",
    "MaybeSize",
    "Network",
    "NetworkAddress",
    "NetworkAddresses",
    "NotFound",
    "Number",
    "Observation",
    "Origin",
    "PluginError",
    "PortRange",
    "Process",
    "ProcessStat",
    "Progress",
    "Provider",
    "ProviderContext",
    "ProviderError",
    "Redirect",
    "SecretFiles",
    "Shim",
    "Size",
    "SpecConflict",
    "SshMultiplexer",
    "StartFailed",
    "Table",
    "TooManyRequests",
    "UidRange",
    "Unauthorized",
    "Unavailable",
    "Unsupported",
    "UrlPath",
    "Usage",
    "Variable",
    "WebAuthenticator",
    "WebIdentity",
    "backend_name",
    "boot_id",
    "boottime",
    "check_environment",
    "checked_unix_path",
    "connect",
    "denied_networks",
    "exit_reason",
    "find_nft",
    "find_program",
    "hookimpl",
    "in_memory",
    "last_line",
    "listening_endpoints",
    "make_owned",
    "make_temporary",
    "matching",
    "nft_fault",
    "no_progress",
    "owned",
    "printable",
    "process_stat",
    "read_lines",
    "remove_logs",
    "remove_tree",
    "run_command",
    "seccomp_profile",
    "slug",
    "system_calls",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module (PEP 562)."""
    import importlib

    if name in _WHOLE:
        return importlib.import_module(f"{__name__}.{name}")
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                globals()[name] = found[name]
                return found[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__

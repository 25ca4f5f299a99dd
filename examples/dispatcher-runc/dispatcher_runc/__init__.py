"""The plugin: each agent is a container of runc or crun.  The class is imported when it is needed."""

from dispatcher.plugin import hookimpl


@hookimpl
def dispatcher_register_providers():
    from dispatcher_runc.provider import RuncProvider

    return [RuncProvider]

"""libvirt: options in the configuration."""

import pytest
from pydantic import ValidationError

pytest.importorskip("libvirt")

from dispatcher_libvirt.options import AppOptions, Options


@pytest.mark.parametrize(
    ("model", "values", "where", "why"),
    [
        (Options, {"uri": "http://x"}, "uri", "URI of libvirt"),
        (Options, {"uri": "qemu:///sys tem"}, "uri", "URI of libvirt"),
        (Options, {"uri": "qemu+ssh://host/system"}, "", "needs pool"),
        (Options, {"ports": [80, 90]}, "ports", "two ports"),
        (Options, {"ports": [3000, 2000]}, "ports", "two ports"),
        (Options, {"network": "a b"}, "network", "a name"),
        (Options, {"network": "-x"}, "network", "a name"),
        (Options, {"storage": "relative"}, "storage", "absolute"),
        (Options, {"nework": "x"}, "nework", "Extra"),
        (AppOptions, {}, "", "is required"),
        (AppOptions, {"initrd": "/i"}, "", "is required"),
        (AppOptions, {"image": "/b", "initrd": "/i"}, "", "needs kernel"),
        (AppOptions, {"image": "../b"}, "image", "absolute"),
        (AppOptions, {"image": "/a/../b"}, "image", "absolute"),
        (AppOptions, {"image": "/a\nb"}, "image", "absolute"),
        (AppOptions, {"kernel": "/k", "command": ["x"]}, "command", "absolute path first"),
        (AppOptions, {"kernel": "/k", "command": ["/x", "a\0"]}, "command", "NUL"),
        (AppOptions, {"kernel": "/k", "data": "data"}, "data", "absolute path"),
        (AppOptions, {"kernel": "/k", "data": "/a/../b"}, "data", "absolute path"),
        (AppOptions, {"kernel": "/k", "data_size": "1M"}, "data_size", "greater"),
        (AppOptions, {"kernel": "/k", "default_memory": "1M"}, "default_memory", "greater"),
        (AppOptions, {"kernel": "/k", "cpu": "a b"}, "cpu", "a name"),
        (AppOptions, {"kernel": "/k", "machine": "q35,accel=kvm"}, "machine", "a name"),
        (AppOptions, {"kernel": "/k", "xml": ["<name/>"]}, "xml", "may be added"),
        (AppOptions, {"kernel": "/k", "port": 0}, "port", "greater"),
    ],
)
def test_faults_name_their_key(model, values, where, why):
    with pytest.raises(ValidationError) as caught:
        model.model_validate(values)
    faults = caught.value.errors()
    assert any(why in fault["msg"] for fault in faults), faults
    assert any((fault["loc"] or ("",))[0] == where for fault in faults), faults

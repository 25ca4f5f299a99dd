"""The Docker provider's options: what is taken, what is refused, and by which path it is named."""

import pytest
from pydantic import ValidationError

from dispatcher.config.load import parse
from dispatcher.plugin.errors import ConfigError
from dispatcher.config.plugins import Plugins
from dispatcher_docker.options import DockerAppOptions, DockerOptions


def app(**table):
    parsed = parse({"apps": {"x": {"provider": "docker", "docker": table}}})
    return parsed.template("x", Plugins()).options


def test_the_defaults_are_safe():
    options = app(image="x")
    assert (options.user, options.read_only, options.no_new_privileges, options.seccomp) == (
        "agent",
        True,
        True,
        "default",
    )
    assert not (options.cap_add or options.devices or options.mounts or options.gpus or options.network)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({}, "apps.x.docker: either image or build is required"),
        ({"image": "x", "build": "/y"}, "either image or build"),
        ({"image": "--privileged"}, "apps.x.docker.image: found '--privileged'"),
        ({"image": "a b"}, "apps.x.docker.image"),
        ({"image": "x", "imagge": 1}, "apps.x.docker.imagge: unknown key, did you mean 'image'?"),
        ({"image": "x", "port": 0}, "apps.x.docker.port"),
        ({"image": "x", "port": "80"}, "apps.x.docker.port"),
        ({"image": "x", "pull": "sometimes"}, "apps.x.docker.pull"),
        ({"image": "x", "cap_add": ["ALL"]}, "apps.x.docker.cap_add"),
        ({"image": "x", "cap_add": ["net_admin"]}, "apps.x.docker.cap_add"),
        ({"image": "x", "network": "host"}, "apps.x.docker.network"),
        ({"image": "x", "network": "a/b"}, "apps.x.docker.network"),
        ({"image": "x", "data_path": "/"}, "apps.x.docker.data_path"),
        ({"image": "x", "data_path": "/a/../etc"}, "apps.x.docker.data_path"),
        ({"image": "x", "data_path": "/a:b"}, "apps.x.docker.data_path"),
        ({"image": "x", "devices": ["sda"]}, "apps.x.docker.devices"),
        ({"image": "x", "tmpfs": {"tmp": "1M"}}, "apps.x.docker.tmpfs"),
        ({"image": "x", "tmpfs": {"/tmp": "much"}}, "apps.x.docker.tmpfs"),
        ({"image": "x", "mounts": [{"source": "rel", "target": "/t"}]}, "apps.x.docker.mounts.0.source"),
        ({"image": "x", "mounts": [{"source": "/s"}]}, "apps.x.docker.mounts.0.target: is missing"),
        ({"image": "x", "read_only": "no"}, "apps.x.docker.read_only"),
        ({"image": "x", "user": "1000"}, "apps.x.docker.user"),
        ({"image": "x", "gpus": "some"}, "apps.x.docker.gpus"),
    ],
)
def test_bad_options_are_named(table, words):
    with pytest.raises(ConfigError) as caught:
        app(**table)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "image",
    ["x", "x:1", "registry.example.org:5000/a/b:tag", "a@sha256:" + "0" * 64, "localhost/x:1@sha256:" + "0" * 64],
)
def test_images_of_every_form_are_taken(image):
    assert app(image=image).image == image


def test_sizes_are_written_as_everywhere():
    options = app(image="x", shm="1G", tmpfs={"/tmp": "16M"})
    assert (options.shm, options.tmpfs) == (1 << 30, {"/tmp": 16 << 20})


@pytest.mark.parametrize("url", ["docker.sock", "unix:relative", "ftp://x", "tcp:///x"])
def test_bad_urls_are_refused(url):
    with pytest.raises(ValidationError, match="unix:///PATH"):
        DockerOptions(url=url)


def test_a_certificate_needs_its_key():
    with pytest.raises(ValidationError, match="go together"):
        DockerOptions.model_validate({"tls_cert": "/x"})


def test_an_app_with_a_directory_to_build_needs_no_image():
    assert DockerAppOptions.model_validate({"build": "/srv/app"}).image == ""

"""Images: names, the progress of a pull, the digest of a build directory."""

import pytest
from dispatcher_docker.images import Layers, _host, _repository_and_tag, directory_digest


def test_layers_add_up():
    layers = Layers()
    said = [
        layers.update(message)
        for message in (
            {"status": "Pulling from library/x", "id": "latest"},
            {"status": "Pulling fs layer", "id": "a"},
            {"status": "Downloading", "id": "a", "progressDetail": {"current": 50, "total": 100}},
            {"status": "Downloading", "id": "b", "progressDetail": {"current": 100, "total": 100}},
            {"status": "Pull complete", "id": "a"},
            {"status": "Pull complete", "id": "b"},
        )
    ]
    fractions = [one[1] for one in said[2:]]
    assert fractions == sorted(fractions)
    assert said[-1] == ("2 of 2 layers, b pull complete", 1.0)


def test_layers_bear_nonsense():
    layers = Layers()
    for message in (
        {},
        {"status": "Digest: sha256:1"},
        {"id": "a"},
        {"id": "a", "status": "?", "progressDetail": {}},
    ):
        layers.update(message)


@pytest.mark.parametrize(
    ("reference", "repository", "tag", "host"),
    [
        ("x", "x", "latest", "docker.io"),
        ("x:1", "x", "1", "docker.io"),
        ("r.example.org:5000/a/b", "r.example.org:5000/a/b", "latest", "r.example.org:5000"),
        ("r.example.org:5000/a/b:2", "r.example.org:5000/a/b", "2", "r.example.org:5000"),
        ("x@sha256:00", "x", "sha256:00", "docker.io"),
        ("x:1@sha256:00", "x", "sha256:00", "docker.io"),
        ("localhost/x", "localhost/x", "latest", "localhost"),
        ("team/x", "team/x", "latest", "docker.io"),
    ],
)
def test_image_names(reference, repository, tag, host):
    assert _repository_and_tag(reference) == (repository, tag)
    assert _host(reference) == host


def test_a_build_directory_s_digest_sees_what_matters(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\n")
    first = directory_digest(tmp_path, "Dockerfile", {})
    assert directory_digest(tmp_path, "Dockerfile", {}) == first
    assert directory_digest(tmp_path, "Dockerfile", {"A": "1"}) != first
    (tmp_path / "new").symlink_to("/etc/passwd")
    assert directory_digest(tmp_path, "Dockerfile", {}) != first

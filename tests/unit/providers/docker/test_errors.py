"""Every error of the SDK becomes one of the project's, with what to do."""

import socket

import docker.errors
import pytest
import requests
import urllib3.exceptions

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import DeadlineExceeded, DispatcherError, NotFound, ProviderError, Unavailable
from dispatcher_docker.errors import NameTaken, NoSuchObject, translated


def refusal(status, words, kind=docker.errors.APIError):
    response = requests.Response()
    response.status_code = status
    response.url = "http+docker://localhost/v1.41/x"
    return kind("x", response=response, explanation=words)


def outcome(error, deadline=None):
    with pytest.raises(DispatcherError) as caught, translated("start it", "unix:///x", deadline or Deadline(5)):
        raise error
    assert caught.value.__cause__ is error or caught.value is error
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (refusal(404, "No such container: x", docker.errors.NotFound), NoSuchObject),
        (refusal(404, "No such image: x", docker.errors.ImageNotFound), NotFound),
        (refusal(409, 'The name "/x" is already in use by container "1"'), NameTaken),
        (refusal(409, "Container 1 is not running"), ProviderError),
        (refusal(500, "no space left on device"), ProviderError),
        (refusal(403, "denied"), ProviderError),
        (docker.errors.TLSParameterError("bad"), ProviderError),
        (docker.errors.DockerException("odd"), Unavailable),
        (requests.exceptions.ConnectionError("refused"), Unavailable),
        (requests.exceptions.ReadTimeout("late"), DeadlineExceeded),
        (urllib3.exceptions.ReadTimeoutError(None, "", "late"), DeadlineExceeded),
        (urllib3.exceptions.ProtocolError("broken", ConnectionResetError()), Unavailable),
        (socket.timeout("late"), DeadlineExceeded),
        (ConnectionRefusedError(111, "refused"), Unavailable),
        (requests.exceptions.ConnectionError(PermissionError(13, "Permission denied")), Unavailable),
        (ValueError("not JSON"), Unavailable),
    ],
)
def test_kinds(error, kind):
    found = outcome(error)
    assert isinstance(found, kind)
    assert found.fix, found


def test_past_the_deadline_a_lost_connection_is_a_deadline():
    assert isinstance(outcome(requests.exceptions.ConnectionError("x"), Deadline(0)), DeadlineExceeded)


def test_a_refusal_past_the_deadline_is_still_a_refusal():
    assert isinstance(outcome(refusal(500, "no"), Deadline(0)), ProviderError)


RUNC = "OCI runtime create failed: runc create failed: unable to start container process:"
PARSER = "AppArmor enabled on system but the docker-default profile could not be loaded: running `/sbin/apparmor_parser apparmor_parser -Kr /var/lib/docker/tmp/docker-default1` failed with output: \nerror:"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("write /x: no space left on device", "free space"),
        ('invalid mount config for type "bind": bind source path does not exist: /x', "a manager in a container"),
        (f'{RUNC} exec: "nope": executable file not found in $PATH: unknown', "no such program"),
        (f'{RUNC} exec: "/bin/nope": stat /bin/nope: no such file or directory: unknown', "no such program"),
        ("crun: executable file `nope` not found in $PATH: No such file or directory", "no such program"),
        (f'{PARSER} exec: "apparmor_parser": executable file not found in $PATH', "install apparmor on"),
        (f"{PARSER} AppArmor parser error", "repair AppArmor"),
        (f"{RUNC} unable to apply apparmor profile: write /proc/self/attr/exec: no such file", "`apparmor`"),
        ("Cannot kill container: unable to signal init: permission denied", "upgrade docker and AppArmor"),
        ('exec: "docker-init": executable file not found in $PATH', "install the package that has docker-init"),
        ("could not select device driver", "GPU"),
        ("something else", "engine's log"),
    ],
)
def test_advice_fits(words, advice):
    assert advice in outcome(refusal(500, words)).fix


def test_no_permission_says_so():
    found = outcome(requests.exceptions.ConnectionError(PermissionError(13, "Permission denied")))
    assert "no permission" in found.why


def test_our_own_errors_pass():
    mine = ProviderError("Mine")
    assert outcome(mine) is mine


def test_words_stay_bounded():
    assert len(outcome(refusal(500, "x" * 100_000)).why) <= 600


def test_other_faults_are_not_hidden():
    with pytest.raises(ZeroDivisionError), translated("x", "unix:///x", Deadline(5)):
        raise ZeroDivisionError

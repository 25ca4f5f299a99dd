"""The authenticator `pam` with real modules, the real tools for accounts, and a module that misbehaves."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from dispatcher.plugin import Deadline, DeadlineExceeded, Forbidden, Unavailable
from tests.support.installation import Installation, until
from tests.support.manager_process import client_of, manager_in
from tests.support.private_etc import PrivateEtc

pytestmark = [
    pytest.mark.root,
    pytest.mark.program("unshare", "nsenter", "useradd", "gcc"),
    pytest.mark.xdist_group("pam"),
]
PASSWORDS = {"alice": "correct horse battery", "bob": "another good one"}
PASSWORD = PASSWORDS["alice"]


@pytest.fixture(scope="module")
def etc(tmp_path_factory):
    with PrivateEtc(tmp_path_factory.mktemp("pam")) as made:
        made.run("groupadd", "people")
        made.add("alice", PASSWORD, "--groups", "people", "--uid", "4001")
        made.add("bob", PASSWORDS["bob"], "--gid", "people", "--uid", "4002")
        made.module()
        yield made


@pytest.fixture
def pam(etc, monkeypatch):
    """Make an authenticator."""
    from dispatcher_pam.authenticator import PamAuthenticator

    etc.use(monkeypatch)
    return lambda **options: PamAuthenticator(
        options=PamAuthenticator.Options(**{"refusal_time": "100ms", **options})
    )


@pytest.mark.program("setpriv")
def test_without_the_right_to_audit_modules_find_a_kernel_without_it(etc, pam):
    code = (
        "import ctypes, errno, socket\n"
        "from dispatcher_pam import helper\n"
        "helper.hide_audit(ctypes.CDLL(None))\n"
        "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE).close()\n"
        "socket.socket().close()\n"
        "try:\n    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 9)\n"
        "except OSError as error:\n    print(error.errno == errno.EPROTONOSUPPORT)\n"
        "else:\n    print('open')\n"
    )

    def found(*before):
        return subprocess.run(
            [*before, sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout

    if os.uname().machine in {"x86_64", "aarch64"}:
        assert found("setpriv", "--bounding-set=-audit_write", "--inh-caps=-audit_write") == "True\n"
    assert found() == "open\n"


@pytest.fixture
def misbehaving(etc, pam):
    """Make an authenticator whose stack has a module that does something."""

    def make(arguments, stack="auth requisite {}\nauth required pam_unix.so\naccount required pam_unix.so\n"):
        etc.service("misbehaving", stack.format(f"/etc/misbehaving.so {arguments}"))
        return pam(service="misbehaving")

    return make


def sign_in(authenticator, name="alice", password=PASSWORD, seconds=20.0):
    found = authenticator.authenticate(name, password, deadline=Deadline(seconds))
    return found.user if found else None


def why_not(authenticator, *arguments):
    with pytest.raises(Unavailable) as caught:
        sign_in(authenticator, *arguments)
    return str(caught.value)


def helpers(parent=0):
    """Return the processes of helpers that a process started, by default this one."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                started = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if int(started) == (parent or os.getpid()) and b"helper.py" in command:
                found[int(entry.name)] = command
    return found


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("chage", "--expiredate", "1"), "expired"),
        (("usermod", "--lock"), "wrong password"),
        (("chage", "--lastday", "0"), "the password has expired and must be changed first"),
        (("passwd", "--delete"), "wrong password"),  # empty: Debian's stack says `nullok`
    ],
)
def test_an_account_that_may_not_be_used_is_refused_and_the_log_says_why(etc, pam, caplog, change, told):
    name = f"kit-{change[1].strip('-')}"
    etc.add(name, PASSWORD)
    caplog.set_level("INFO")
    assert sign_in(pam(), name) == name
    etc.run(*change, name)
    assert sign_in(pam(), name) is None
    assert told in caplog.text and name in caplog.text


def test_root_and_accounts_of_services_are_refused_whatever_their_password(etc, pam, caplog):
    caplog.set_level("INFO")
    etc.run("chpasswd", stdin=f"root:{PASSWORD}\nbin:{PASSWORD}\n")
    for name in ("root", "bin"):
        assert sign_in(pam(min_uid=100), name) is None
        assert f"{name} may not sign in: the user id" in caplog.text
    assert sign_in(pam(min_uid=4001)) == "alice"
    assert sign_in(pam(min_uid=4002)) is None


def test_names_are_those_of_accounts_and_names_of_one_account_are_one_user(etc, pam):
    etc.add("alias", "its own password", "--non-unique", "--uid", "4001")
    etc.run("useradd", "--badname", "--no-create-home", "Carol")
    etc.run("chpasswd", stdin=f"Carol:{PASSWORD}\n")
    assert sign_in(pam(), "alias", "its own password") == "alice"
    assert sign_in(pam(), "alias") is None
    assert sign_in(pam(), "Carol") == "Carol"
    for name in ("carol", "ALICE", "alice ", "alice:", "../alice", "4001", "+alice"):
        assert sign_in(pam(), name) is None


def test_only_members_of_allowed_groups_sign_in(pam):
    assert sign_in(pam(allow_groups=["people"])) == "alice"
    assert sign_in(pam(allow_groups=["daemon", "people"]), "bob", PASSWORDS["bob"]) == "bob"  # by the main group
    assert sign_in(pam(allow_groups=["daemon"])) is None
    assert sign_in(pam(allow_groups=["People"])) is None


def test_an_identity_has_groups_and_the_user_id(etc, pam):
    found = pam().authenticate("alice", PASSWORD, deadline=Deadline(20))
    assert (found.user, found.groups, found.subject) == ("alice", frozenset({"alice", "people"}), "4001")
    assert pam().lookup("alice", deadline=Deadline(20)) == found
    for at in range(3):
        etc.run("groupadd", f"kit-group{at}")
        etc.run("gpasswd", "--add", "bob", f"kit-group{at}")
    assert pam().lookup("bob", deadline=Deadline(20)).groups == {
        "people",
        "kit-group0",
        "kit-group1",
        "kit-group2",
    }


@pytest.mark.parametrize(
    ("change", "stays"),
    [
        (("chage", "--expiredate", "1"), False),
        (("chage", "--lastday", "1", "--maxdays", "1", "--inactive", "1"), False),
        (("usermod", "--lock"), False),
        (("userdel",), False),
        (("gpasswd", "--delete", "{}", "people"), False),
        (("usermod", "--uid", "150"), False),
        (("chage", "--lastday", "0"), True),  # the password must be changed
        (("usermod", "--password", "*"), True),  # the password is elsewhere
        (("usermod", "--password", "!"), True),  # of `useradd`: the password is elsewhere
    ],
)
def test_a_lookup_finds_who_may_still_sign_in(etc, pam, change, stays, request):
    name = f"kit-look{request.node.callspec.indices['change']}"
    etc.add(name, PASSWORD, "--groups", "people")
    authenticator = pam(allow_groups=["people"])
    assert authenticator.lookup(name, deadline=Deadline(20)).user == name
    words = [each.format(name) for each in change]
    etc.run(*words, *([] if name in words else [name]))
    found = authenticator.lookup(name, deadline=Deadline(20))
    assert (found is not None) == stays


def test_a_lookup_asks_modules_too_and_a_fault_is_not_the_end_of_an_account(etc, pam, misbehaving, monkeypatch):
    account = "auth required pam_unix.so\naccount required {}\n"

    def lookup(authenticator, name="alice"):
        return authenticator.lookup(name, deadline=Deadline(20))

    assert lookup(misbehaving("code=0", account)).user == "alice"
    for code in (6, 10, 13):
        assert lookup(misbehaving(f"code={code}", account)) is None
    for code in (4, 7, 9, 26):  # 7: by which Debian's stack replaces others
        with pytest.raises(Unavailable):
            lookup(misbehaving(f"code={code}", account))
    assert lookup(pam(), "root") is lookup(pam(), "nobody-here") is lookup(pam(), "no/body") is None
    with pytest.raises(Unavailable):
        lookup(pam(service="absent"))
    etc.use(monkeypatch, uid=4001)
    assert lookup(pam()).user == "alice"
    with pytest.raises(Unavailable):
        lookup(pam(), "bob")


def test_nobody_has_left_while_the_host_is_closed_for_maintenance(etc, pam):
    """`shutdown` and administrators create /etc/nologin, for which pam_nologin refuses everybody but root."""
    closed = etc.etc / "closed"
    etc.service(
        "closed",
        "auth required pam_unix.so\naccount requisite pam_nologin.so file=/etc/closed\n@include common-account\n",
    )
    authenticator = pam(service="closed")
    found = authenticator.lookup("alice", deadline=Deadline(20))
    closed.write_text("Closed until noon.\n")
    assert sign_in(authenticator) is None
    with pytest.raises(Unavailable):
        authenticator.lookup("alice", deadline=Deadline(20))
    closed.unlink()
    assert sign_in(authenticator) == "alice"
    assert authenticator.lookup("alice", deadline=Deadline(20)) == found


def test_an_outage_of_the_name_service_is_not_an_unknown_name(etc, pam):
    etc.name_service("kitdown")
    try:
        assert sign_in(pam()) == "alice"
        assert "Accounts of this host cannot be found: Connection refused" in why_not(pam(), "nobody-here")
        with pytest.raises(Unavailable):
            pam().lookup("nobody-here", deadline=Deadline(20))
    finally:
        etc.name_service()


def test_a_refusal_takes_the_same_time_whatever_its_reason(etc, pam):
    """Without it a name that exists takes twice as long, by the hash, and root less than a name that does not."""
    for name in ("alice", "kit-hashed"):
        if name != "alice":
            etc.add(name, PASSWORD)
        etc.run("chpasswd", "--crypt-method", "YESCRYPT", stdin=f"{name}:{PASSWORDS.get(name, 'x1')}\n")
    authenticator = pam(refusal_time="1500ms", allow_groups=["people"])

    def seconds(name):
        begin = time.monotonic()
        assert sign_in(authenticator, name, "x1") is None
        return time.monotonic() - begin

    with ThreadPoolExecutor(5) as pool:
        took = list(pool.map(seconds, ("alice", "nobody-here", "root", "kit-hashed", "sshd")))
    assert max(took) - min(took) < 0.1, took
    assert 1.5 <= min(took), took


def test_delays_that_modules_ask_for_are_not_added(etc, pam):
    etc.service("delaying", "auth optional pam_faildelay.so delay=9000000\n@include dispatcher\n")
    begin = time.monotonic()
    assert sign_in(pam(service="delaying"), password="wrong") is None
    assert time.monotonic() - begin < 5


def test_no_helper_outlives_the_manager(misbehaving):
    from dispatcher_pam import authenticator

    misbehaving("hang")
    code = (
        "import sys; from dispatcher_pam import authenticator as a; from dispatcher.plugin import Deadline;"
        f"a.HELPER = {authenticator.HELPER!r};"
        "pam = a.PamAuthenticator(options=a.PamOptions(service='misbehaving'));"
        "pam.authenticate('alice', 'x', deadline=Deadline(60))"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as manager:
        until("a helper", lambda: helpers(manager.pid))
        [helper] = helpers(manager.pid)
        until("its question is read", lambda: os.readlink(f"/proc/{helper}/fd/0") == "/dev/null")
        manager.kill()
    until("its end", lambda: not Path("/proc", str(helper)).exists())


def test_a_module_that_hangs_is_killed_and_delays_no_other_attempt(misbehaving, pam):
    hanging = misbehaving("change hang")
    with ThreadPoolExecutor(1) as pool:
        begin = time.monotonic()
        attempt = pool.submit(sign_in, hanging, seconds=3)
        while not helpers() or time.monotonic() - begin < 1:
            time.sleep(0.02)
        [pid] = helpers()
        proc = Path("/proc", str(pid))
        for file in ("cmdline", "environ"):
            content = (proc / file).read_bytes()
            assert PASSWORD.encode() not in content and b"alice" not in content
        # Nothing of this process is inherited.
        opened = {os.readlink(each) for each in (proc / "fd").iterdir()}
        assert opened == {"/dev/null", "/memfd:answer (deleted)"}
        assert [sign_in(pam()) for _ in range(2)] == ["alice"] * 2
        assert not attempt.done()
        with pytest.raises(DeadlineExceeded, match="misbehaving does not answer: a module takes too long"):
            attempt.result()
        assert time.monotonic() - begin < 6
    assert helpers() == {}


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("crash", "a module failed"),
        ("exit", "a module ended the process"),
        ("password code", "asks for more than a password: its prompt was 'Verification code: '"),
        ("code=4", "System error (code 4)"),
        ("code=9", "(code 9)"),
        ("code=26", "(code 26)"),
    ],
)
def test_a_fault_of_a_module_is_no_wrong_password(misbehaving, pam, does, told):
    assert told in why_not(misbehaving(does))
    assert sign_in(pam()) == "alice"


@pytest.mark.parametrize("does", ["password shown", "shown", "code code"])
def test_a_question_other_than_for_the_password_is_not_answered(misbehaving, does):
    assert "asks for more than a password" in why_not(misbehaving(does))


@pytest.mark.parametrize("does", ["print", "change", "close", "text", "daemon"])
def test_what_a_module_does_to_its_process_changes_no_answer(misbehaving, does):
    begin = time.monotonic()
    authenticator = misbehaving(does)
    assert sign_in(authenticator) == "alice"
    assert sign_in(authenticator, password="wrong") is None
    assert time.monotonic() - begin < 5


def test_refusals_of_modules_are_wrong_passwords(misbehaving):
    for code in (6, 7, 10, 11, 12, 13):
        assert sign_in(misbehaving(f"code={code}")) is None
        after = "auth required pam_unix.so\naccount required {}\n"
        assert sign_in(misbehaving(f"code={code}", after)) is None


def test_a_stack_that_accepts_without_a_password_or_changes_the_user_is_refused(etc, pam, misbehaving):
    assert "accepts users without a password" in why_not(pam(service="su"))  # pam_rootok
    assert "changed the user" in why_not(misbehaving("rename", "auth required pam_unix.so\naccount required {}\n"))


def test_a_user_without_an_account_is_refused_even_if_a_module_accepts_the_password(misbehaving):
    accepting = "auth sufficient {}\naccount required pam_permit.so\n"
    assert sign_in(misbehaving("password", accepting)) == "alice"
    assert sign_in(misbehaving("password", accepting), "nobody-here") is None


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("absent", None, "/etc/pam.d/absent is missing, and PAM would use the service `other`"),
        (
            "damaged",
            "auth [success=1 default=ignore] pam_absent.so\nauth requisite pam_deny.so\n",
            "pam_absent.so",
        ),
        ("garbled", "auth required pam_unix.so\nnonsense\n", "invalid line 'nonsense'"),
        ("partial", "@include absent\n", "there is no file /etc/pam.d/absent"),
    ],
)
def test_a_service_that_cannot_be_used_is_named(etc, pam, name, text, told):
    if text is not None:
        etc.service(name, text)
    authenticator = pam(service=name)
    assert told in why_not(authenticator)
    with pytest.raises(Unavailable) as caught:
        authenticator.check(deadline=Deadline(20))
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"service": "other"}, "a service of its own"),
        ({"service": "../passwd"}, "the name of a file in /etc/pam.d"),
        ({"service": "Dispatcher"}, "in lower case"),  # libpam makes it so
        ({"min_uid": 0}, "greater than or equal to 100"),
        ({"allow_groups": ["two words"]}, "the name of a group"),
        ({"allow_root": True}, "Extra inputs"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, told):
    from dispatcher_pam.options import PamOptions

    with pytest.raises(ValidationError, match=told):
        PamOptions(**options)


def test_check_tries_a_sign_in(etc, pam, misbehaving):
    pam().check(deadline=Deadline(20))
    pam(allow_groups=["people"]).check(deadline=Deadline(20))
    for made, told in (
        (lambda: pam(allow_groups=["people", "absent"]), "There is no group 'absent'"),
        (lambda: pam(service="su"), "accepts users without a password"),
        (lambda: misbehaving("password", "auth sufficient {}\n"), "accepts any password"),
        (lambda: misbehaving("code=9"), "(code 9)"),
        (lambda: misbehaving("password code"), "Verification code"),
        (lambda: misbehaving("crash"), "ended with -11"),
    ):
        with pytest.raises(Unavailable) as caught:
            made().check(deadline=Deadline(20))
        assert told in str(caught.value)


def test_the_manager_of_an_ordinary_user_verifies_that_users_password_alone(etc, pam, monkeypatch):
    etc.use(monkeypatch, uid=4001)
    assert sign_in(pam()) == "alice"
    assert sign_in(pam(), password="wrong") is None
    with pytest.raises(Unavailable, match="Nobody but alice can sign in"):
        pam().check(deadline=Deadline(20))


def test_thirty_sign_in_at_once(pam):
    authenticator = pam(allow_groups=["people"])
    begin = time.monotonic()

    def attempt(at):
        name = ("alice", "bob")[at % 2]
        return sign_in(authenticator, name, PASSWORDS[name] if at % 3 else "wrong"), name if at % 3 else None

    with ThreadPoolExecutor(30) as pool:
        for found, expected in pool.map(attempt, range(30)):
            assert found == expected
    assert time.monotonic() - begin < 20


def test_who_is_locked_on_the_host_is_signed_out(etc, pam, short_tmp, monkeypatch):
    etc.add("dora", PASSWORD)
    table = {"authenticator": "pam", "pam": {"refusal_time": "100ms"}}
    with manager_in(short_tmp, monkeypatch, auth=table) as manager:
        with client_of(manager) as client, client_of(manager, "proxy_socket") as proxy:

            def left():
                client.begin_sync()
                until("the end of the synchronisation", lambda: not client.sync()["running"])
                assert client.sync()["problems"] == []
                return client.sync()["left"]

            for name in ("alice", "dora"):
                proxy.login(name, PASSWORD, address="192.0.2.1")
            assert left() == []
            etc.run("usermod", "--lock", "dora")
            assert left() == ["dora"]
            assert [each["user"] for each in client.sessions()["sessions"]] == ["alice"]


def test_a_user_of_the_host_gets_an_agent_and_doctor_says_what_is_wrong(etc, pam, short_tmp, monkeypatch):
    table = {"authenticator": "pam", "pam": {"refusal_time": "100ms", "allow_groups": ["people"]}}
    with manager_in(short_tmp, monkeypatch, auth=table) as manager:
        with client_of(manager) as client, client_of(manager, "proxy_socket") as proxy:
            assert client.check_authenticator("pam")["findings"][0]["level"] == "ok"
            assert proxy.login("Alice", PASSWORD, address="192.0.2.1")["session"]["user"] == "alice"
            assert [each["user"] for each in client.agents()["agents"]] == ["alice"]
            for name, password in (("alice", "wrong"), ("root", PASSWORD), ("nobody-here", PASSWORD)):
                with pytest.raises(Forbidden) as refused:
                    proxy.login(name, password, address="192.0.2.1")
                assert refused.value.what == "Wrong name or password"
            file = etc.etc / "pam.d/dispatcher"
            text = file.read_text()
            file.unlink()
            [found] = client.check_authenticator("pam")["findings"]
            file.write_text(text)
            assert found["level"] == "error"
            assert "/etc/pam.d/dispatcher is missing" in f"{found['what']} {found.get('why')}"


@pytest.mark.bubblewrap
def test_a_program_signs_in_through_the_portal(etc, short_tmp):
    extra = '[auth]\nauthenticator = "pam"\n[auth.pam]\nallow_groups = ["people"]\nrefusal_time = "100ms"\n'
    with Installation(short_tmp, extra=extra, inside=etc.inside) as site:
        site.start("manager")
        site.start("proxy")
        assert site.app(site.login("alice", PASSWORD))["path"] == "/"
        origin = f"http://127.0.0.1:{site.port}"
        wrong = {"user": "alice", "password": "wrong"}
        refused = site.web("POST", "/auth/login", wrong, Accept="application/json", Origin=origin)
        assert (refused.status, refused.json()["title"]) == (403, "Name and password do not match")


def test_who_may_not_sign_in_at_this_time_has_not_left(etc, pam):
    etc.service("hours", "auth required pam_unix.so\naccount required pam_unix.so\naccount required pam_time.so\n")
    etc.run(
        "sh", "-c", "mkdir -p /etc/security; cat > /etc/security/time.conf", stdin="hours;*;alice;!Al0000-2400\n"
    )
    authenticator = pam(service="hours")
    assert sign_in(authenticator, "bob", PASSWORDS["bob"]) == "bob"
    assert sign_in(authenticator) is None
    assert authenticator.lookup("alice", deadline=Deadline(20)).user == "alice"

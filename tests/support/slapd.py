"""A real OpenLDAP server with a few people, on ports of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.support.certificates import Authority
from tests.support.edge_daemon import free_port
from tests.support.stopped import stopped

BASE = "dc=example,dc=org"
PEOPLE_BASE = f"ou=people,{BASE}"
GROUP_BASE = f"ou=groups,{BASE}"
ADMIN = f"cn=admin,{BASE}"
ADMIN_PASSWORD = "the secret of the administrator"
PEOPLE = {"alice": "correct horse battery", "zoë": "schöne Grüße", "bob": "another good one"}
OUTSIDER = ("mallory", "let me in please")
PROGRAM = "/usr/sbin/slapd"

_CONFIG = """
include /etc/ldap/schema/core.schema
include /etc/ldap/schema/cosine.schema
include /etc/ldap/schema/nis.schema
include /etc/ldap/schema/inetorgperson.schema
modulepath /usr/lib/ldap
moduleload back_mdb
moduleload ppolicy
pidfile {directory}/slapd.pid
threads 8
TLSCACertificateFile {authority}
TLSCertificateFile {certificate}
TLSCertificateKeyFile {key}
{security}
database mdb
suffix "dc=example,dc=org"
rootdn "cn=admin,dc=example,dc=org"
rootpw "{admin_password}"
directory {directory}/data
limits dn.exact="cn=paged,dc=example,dc=org" size.soft=50 size.hard=50 size.prtotal=unlimited
limits dn.exact="cn=bounded,dc=example,dc=org" size.soft=50 size.hard=50
overlay ppolicy
ppolicy_default "cn=policy,dc=example,dc=org"
access to attrs=userPassword by anonymous auth by * none
access to * by self read by users read by anonymous {anonymous}
"""
_ENTRIES = """
dn: dc=example,dc=org
objectClass: dcObject
objectClass: organization
o: Example

dn: ou=people,dc=example,dc=org
objectClass: organizationalUnit

dn: ou=groups,dc=example,dc=org
objectClass: organizationalUnit

dn: cn=policy,dc=example,dc=org
objectClass: device
objectClass: pwdPolicy
pwdAttribute: userPassword
pwdMustChange: TRUE
pwdLockout: FALSE
"""


class Slapd:
    """The server; a context manager.

    :param people: names and passwords; an `outsider` is in the directory and in no group but `others`.
    :param days: for which the certificate is valid; below zero: expired; :param hosts: that it names.
    :param encrypted_only: refuse sign-ins without TLS.
    """

    def __init__(
        self,
        directory: Path,
        *,
        people=PEOPLE,
        days=30,
        hosts=("127.0.0.1",),
        encrypted_only=True,
        anonymous="read",
    ):
        self.directory = directory
        (directory / "data").mkdir(parents=True)
        self.port, self.tls_port = free_port(), free_port()
        self.authority = Authority(directory)
        certificate, key = self.authority.issue("directory", hosts, days=days)
        (directory / "slapd.conf").write_text(
            _CONFIG.format(
                directory=directory,
                authority=self.authority.path,
                certificate=certificate,
                key=key,
                security="security simple_bind=128" if encrypted_only else "",
                admin_password=ADMIN_PASSWORD,
                anonymous=anonymous,
            )
        )
        self.process: subprocess.Popen | None = None
        entries = [_ENTRIES, *(person(name, password) for name, password in people.items()), person(*OUTSIDER)]
        self.entries("slapadd", "\n".join([*entries, group("staff", *people), group("others", OUTSIDER[0])]))

    @property
    def url(self):
        return f"ldap://127.0.0.1:{self.port}"

    @property
    def tls_url(self):
        return f"ldaps://127.0.0.1:{self.tls_port}"

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def start(self):
        urls = f"ldap://127.0.0.1:{self.port} ldaps://127.0.0.1:{self.tls_port}"
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [PROGRAM, "-d", "0", "-f", self.directory / "slapd.conf", "-h", urls], stdout=log, stderr=log
            )
        end = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.tls_port), 1):
                return
            assert self.process.poll() is None and time.monotonic() < end, (self.directory / "log").read_text()
            time.sleep(0.02)

    def stop(self):
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.terminate()
            process.wait(30)

    @contextlib.contextmanager
    def down(self):
        self.stop()
        try:
            yield
        finally:
            self.start()

    def silent(self):
        """Connections are accepted, by the kernel, and nothing is answered."""
        assert self.process is not None
        return stopped(self.process.pid)

    def change(self, text):
        """Change entries, as text in LDIF."""
        self.entries("ldapmodify", text)

    def entries(self, program, text):
        if program == "slapadd":
            command, environment = ["/usr/sbin/slapadd", "-f", self.directory / "slapd.conf"], {}
        else:
            command = [program, "-x", "-D", ADMIN, "-w", ADMIN_PASSWORD, "-H", self.tls_url]
            environment = {"LDAPTLS_CACERT": str(self.authority.path)}
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, check=False, env={**os.environ, **environment}
        )
        assert done.returncode == 0, done.stderr.decode()


def dn(name):
    return f"uid={name},{PEOPLE_BASE}"


def person(name, password):
    return (
        f"dn: {dn(name)}\nobjectClass: inetOrgPerson\nuid: {name}\nsn: {name}\ncn: {name}\n"
        f"mail: {name.encode('ascii', 'ignore').decode()}@example.org\nuserPassword: {password}\n"
    )


def group(name, *members, groups=()):
    lines = [
        *(f"member: {dn(member)}" for member in members),
        *(f"member: cn={each},{GROUP_BASE}" for each in groups),
    ]
    return "\n".join([f"dn: cn={name},{GROUP_BASE}", "objectClass: groupOfNames", f"cn: {name}", *lines, ""])

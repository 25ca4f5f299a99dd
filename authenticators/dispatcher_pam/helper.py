"""One question to PAM, in a process that ends with it.  `authenticator.py` runs this file as a program.

Modules of PAM run in the process that uses it: they may block, crash, leak, change the locale or signal handlers,
and print.  So this process is made for one question and is killed at the deadline.  It imports nothing beyond the
standard library.

The question is a JSON object on standard input: a password is in no argument and no variable.  The answer is one
on standard output: {"user", "uid", "groups"}, {"refused": WHY}, or {"fault": WHAT, "why", "fix"}.

libpam is called through ctypes.  Of the libraries, python-pam (2.1) answers the first hidden prompt of each call
with the password, second factors included, takes a stack that asks for no password for a success, and needs Python
3.11; pamela (1.2) answers every hidden prompt.  Neither passes PAM_SILENT and PAM_DISALLOW_NULL_AUTHTOK.
"""

from __future__ import annotations

import ctypes
import errno
import grp
import json
import os
import pwd
import re
import signal
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_long, c_size_t, c_uint, c_ulong, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from typing_extensions import Self

#: Where libpam looks for the file of a service, the first one found counts.
PLACES = ("/etc/pam.d", "/usr/etc/pam.d", "/usr/lib/pam.d")
NOT_FOUND = {0, errno.ENOENT, errno.ESRCH, errno.EBADF, errno.EPERM}  # getpwnam(3)
MAX_GROUPS = 1000  # names in an answer
MAX_LINES = 1000  # of files that include each other
NOBODY = "dispatcher-doctor"  # an account that does not exist

# security/_pam_types.h
SUCCESS, PERM_DENIED, AUTH_ERR, USER_UNKNOWN, MAXTRIES = 0, 6, 7, 10, 11
NEW_AUTHTOK_REQD, ACCT_EXPIRED, CONV_ERR, AUTHTOK_EXPIRED = 12, 13, 19, 27
PROMPT_ECHO_OFF, ERROR_MSG, TEXT_INFO = 1, 3, 4
PAM_USER, PAM_TTY, PAM_FAIL_DELAY = 2, 3, 10
FLAGS = 0x8000 | 0x1  # PAM_SILENT, PAM_DISALLOW_NULL_AUTHTOK
#: What PAM says of a user or a password; every other code is a fault.
REFUSED = {
    AUTH_ERR: "wrong password",
    USER_UNKNOWN: "unknown name",
    PERM_DENIED: "PAM does not permit it",
    MAXTRIES: "too many attempts",
    ACCT_EXPIRED: "the account has expired",
    NEW_AUTHTOK_REQD: "the password has expired and must be changed first",
    AUTHTOK_EXPIRED: "the password has expired",
}
#: Modules that verify no password of others than this process's own user, if it is not root.
OWN_ALONE = {
    f"pam_{name}.so"
    for name in ("unix", "deny", "permit", "cap", "env", "faildelay", "faillock", "nologin", "group", "localuser")
}
_LINE = re.compile(r"(?P<quiet>-?)(?P<kind>\w+)\s+(?P<control>\[[^\]]*\]|\S+)\s+(?P<module>\S+)")
_LIBPAM = "libpam.so.0"
CAP_AUDIT_WRITE, AF_NETLINK, NETLINK_AUDIT = 29, 16, 9


class Message(ctypes.Structure):
    """A prompt or a text of a module."""

    _fields_ = (("style", c_int), ("text", c_char_p))


class Response(ctypes.Structure):
    """The answer to it; libpam frees the text."""

    _fields_ = (("text", c_void_p), ("code", c_int))


CONVERSE = CFUNCTYPE(c_int, c_int, POINTER(POINTER(Message)), POINTER(c_void_p), c_void_p)
DELAY = CFUNCTYPE(None, c_int, c_uint, c_void_p)


class Conversation(ctypes.Structure):
    """`struct pam_conv`."""

    _fields_ = (("converse", CONVERSE), ("data", c_void_p))


class Refused(Exception):
    """The user may not sign in."""


class Fault(Exception):
    """Passwords cannot be checked."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.answer = {"fault": what, "why": why, "fix": fix}


class Pam:
    """One transaction for one user.

    :param password: None: none is verified.
    """

    def __init__(self, service: str, name: str, password: str | None) -> None:
        self._password = password
        self._service = service
        self.asked = False  # for the password
        self._question = ""  # for something else
        self._code = SUCCESS  # of the last step
        self._libc = ctypes.CDLL(None)
        self._libc.calloc.restype = self._libc.strdup.restype = c_void_p
        self._libc.calloc.argtypes = [c_size_t, c_size_t]
        self._libc.free.argtypes = [c_void_p]
        self._pam = load()
        self._pam.pam_strerror.restype = c_char_p
        self._handle = c_void_p()
        # Kept as long as the handle: libpam calls them.
        self._conversation = Conversation(CONVERSE(self._converse), None)
        self._delay = DELAY(lambda *_: None)
        code = self._pam.pam_start(
            service.encode(), name.encode(), ctypes.byref(self._conversation), ctypes.byref(self._handle)
        )
        if code != SUCCESS:
            raise stack_fault(service, list(stack_faults(service)) or [self._words(code)])
        # Some modules fail without a terminal.  Delays after a refusal are the caller's: the same for all.
        for item, value in ((PAM_TTY, c_char_p(b"dispatcher")), (PAM_FAIL_DELAY, self._delay)):
            self._pam.pam_set_item(self._handle, item, value)

    def authenticate(self) -> None:
        """Verify the password.

        :raises Refused: it is wrong; :raises Fault: it cannot be said.
        """
        self._check(self._pam.pam_authenticate(self._handle, FLAGS), REFUSED)
        if not self.asked:
            raise Fault(
                f"The PAM service {self._service} accepts users without a password",
                "a module, such as pam_rootok, pam_permit or pam_succeed_if, was sufficient",
                f"remove the module from {PLACES[0]}/{self._service}, or correct auth.pam.service",
            )

    def check_account(self, *, known: bool = False) -> None:
        """Verify that the account may be used now.

        :param known: no password was verified: one that has expired is no reason to refuse, and AUTH_ERR, by which
            the stack of Debian replaces most codes, is no answer.
        """
        code = self._pam.pam_acct_mgmt(self._handle, FLAGS)
        if not known:
            self._check(code, REFUSED | {AUTH_ERR: "PAM refuses the account, such as one that has expired"})
        elif code == PERM_DENIED and any(
            os.path.basename(each) == "pam_time.so" for *_, each in stack(self._service)
        ):
            self._code = code  # who may not sign in at this time has not left
        elif code not in {NEW_AUTHTOK_REQD, AUTHTOK_EXPIRED}:
            self._check(code, {key: why for key, why in REFUSED.items() if key != AUTH_ERR})

    @property
    def user(self) -> str:
        """The name of the account, which a module may have changed."""
        found = c_char_p()
        self._pam.pam_get_item(self._handle, PAM_USER, ctypes.byref(found))
        return (found.value or b"").decode("utf-8", "surrogateescape")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let the modules remove what they keep for the transaction."""
        self._pam.pam_end(self._handle, self._code)

    def _check(self, code: int, refused: Mapping[int, str]) -> None:
        self._code = code
        if self._question:
            raise Fault(
                f"The PAM service {self._service} asks for more than a password",
                f"its prompt was {self._question!r}",
                "use a service without a second factor: dispatcher asks users for a name and a password alone",
            )
        if code in refused:
            problems = list(stack_faults(self._service))
            if problems:  # libpam refuses everybody
                raise stack_fault(self._service, problems)
            raise Refused(refused[code])
        if code != SUCCESS:
            raise Fault(
                f"The PAM service {self._service} failed",
                f"{self._words(code)} (code {code})",
                "read what PAM logged: journalctl --facility=authpriv",
            )

    def _words(self, code: int) -> str:
        return str(self._pam.pam_strerror(self._handle, code).decode("utf-8", "replace"))

    def _converse(self, count: int, messages: Any, responses: Any, _data: Any) -> int:
        """Answer the first hidden prompt with the password, and refuse all others."""
        answers = self._libc.calloc(count, ctypes.sizeof(Response))
        found = ctypes.cast(answers, POINTER(Response))
        for at in range(count):
            message = messages[at].contents
            if message.style in {ERROR_MSG, TEXT_INFO}:
                continue
            if message.style != PROMPT_ECHO_OFF or self.asked or self._password is None:
                self._question = self._question or (message.text or b"").decode("utf-8", "replace")[:100] or "?"
                for each in range(at):
                    self._libc.free(found[each].text)
                self._libc.free(answers)
                return CONV_ERR
            self.asked = True
            found[at].text = self._libc.strdup(self._password.encode())
        responses[0] = answers
        return SUCCESS


def load() -> Any:
    """Return libpam."""
    try:
        return ctypes.CDLL(_LIBPAM)
    except OSError as error:
        raise Fault("PAM is not installed", str(error), "install it (Debian: libpam0g)") from error


# -- accounts ----------------------------------------------------------------------------------------------


class Shadow(ctypes.Structure):
    """`struct spwd`; days after 1970 and numbers of days, -1 for none."""

    _fields_ = (
        ("name", c_char_p),
        ("hash", c_char_p),
        *((each, c_long) for each in ("changed", "least", "most", "warn", "inactive", "expires")),
        ("flag", c_ulong),
    )


def account(name: str) -> pwd.struct_passwd | None:
    """Return the account of a name; of several with one user id, that which the system finds for the id.

    :raises Fault: a service of `nsswitch.conf` fails; Python's `pwd` does not tell.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.getpwnam.restype = c_void_p
    ctypes.set_errno(0)
    if not libc.getpwnam(name.encode()) and ctypes.get_errno() not in NOT_FOUND:
        why = os.strerror(ctypes.get_errno())
        raise Fault("Accounts of this host cannot be found", why, "check the services in /etc/nsswitch.conf")
    try:
        return pwd.getpwuid(pwd.getpwnam(name).pw_uid)
    except KeyError:
        return None


def answer(found: pwd.struct_passwd, question: dict[str, Any]) -> dict[str, Any]:
    """Return the identity of an account.

    :raises Refused: it is in none of the allowed groups.
    """
    groups = set()
    for gid in os.getgrouplist(found.pw_name, found.pw_gid):
        try:
            groups.add(grp.getgrgid(gid).gr_name)
        except KeyError:  # a group without a name
            continue
    allowed = question["allow_groups"]
    if allowed and not groups.intersection(allowed):
        raise Refused("the user is in none of auth.pam.allow_groups")
    return {"user": found.pw_name, "uid": found.pw_uid, "groups": sorted(groups)[:MAX_GROUPS]}


def eligible(found: pwd.struct_passwd, question: dict[str, Any]) -> None:
    """Refuse root and accounts of the system: nobody may try their passwords from the web."""
    if found.pw_uid < max(1, question["min_uid"]):
        raise Refused(f"the user id {found.pw_uid} is below auth.pam.min_uid")


def shadow(name: str) -> Shadow | None:
    """Return the entry of an account in /etc/shadow, None if there is none, or this process may not read it."""
    getspnam = ctypes.CDLL(None).getspnam
    getspnam.restype = POINTER(Shadow)
    found = getspnam(name.encode())
    return found.contents if found else None


def locked(entry: Shadow) -> bool:
    """Whether `usermod --lock` or `passwd --lock` locked the password; PAM says so only to who knows it."""
    text = entry.hash or b""
    return text.startswith(b"!") and bool(text.strip(b"!*"))


def expired(entry: Shadow) -> bool:
    """Whether the account has expired, as pam_unix judges it."""
    today = int(time.time() / 86400)
    ends = [entry.expires] if entry.expires >= 0 else []
    if min(entry.changed, entry.most, entry.inactive) >= 0 and entry.changed:
        ends.append(entry.changed + entry.most + entry.inactive)
    return today >= min(ends, default=today + 1)


# -- questions ---------------------------------------------------------------------------------------------


def authenticate(question: dict[str, Any]) -> dict[str, Any]:
    """Verify a name and a password."""
    found = account(question["name"])
    if found is not None:
        eligible(found, question)
    # For an unknown name, too: modules log it, and take their time.
    with Pam(question["service"], question["name"], question["password"]) as pam:
        pam.authenticate()
        pam.check_account()
        changed = account(pam.user)
    if changed is None:
        raise Refused("the user has no account on this host")
    if found is None or changed.pw_uid != found.pw_uid:
        raise Fault(
            f"The PAM service {question['service']} changed the user",
            f"{question['name']!r} became {changed.pw_name!r}",
            "use a service whose modules keep the name",
        )
    return answer(found, question)


def lookup(question: dict[str, Any]) -> dict[str, Any]:
    """Return who an account is now, without a password.

    "Gone" has consequences, so it is no answer if the reason is not known.
    """
    found = account(question["name"])
    if found is None:
        raise Refused(REFUSED[USER_UNKNOWN])
    eligible(found, question)
    entry = shadow(question["name"])
    if entry and locked(entry):
        raise Refused("the account is locked")
    if entry and expired(entry):
        raise Refused(REFUSED[ACCT_EXPIRED])
    with Pam(question["service"], question["name"], None) as pam:
        pam.check_account(known=True)
    return answer(found, question)


def check(question: dict[str, Any]) -> dict[str, Any]:
    """Verify for `dispatcher doctor` that users can sign in."""
    service = question["service"]
    if problems := list(stack_faults(service)):
        raise stack_fault(service, problems)
    for name in question["allow_groups"]:
        try:
            grp.getgrnam(name)
        except KeyError:
            raise Fault(f"There is no group {name!r}", fix="create it, or correct auth.pam.allow_groups") from None
    modules = {os.path.basename(module) for kind, _, module in stack(service) if kind == "auth"}
    if os.geteuid():
        if "pam_unix.so" in modules and modules <= OWN_ALONE:
            own = pwd.getpwuid(os.geteuid()).pw_name
            raise Fault(
                f"Nobody but {own} can sign in",
                f"the manager runs as {own}, and pam_unix verifies passwords of others for root only",
                "run the manager as root, or use a service whose modules ask a daemon, such as pam_sss",
            )
    elif "pam_unix.so" in modules:
        try:
            Path("/etc/shadow").read_bytes()
        except OSError as error:
            raise Fault(
                "/etc/shadow cannot be read", error.strerror or "", "give the manager CAP_DAC_READ_SEARCH"
            ) from error
    with suppress(Refused), Pam(service, NOBODY, question["password"]) as pam:
        pam.authenticate()
        raise Fault(f"The PAM service {service} accepts any password", fix=f"correct {PLACES[0]}/{service}")
    return {}


# -- the stack of a service --------------------------------------------------------------------------------


def stack_fault(service: str, problems: list[str]) -> Fault:
    """Return what is wrong with a service."""
    return Fault(
        f"The PAM service {service} cannot be used",
        "; ".join(problems[:3]),
        "correct the file, or install the module",
    )


def stack_faults(service: str) -> Iterator[str]:
    """Yield why libpam would refuse everybody: a module that is missing, a file, an invalid line."""
    directories = module_directories()
    for kind, quiet, module in stack(service):
        if not module:
            yield kind
        elif "$" in module or quiet:
            continue
        elif os.path.isabs(module):
            if not os.path.exists(module):
                yield f"there is no module {module}"
        elif directories and not any(os.path.exists(f"{each}/{module}") for each in directories):
            yield f"there is no module {module}"


def stack(service: str) -> Iterator[tuple[str, bool, str]]:
    """Yield type, whether it may be missing, and name of each module for passwords and accounts.

    What cannot be read is a module "" whose type is the reason.
    """
    waiting, lines = [(service, frozenset({"auth", "account"}))], 0
    while waiting and lines < MAX_LINES:
        file, kinds = waiting.pop()
        path = service_file(file)
        try:
            text = Path(path).read_text("utf-8", "replace") if path else ""
        except OSError as error:
            yield f"{path}: {error.strerror}", False, ""
            continue
        if not path:
            yield f"there is no file {PLACES[0]}/{file}", False, ""
        for raw in text.replace("\\\n", " ").splitlines():
            lines += 1
            line = raw.partition("#")[0].strip()
            if line.startswith("@include"):
                waiting.append((line.removeprefix("@include").strip(), kinds))
                continue
            match = _LINE.match(line)
            if line and match is None:
                yield f"{path} has an invalid line {line[:80]!r}", False, ""
            if match is None or match["kind"].lower() not in kinds:
                continue
            kind = match["kind"].lower()
            if match["control"] in {"include", "substack"}:
                waiting.append((match["module"], frozenset({kind})))
            else:
                yield kind, bool(match["quiet"]), match["module"]


def service_file(service: str) -> str:
    """Return the path of the file of a service, "" if there is none."""
    found = (os.path.join(place, service) for place in PLACES)
    return next(filter(os.path.exists, found), "")


def module_directories() -> list[str]:
    """Return where libpam looks for modules: beside itself."""
    load()
    libraries = {
        line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libpam.so" in line
    }
    found = [f"{os.path.dirname(path)}/security" for path in libraries]
    return [each for each in (*found, "/lib/security", "/lib64/security") if os.path.isdir(each)]


def hide_audit(libc: ctypes.CDLL) -> None:
    """Let modules find a kernel without audit if this process may not write to it.

    Otherwise libpam refuses root every sign-in, as it cannot report it (pam_get_authtok and others end with
    PAM_SYSTEM_ERR).  A filter of system calls (seccomp(2)) refuses sockets for audit (netlink(7)).
    """
    status = Path("/proc/self/status").read_text("ascii")
    allowed = int(status.partition("CapEff:")[2].split()[0], 16)
    machine = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}.get(os.uname().machine)
    if os.geteuid() != 0 or allowed & 1 << CAP_AUDIT_WRITE or machine is None:
        return
    arch, socket = machine
    load, equal, answer = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, 6, arch),
        (load, 0, 0, 0),  # .nr
        (equal, 0, 4, socket),
        (load, 0, 0, 32),  # .args[2]: the protocol
        (equal, 0, 2, NETLINK_AUDIT),
        (load, 0, 0, 16),  # .args[0]: the family
        (equal, 1, 0, AF_NETLINK),
        (answer, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
        (answer, 0, 0, 0x00050000 | errno.EPROTONOSUPPORT),  # SECCOMP_RET_ERRNO
    ]
    code = b"".join(struct.pack("=HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    libc.prctl(22, 2, ctypes.create_string_buffer(header, len(header)), 0, 0)  # PR_SET_SECCOMP, a filter


def main() -> NoReturn:
    """Answer the question on standard input."""
    libc = ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: no process is left when the manager ends
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE: no core dump, which would hold the password
    hide_audit(libc)
    question = json.load(sys.stdin.buffer)
    result = os.dup(1)  # not inherited by programs that modules run
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    try:
        if not service_file(question["service"]):
            file = f"{PLACES[0]}/{question['service']}"
            raise Fault(
                f"There is no PAM service {question['service']}",
                f"{file} is missing, and PAM would use the service `other`",
                f"write {file} (docs/howto/sign-in-with-pam.md), or correct auth.pam.service",
            )
        found = {"authenticate": authenticate, "lookup": lookup, "check": check}[question["action"]](question)
    except Refused as error:
        found = {"refused": str(error)}
    except Fault as error:
        found = error.answer
    except Exception as error:  # standard error is closed to modules, and so to this
        found = Fault("The helper for PAM failed", f"{type(error).__name__} {error}", "report this fault").answer
    os.write(result, json.dumps(found).encode())
    os._exit(0)  # without what modules registered for the end


if __name__ == "__main__":
    main()

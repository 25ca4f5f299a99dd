"""Authenticators with one fault each, and the one check of the contract that finds it.

`tests/kit/test_broken_authenticators.py` runs the whole contract on each.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
import socket
import threading
import time

from pydantic import BaseModel

from dispatcher.plugin import Authenticator, Deadline, Identity, NotFound, Unavailable
from tests.kit.authenticator_contract import FakeAuthenticatorContract
from tests.support.fake_authenticator import FakeAuthenticator

CASES: dict[str, tuple[str, str]] = {}


def case(check: str, advice: str):
    """Declare that one check, and no other, fails with these words."""

    def add(cls: type) -> type:
        name = f"Test{cls.__name__.replace('_', '')}"
        attributes = {"authenticator_class": cls, "__module__": __name__, "patience": 2.0}
        globals()[name] = type(name, (FakeAuthenticatorContract,), attributes)
        CASES[name] = (f"test_{check}", advice)
        return cls

    return add


# --- declaration


@case("class_is_accepted_by_the_loader", "written for version 7")
class Of_Another_Version(FakeAuthenticator):
    api_version = 7


@case("name_is_legal", "use 1 to 32")
class With_An_Odd_Name(FakeAuthenticator):
    name = "My Directory"


@case("signatures_are_the_contract", "keep the contract's names")
class With_Other_Arguments(FakeAuthenticator):
    def set_password(self, user, password, *, deadline):
        super().set_password(user, password, deadline=deadline)


class _Loose(BaseModel):
    directory: str = "default"


@case("unknown_option_is_refused_with_its_path", "was accepted")
class Takes_Any_Option(FakeAuthenticator):
    Options = _Loose


@case("instance_is_made_without_a_directory", "connect later")
class Connects_When_Made(FakeAuthenticator):
    def __init__(self, **named):
        super().__init__(**named)
        self.directory.search("alice", Deadline(1))


# --- answers


@case("right_password_is_an_identity", r"returned str: return Identity\(user=...\)")
class Returns_A_Text(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        found = super().authenticate(name, password, deadline=deadline)
        return found and found.user


@case("wrong_password_is_none", "returned False for a wrong password: return None")
class Returns_False(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        return super().authenticate(name, password, deadline=deadline) or False


@case("identity_is_a_legal_name", "the character ' ' is not allowed")
class Returns_A_Full_Name(FakeAuthenticator):
    lookup = Authenticator.lookup

    def authenticate(self, name, password, *, deadline):
        found = super().authenticate(name, password, deadline=deadline)
        return found and Identity(user=f"{name} of Example Ltd")


@case("unknown_name_is_none", "raised NotFound .* return None")
class Tells_Who_Is_Unknown(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        found = super().authenticate(name, password, deadline=deadline)
        if name.startswith("kit-nobody") and self.directory.state == "up":
            raise NotFound(f"There is no {name}", fix="ask somebody else")
        return found


@case("unknown_name_takes_as_long_as_a_wrong_password", "which tells who exists")
class Answers_Sooner_About_Nobody(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        if self.directory.search(name, deadline) is None:
            return None
        time.sleep(0.03)
        return super().authenticate(name, password, deadline=deadline)


@case("empty_password_is_refused", "accepted an empty password")
class Binds_Anonymously(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        if self.directory.search(name, deadline) and not password:
            return Identity(user=name)
        return super().authenticate(name, password, deadline=deadline)


@case("password_is_taken_as_it_is", "accepted a password with other blanks")
class Strips_Passwords(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        return super().authenticate(name, password.strip(" \t\r\n"), deadline=deadline)


@case("case_of_a_password_counts", "accepted the password in another case")
class Forgives_The_First_Letter(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        tried = (password, password.swapcase())
        found = [super(type(self), self).authenticate(name, each, deadline=deadline) for each in tried]
        return found[0] or found[1]


@case("password_counts_as_a_whole", "accepted a part of the password or more than it")
class Compares_Up_To_A_Nul(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        return super().authenticate(name, password.partition("\0")[0], deadline=deadline)


@case("huge_password_is_refused", "accepted a password of 10 kB")
class Cuts_Long_Passwords(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        cut = password[: len(self.people[name])] if len(password) > 1000 and name in self.people else password
        return super().authenticate(name, cut, deadline=deadline)

    people = FakeAuthenticatorContract.people


@case("unencodable_password_is_none", "raised UnicodeEncodeError")
class Encodes_Strictly(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        password.encode()
        return super().authenticate(name, password, deadline=deadline)


@case("outsider_is_refused", "who may not sign in")
class Lets_Everybody_In(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        locked, self.directory.locked = self.directory.locked, set()
        try:
            return super().authenticate(name, password, deadline=deadline)
        finally:
            self.directory.locked = locked


@case("names_are_data", "with the password of 'alice'")
class Takes_Names_For_Patterns(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        [*found] = fnmatch.filter(self.directory.hashes, name) if name.endswith("*") else [name]
        answers = [super(type(self), self).authenticate(each, password, deadline=deadline) for each in found]
        return next(filter(None, answers), None)


@case("many_at_once", "about somebody else|raised|None")
class Mixes_People_Up(FakeAuthenticator):
    lookup = Authenticator.lookup

    def authenticate(self, name, password, *, deadline):
        self.current = name
        found = super().authenticate(name, password, deadline=deadline)
        time.sleep(0.005)
        return found and Identity(user=self.current)


@case("set_password_works_or_is_unsupported", "raised NotImplementedError")
class Does_Not_Say_Where_Passwords_Are(FakeAuthenticator):
    def set_password(self, name, password, *, deadline):
        if name == "bob":
            raise NotImplementedError
        super().set_password(name, password, deadline=deadline)


# --- lookup


@case("groups_are_names", "make it a frozenset of texts")
class Lists_Groups(FakeAuthenticator):
    def identity(self, name):
        return dataclasses.replace(super().identity(name), groups=["people"])


@case("subject_identifies_the_account", "several people have one subject")
class Gives_Everybody_One_Id(FakeAuthenticator):
    def identity(self, name):
        return dataclasses.replace(super().identity(name), subject="user")


@case("lookup_agrees_with_the_sign_in", r"lookup\(\) returned .* and authenticate\(\) returned")
class Looks_Up_Without_Groups(FakeAuthenticator):
    def lookup(self, name, *, deadline):
        found = super().lookup(name, deadline=deadline)
        return found and dataclasses.replace(found, groups=frozenset())


@case("lookup_of_nobody_is_none", "who may not sign in: return None")
class Looks_Up_Who_Is_Locked(FakeAuthenticator):
    def lookup(self, name, *, deadline):
        self.directory.search(name, deadline)
        return self.identity(name) if name in self.directory.hashes else None


@case("lookup_without_a_directory_is_unavailable", "None would sign the user out")
class Takes_An_Outage_For_A_Departure(FakeAuthenticator):
    def lookup(self, name, *, deadline):
        try:
            return super().lookup(name, deadline=deadline)
        except Unavailable:
            return None


# --- secrecy


@case("password_is_not_written", "a password is written to the log")
class Logs_Passwords(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        logging.getLogger("fake").debug("bind as %s with %r", name, password)
        return super().authenticate(name, password, deadline=deadline)


@case("password_is_not_kept", "the instance still holds a password")
class Remembers_Passwords(FakeAuthenticator):
    def __init__(self, **named):
        super().__init__(**named)
        self.last: list[object] = []

    def authenticate(self, name, password, *, deadline):
        self.last = [{"name": name, "password": password.encode(errors="replace")}]
        return super().authenticate(name, password, deadline=deadline)


@case("instances_release_everything", "left 6 threads behind")
class Leaves_Threads(FakeAuthenticator):
    def __init__(self, **named):
        super().__init__(**named)
        threading.Thread(target=threading.Event().wait, args=(10,), daemon=True).start()


@case("calls_leave_nothing", "descriptors behind")
class Leaves_Connections(FakeAuthenticator):
    def __init__(self, **named):
        super().__init__(**named)
        self.open: list[socket.socket] = []

    def authenticate(self, name, password, *, deadline):
        self.open.append(socket.socket())
        return super().authenticate(name, password, deadline=deadline)

    def close(self):
        for each in self.open:
            each.close()


# --- fault


@case("directory_down_is_unavailable", "returned None with the directory down: raise Unavailable")
class Takes_An_Outage_For_A_Wrong_Password(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        return None if self.directory.state == "down" else super().authenticate(name, password, deadline=deadline)


@case("outage_is_the_same_for_all", "for an unknown one")
class Knows_Who_Is_Unknown(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        if name.startswith("kit-nobody") and self.directory.state == "down":
            return None
        return super().authenticate(name, password, deadline=deadline)


@case("outage_shows_no_password", "holds the password")
class Tells_The_Password_Of_An_Outage(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        try:
            return super().authenticate(name, password, deadline=deadline)
        except Unavailable as error:
            raise Unavailable("The directory is away", why=f"bind({name!r}, {password!r}) failed") from error


@case("silent_directory_meets_the_deadline", "has not returned 1 s after its deadline")
class Ignores_The_Deadline(FakeAuthenticator):
    def authenticate(self, name, password, *, deadline):
        with self.directory.changed:
            self.directory.changed.wait_for(lambda: self.directory.state != "silent", timeout=2)
        return super().authenticate(name, password, deadline=deadline)


@case("instance_works_again_after_an_outage", "the instance does not work: connect again")
class Keeps_A_Dead_Connection(FakeAuthenticator):
    dead = False

    def authenticate(self, name, password, *, deadline):
        try:
            if self.dead:
                raise Unavailable("The connection is closed", fix="restart the manager")
            return super().authenticate(name, password, deadline=deadline)
        except Unavailable:
            self.dead = self.dead or self.directory.state == "down"
            raise


class HangsWhenMade(FakeAuthenticator):
    def __init__(self, **_more):
        time.sleep(3600)


class TestHangsWhenMade(FakeAuthenticatorContract):
    """All checks fail, as none has an instance."""

    authenticator_class = HangsWhenMade
    patience, slack = 0.5, 0.2

"""The contract of authenticators with a site: a correct one passes; of each broken one exactly one check fails."""

from __future__ import annotations

import contextlib
import inspect
import json
import secrets
import time
from urllib.parse import parse_qsl, urlencode, urlsplit

import pytest

from dispatcher.plugin import (
    BadRequest,
    DeadlineExceeded,
    Forbidden,
    Redirect,
    Table,
    Unavailable,
    WebAuthenticator,
    WebIdentity,
)
from dispatcher.testing import WebAuthenticatorContract


class Good(WebAuthenticator):
    """With a site in memory, which gives out tickets for one callback and one secret of the sign-in."""

    name = "site"
    api_version = 1
    Options = Table
    title = "Site"
    broken = ""

    def __init__(self, *, options):
        super().__init__(options=options)
        self.tickets = {}

    def begin(self, *, state, callback, deadline):
        secret = secrets.token_hex(8)
        query = urlencode({"state": state, "callback": callback, "for": secret})
        return Redirect(url=f"https://site.example.org/?{query}", kept=secret)

    def give(self, url, user):
        query = dict(parse_qsl(urlsplit(url).query))
        ticket = secrets.token_hex(8)
        self.tickets[ticket] = (query["for"], user)
        return {"state": query["state"], "ticket": ticket}

    def known(self, ticket):
        return self.tickets.pop(ticket, None)

    def reach(self, deadline):
        if self.broken == "silent":
            time.sleep(deadline.remaining())
            raise DeadlineExceeded("The site does not answer in time", fix="look at it")
        if self.broken:
            raise Unavailable("The site does not answer", fix="look at it")

    def finish(self, parameters, *, kept, callback, deadline):
        self.reach(deadline)
        secret, user = self.known(parameters.get("ticket", "")) or ("", "")
        if not user or not self.same(secret, kept):
            raise BadRequest("The site does not know the ticket", fix="start again")
        return self.identity(user)

    def same(self, secret, kept):
        return secret == kept

    def identity(self, user):
        return None if user == "mallory" else WebIdentity(user=user, subject=f"id of {user}", session="s")


CASES: dict[type, tuple[str, str]] = {}


def case(check, advice):
    def add(cls):
        CASES[cls] = (check, advice)
        return cls

    return add


@case("class_is_accepted_by_the_loader", "version 7")
class Of_Another_Version(Good):
    api_version = 7


@case("signatures_are_the_contract", "keep the contract's names")
class With_Other_Arguments(Good):
    def ended(self, message, *, deadline):
        return None


@case("title_can_be_shown", "Sign in with TITLE")
class Without_A_Title(Good):
    title = ""


@case("begin_leads_to_the_site_with_state_and_callback", "without the state")
class Forgets_The_State(Good):
    def begin(self, *, state, callback, deadline):
        found = super().begin(state="x", callback=callback, deadline=deadline)
        return found


@case("people_sign_in_each_with_a_subject_of_their_own", "two people get one subject")
class One_Subject_For_All(Good):
    def identity(self, user):
        return None if user == "mallory" else WebIdentity(user=user, subject="the company")


@case("outsider_is_refused", "return None, or raise Forbidden")
class Lets_Everybody_In(Good):
    def identity(self, user):
        return WebIdentity(user=user, subject=user)


@case("an_answer_is_used_once", "for the second time")
class Takes_Tickets_Again(Good):
    def known(self, ticket):
        return self.tickets.get(ticket)


@case("the_answer_to_another_sign_in_is_refused", "to another sign-in")
class Takes_Stolen_Tickets(Good):
    def same(self, secret, kept):
        return True


@case("changed_parameters_sign_in_nobody_else", "no outage")
class Fails_Without_A_Ticket(Good):
    def finish(self, parameters, **more):
        if "ticket" not in parameters:
            raise KeyError("ticket")
        return super().finish(parameters, **more)


@case("a_message_of_a_stranger_ends_nothing", "return None")
class Fails_On_Odd_Messages(Good):
    def ended(self, token, *, deadline):
        return json.loads(token)


@case("sign_out_leads_to_a_web_address", "return a web address")
class Signs_Out_Nowhere(Good):
    def sign_out_url(self, *, kept, callback, deadline):
        return "/signed-out"


@case("site_down_is_unavailable", "raise Unavailable")
class Blames_The_User(Good):
    def finish(self, parameters, **more):
        if self.broken == "down":
            raise Forbidden("No")
        return super().finish(parameters, **more)


@case("silent_site_meets_the_deadline", "bound every wait")
class Waits_Without_End(Good):
    def reach(self, deadline):
        if self.broken == "silent":
            time.sleep(3)
        super().reach(deadline)


class Contract(WebAuthenticatorContract):
    people = ("alice", "bob")
    outsider = "mallory"
    silent_seconds, slack = 0.1, 0.5

    def sign_in(self, url, name):
        return self.under_test.give(url, name)

    @contextlib.contextmanager
    def broken_site(self, how):
        self.under_test.broken = how
        yield
        self.under_test.broken = ""


CHECKS = [name for name in vars(WebAuthenticatorContract) if name.startswith("test_")]


def verdicts(cls):
    found = {}
    for name in CHECKS:
        contract = Contract()
        contract.under_test = cls(options=Table())
        try:
            getattr(contract, name)(contract.under_test)
        except pytest.fail.Exception as verdict:
            found[name.removeprefix("test_")] = str(verdict)
    return found


def test_a_correct_one_passes():
    assert verdicts(Good) == {}


@pytest.mark.parametrize("cls", CASES, ids=lambda cls: cls.__name__)
def test_caught_by_the_check_meant_for_it_alone(cls):
    check, advice = CASES[cls]
    found = verdicts(cls)
    assert list(found) == [check], found
    assert advice in found[check]


def test_each_check_finds_something():
    assert {check for check, _ in CASES.values()} == {name.removeprefix("test_") for name in CHECKS}


def test_what_the_author_must_fill_in_is_said():
    contract = WebAuthenticatorContract()
    for call in (lambda: contract.sign_in("u", "alice"), lambda: contract.broken_site("down")):
        with pytest.raises(pytest.fail.Exception, match="must override"):
            call()
    left_out = type("LeftOut", (WebAuthenticatorContract,), {"no_outsider": "all may", "no_site": "a file"})
    assert left_out.test_outsider_is_refused is left_out.test_site_down_is_unavailable is None
    assert inspect.isfunction(left_out.test_an_answer_is_used_once)

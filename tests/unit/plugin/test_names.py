"""Names: what is legal, what is one and the same, and forms for backends that never collide."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatcher.plugin import names
from dispatcher.plugin.errors import BadRequest


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("alice", "alice"),
        ("Alice", "alice"),
        ("ALICE@Example.ORG", "alice@example.org"),
        ("o_neil-2.b+tag", "o_neil-2.b+tag"),
        ("7of9", "7of9"),
        ("O'Brien@uni.example", "o'brien@uni.example"),
        ("Ünal", "ünal"),
        ("U\u0308nal", "ünal"),  # composed and decomposed are one
        ("ﬁn", "fin"),  # compatibility forms are one
        ("Straße", "strasse"),
        ("İstanbul", "i̇stanbul"),
        ("李雷", "李雷"),
        ("a", "a"),
        ("a" * 255, "a" * 255),
    ],
)
def test_legal_names_have_one_form(raw, canonical):
    assert names.user_name(raw) == canonical
    assert names.user_name(canonical) == canonical


@pytest.mark.parametrize(
    "raw",
    [
        "", ".", "..", "...", "-rf", "--privileged", "-", "_x", "@x", "+x", "a/b", "a\\b", "a b", "a\nb", "a\0b", "a\tb",
        "a..b", "../x", "a:b", "a;b", "'a", 'a"b', "a<b", "a&b", "a$b", "a`b", "a%2fb", "a#b", "a?b", "a=b", "a,b",
        "a\u202eb", "a\u200bb", "\u0301a", "a" * 256, "😀", "a\x1b[31m", "a\ud800", None, 7, b"alice", ["a"],
    ],
)  # fmt: skip
def test_illegal_names_are_refused_with_a_reason_and_what_to_do(raw):
    with pytest.raises(BadRequest) as caught:
        names.user_name(raw)
    assert caught.value.why
    assert caught.value.fix
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


@given(st.text(max_size=300))
def test_dangerous_names_are_refused_or_encoded(raw):
    try:
        name = names.user_name(raw)
    except BadRequest as error:
        assert str(error).isprintable()
        return
    assert names.user_name(name) == name
    assert not set(name) & set("/\\\0\n\r\t '\"<>&;:`$|*?[]{}()!#%^~,=")
    assert ".." not in name
    assert name[0] not in "-._@+"
    assert 1 <= len(name) <= 255


@pytest.mark.parametrize(
    ("raw", "canonical"), [("Alice:notebook", "alice:notebook"), ("a@b.c:x_1-y", "a@b.c:x_1-y"), ("bob", "bob")]
)
def test_agents_are_a_user_and_an_app(raw, canonical):
    assert names.agent_name(raw) == canonical


@pytest.mark.parametrize(
    "raw", ["alice:", ":x", "a:b:c", "alice:X", "alice:-x", "alice:x-", "alice:../x", "alice:" + "x" * 33, 7, None]
)
def test_illegal_agents(raw):
    with pytest.raises(BadRequest):
        names.agent_name(raw)


@pytest.mark.parametrize("raw", ["a", "notebook", "a-b_c", "x" * 32, "0"])
def test_legal_apps(raw):
    assert names.app_name(raw) == raw


@pytest.mark.parametrize("raw", ["", "A", "-a", "a-", "_a", "a_", "a b", "a.b", "x" * 33, "ä", "a\n", None])
def test_illegal_apps(raw):
    with pytest.raises(BadRequest):
        names.app_name(raw)


CLASHES = [
    "a-b:c", "a:b-c", "a-b", "a_b", "a.b", "a+b", "a@b", "user-x", "user_2dx", "abc@def.com", "abc-def.com", "abc-def-com",
    "ünal", "unal", "李雷", "李四", "x" * 254, "x" * 255, "x" * 20, "x" * 21, "x", "alice", "alice:demo",
]  # fmt: skip


def test_backend_names_never_collide():
    assert len({names.backend_name("0a1b2c3d", name) for name in CLASHES}) == len(CLASHES)


@pytest.mark.parametrize("name", CLASHES)
def test_backend_names_are_legal_everywhere(name):
    made = names.backend_name("0a1b2c3d", name)
    assert re.fullmatch(r"dispatcher-0a1b2c3d-[a-z0-9]([a-z0-9-]*[a-z0-9])?-[0-9a-f]{12}", made)
    assert len(made) <= 63  # a DNS label
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", names.key(name))


def test_two_installations_never_share_a_backend_name():
    assert names.backend_name("0a1b2c3d", "a") != names.backend_name("0a1b2c3e", "a")


@given(st.text(min_size=1, max_size=60))
def test_slugs_are_never_empty_and_always_legal(text):
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", names.slug(text))


@given(st.text(max_size=400))
def test_printable_is_one_bounded_line(text):
    shown = names.printable(text)
    assert shown.isprintable()
    assert len(shown) <= 80


def test_printable_shows_what_it_can():
    assert names.printable("a\nb") == r"'a\nb'"
    assert names.printable(7) == "'7'"
    assert names.printable("x" * 500).endswith("…'")

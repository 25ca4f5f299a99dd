"""libvirt: reading hostile ext4 images."""

import os
import random
import shutil
import stat
import struct
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("libvirt")

from dispatcher_libvirt.disks import ext4
from dispatcher_libvirt.disks.ext4 import Ext4Error, Image

MKE2FS = shutil.which("mke2fs", path="/usr/sbin:/sbin:/usr/bin:/bin")
DEBUGFS = shutil.which("debugfs", path="/usr/sbin:/sbin:/usr/bin:/bin")


def make_image(path, source, *options, size="16M"):
    subprocess.run([MKE2FS, "-q", "-F", "-t", "ext4", *options, "-d", source, path, size], check=True)
    return path


def opened(path):
    data = path.read_bytes()
    return Image(lambda offset, length: data[offset : offset + length], len(data))


def unpacked(image, target, owner=None):
    """Unpack as the sandbox does, in a process of its own; return exit code and output."""
    target.mkdir()
    uid, gid = owner or (os.getuid(), os.getgid())
    done = subprocess.run(
        [os.sys.executable, "-I", "-S", ext4.__file__, "unpack", image, target, str(uid), str(gid)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A directory with every kind of file."""
    top = tmp_path_factory.mktemp("tree")
    (top / "deep").mkdir()
    folder = top
    for number in range(60):
        folder = folder / f"d{number}"
        folder.mkdir()
    (folder / "bottom").write_bytes(b"bottom\n")
    (top / "empty").write_bytes(b"")
    (top / "small").write_bytes(b"small\n")
    (top / "large").write_bytes(bytes(range(256)) * 8192)
    with (top / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"end")
    (top / "link").symlink_to("deep/../small")
    (top / "dangling").symlink_to("/nowhere/" + "x" * 200)
    (top / "long-link").symlink_to("y" * 2000)
    os.link(top / "small", top / "deep" / "same")
    os.mkfifo(top / "fifo")
    (top / "odd\n name é漢 '\"").write_bytes(b"odd\n")
    (top / ("n" * 255)).write_bytes(b"long\n")
    (top / "setuid").write_bytes(b"x")
    (top / "setuid").chmod(0o4755)
    for number in range(700):
        (top / "deep" / f"file-{number:04d}").write_bytes(b"%d\n" % number)
    (top / "private").mkdir()
    (top / "private").chmod(0o2750)
    os.utime(top / "large", ns=(1_000_000_000_111_222_333, 1_000_000_001_444_555_666))
    os.utime(top / "deep", (1_234_567_890, 1_234_567_890))
    return top


def manifest(top):
    found, inodes = {}, {}
    for directory, folders, files in os.walk(top):
        for name in folders + files:
            path = Path(directory, name)
            status = path.lstat()
            kind = stat.S_IFMT(status.st_mode)
            content = (
                path.read_bytes() if kind == stat.S_IFREG else os.readlink(path) if kind == stat.S_IFLNK else b""
            )
            time = 0 if kind == stat.S_IFLNK else int(status.st_mtime)
            key = str(path.relative_to(top))
            first = inodes.setdefault(status.st_ino, key) if kind == stat.S_IFREG else ""
            found[key] = (kind, stat.S_IMODE(status.st_mode), content, time, first)
    return found


def same(one, two):
    """Whether two manifests are equal, hard links by their groups."""

    def groups(items):
        names = {}
        for key, item in items.items():
            names.setdefault(item[4], set()).add(key)
        return {frozenset(keys) for first, keys in names.items() if first and len(keys) > 1}

    return {key: item[:4] for key, item in one.items()} == {key: item[:4] for key, item in two.items()} and groups(
        one
    ) == groups(two)


@pytest.mark.parametrize(
    "options",
    [
        ("-b", "4096"),
        ("-b", "4096", "-O", "^64bit,^flex_bg"),
        ("-b", "4096", "-O", "^has_journal,^metadata_csum"),
        ("-b", "4096", "-I", "128"),
        ("-b", "2048", "-O", "^64bit,^huge_file"),
    ],
    ids=lambda options: " ".join(options) or "usual",
)
def test_everything_comes_out_as_it_went_in(tmp_path, tree, options):
    image = make_image(tmp_path / "image", tree, *options)
    code, said = unpacked(image, tmp_path / "out")
    assert (code, said.split()[0]) == (0, "done"), said
    before, after = manifest(tree), manifest(tmp_path / "out")
    assert same(before, after)
    assert (tmp_path / "out" / "sparse").stat().st_blocks < 100, "holes stay holes"
    assert int(said.split()[1]) == len(before)


def test_a_file_with_two_names_at_the_bottom_of_a_deep_tree_comes_out(tmp_path):
    """The path of the first is longer than the system takes."""
    top = tmp_path / "tree"
    top.mkdir()
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(top)
        for _ in range(30):
            os.mkdir("n" * 200)
            os.chdir("n" * 200)
        Path("first").write_bytes(b"same\n")
        os.link("first", "second")
    finally:
        os.fchdir(here)
        os.close(here)
    image = make_image(tmp_path / "image", top, "-b", "4096")
    assert unpacked(image, tmp_path / "out")[0] == 0
    found = subprocess.run(
        ["find", "out", "-type", "f", "-links", "2"], cwd=tmp_path, capture_output=True, text=True
    )
    assert len(found.stdout.split()) == 2
    assert len(os.listdir(tmp_path / "out")) == 1
    subprocess.run(["rm", "-rf", "tree", "out"], cwd=tmp_path, check=True)


def test_files_of_other_users_lose_the_setuid_bit(tmp_path, tree):
    image = make_image(tmp_path / "image", tree, "-b", "4096")
    assert unpacked(image, tmp_path / "out", owner=(54_321, 54_321))[0] == 0
    assert stat.S_IMODE((tmp_path / "out" / "setuid").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "private").stat().st_mode) == 0o750


def test_devices_and_sockets_stay_inside(tmp_path):
    (tmp_path / "tree").mkdir()
    image = make_image(tmp_path / "image", tmp_path / "tree")
    script = tmp_path / "script"
    script.write_text("mknod disk b 8 0\nmknod zero c 1 5\nmknod pipe p\n")
    subprocess.run([DEBUGFS, "-w", "-f", script, image], check=True, capture_output=True)
    assert unpacked(image, tmp_path / "out")[0] == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["pipe"]


def poke(image, *commands):
    script = image.with_suffix(".script")
    script.write_text("\n".join(commands) + "\n")
    subprocess.run([DEBUGFS, "-w", "-f", script, image], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("commands", "why"),
    [
        (["link a/x b/loop", "set_inode_field a/x links_count 2", "ln <2> a/root"], ""),
        (["ln a a/again"], "appears twice"),
        (["set_inode_field file size 99999999999999"], "bytes"),
        (["set_inode_field file links_count 0"], "not in use"),
        (["set_inode_field lnk size 70000"], "bytes"),
        (["set_inode_field a size 99999999999"], "too large"),
        (["set_inode_field file flags 0x10080000"], "inline"),
        (["set_super_value feature_incompat 0x10242"], "encryption"),
        (["set_super_value feature_incompat 0x2c6"], "journal"),
        (["set_super_value inodes_per_group 0"], "superblock"),
        (["set_super_value blocks_count 99999999"], "superblock"),
    ],
)
def test_inconsistent_images_are_errors(tmp_path, commands, why):
    top = tmp_path / "tree"
    (top / "a").mkdir(parents=True)
    (top / "b").mkdir()
    (top / "a" / "x").write_bytes(b"x" * 5000)
    (top / "file").write_bytes(b"y" * 5000)
    (top / "lnk").symlink_to("z" * 100)
    image = make_image(tmp_path / "image", top, "-O", "^metadata_csum")
    poke(image, *commands)
    code, said = unpacked(image, tmp_path / "out")
    if why:
        assert (code, said.split()[0]) == (1, "error"), said
        assert why in said
    else:
        assert code == 1


def test_names_never_leave_the_directory(tmp_path):
    top = tmp_path / "tree"
    (top / "d").mkdir(parents=True)
    (top / "d" / "NAME_TO_CHANGE").write_bytes(b"x")
    image = make_image(tmp_path / "image", top, "-O", "^metadata_csum,^dir_index")
    data = image.read_bytes()
    assert data.count(b"NAME_TO_CHANGE") == 1
    for bad in (b"../../TO_CHANG", b"/etc/passwd/xx", b"NUL\0TO_CHANGEx"):
        image.write_bytes(data.replace(b"NAME_TO_CHANGE", bad[:14]))
        out = tmp_path / f"out{bad[:3].hex()}"
        code, said = unpacked(image, out)
        assert (code, "invalid name" in said) == (1, True), said
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("out")) == ["image", "tree"]


def test_shared_blocks_cannot_fill_the_disk(tmp_path):
    top = tmp_path / "tree"
    top.mkdir()
    for number in range(40):
        (top / f"f{number}").write_bytes(os.urandom(200_000))
    image = make_image(tmp_path / "image", top, "-O", "^metadata_csum", size="10M")
    found = opened(image)
    first = found.inode(dict(found.entries(found.root()))[b"f0"])
    words = struct.unpack("<12I", first.block[:48])
    poke(image, *(f"set_inode_field f{n} block[{at}] {word}" for n in range(40) for at, word in enumerate(words)))
    assert unpacked(image, tmp_path / "out")[0] == 0, "forty times 200 kB still fit"
    words = (*words[:4], words[4] & 0xFFFF0000 | 1000, *words[5:])  # one extent of 1,000 KiB
    poke(image, *(f"set_inode_field f{n} block[{at}] {word}" for n in range(40) for at, word in enumerate(words)))
    poke(image, *(f"set_inode_field f{n} size {1000 << 10}" for n in range(40)))
    code, said = unpacked(image, tmp_path / "out2")
    assert (code, "share blocks" in said) == (1, True), said
    assert sum(path.lstat().st_blocks * 512 for path in (tmp_path / "out2").iterdir()) <= 11 << 20


def test_a_file_with_a_block_map_is_an_error(tmp_path):
    top = tmp_path / "tree"
    top.mkdir()
    (top / "file").write_bytes(b"x" * 5000)
    image = make_image(tmp_path / "image", top, "-O", "^extents,^64bit")
    code, said = unpacked(image, tmp_path / "out")
    assert (code, "block map" in said) == (1, True), said


def test_random_damage_never_hangs_or_crashes(tmp_path, tree):
    """Mutated images end as an Ext4Error or as files, within bounded work; no other exception comes out."""
    source = tmp_path / "few"
    source.mkdir()
    for name in ("small", "large", "sparse"):
        shutil.copy(tree / name, source)
    (source / "sub").mkdir()
    (source / "sub" / "link").symlink_to("../small")
    original = make_image(tmp_path / "image", source, "-b", "1024", "-O", "^has_journal", size="4M").read_bytes()
    rng = random.Random(20_261_125)
    interesting = [1024 + n for n in range(256)] + [2048 + n for n in range(64)]
    used = [n for n in range(0, len(original), 1024) if original[n : n + 1024].strip(b"\0")][:40]
    outcomes = set()
    for _ in range(250):
        data = bytearray(original)
        for _ in range(rng.choice([1, 2, 8, 64])):
            at = rng.choice(interesting) if rng.random() < 0.4 else rng.choice(used) + rng.randrange(1024)
            data[at] = rng.randrange(256)
        frozen, budget = bytes(data), [30_000]

        def read(offset, length, frozen=frozen, budget=budget):
            budget[0] -= 1
            if budget[0] < 0:
                raise Ext4Error("enough")
            return frozen[offset : offset + length]

        try:
            image = Image(read, len(frozen))
            todo, seen = [image.root()], set()
            while todo:
                for _, number in image.entries(todo.pop()):
                    inode = image.inode(number)
                    if stat.S_ISDIR(inode.mode) and number not in seen:
                        seen.add(number)
                        todo.append(inode)
                    elif stat.S_ISREG(inode.mode):
                        sum(len(part) for _, part in image.content(inode))
                    elif stat.S_ISLNK(inode.mode):
                        image.link(inode)
            outcomes.add("read")
        except Ext4Error:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("data", [b"", b"x" * 4096, bytes(1 << 20)])
def test_other_data_is_not_a_file_system(data):
    with pytest.raises(Ext4Error, match="no ext4 file system"):
        Image(lambda offset, length: data[offset : offset + length], len(data))

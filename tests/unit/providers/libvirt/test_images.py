"""libvirt: checks of the files that machines boot from."""

import gzip
import os
import shutil
import subprocess

import pytest

pytest.importorskip("libvirt")

from dispatcher.plugin.deadline import Deadline
from dispatcher.plugin.errors import ProviderError
from dispatcher_libvirt.disks import images
from dispatcher_libvirt.disks.images import Images, Reader
from dispatcher_libvirt.options import AppOptions

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")


def check(options, reader=None, known=None):
    options = AppOptions.model_validate(options)
    return (known or Images()).check(options, reader, Deadline(20), lambda: None)


@pytest.fixture
def boots(tmp_path):
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    kernel.write_bytes(bytes(0x202) + b"HdrS" + bytes(4096))
    initrd.write_bytes(gzip.compress(b"x"))
    return {"kernel": str(kernel), "initrd": str(initrd)}


def test_boot_files_have_a_fingerprint(boots, tmp_path):
    base, whole = check(boots)
    assert base == ""
    assert len(whole) == 12
    (tmp_path / "initrd").write_bytes(gzip.compress(b"y"))
    assert check(boots)[1] != whole, "another initrd is another image"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"kernel": "/nonexistent"}, "cannot be used: No such file"),
        ({"kernel": "/dev/null"}, "is not a regular file"),
        ({"kernel": "{initrd}"}, "is not a Linux kernel"),
        ({"initrd": "{kernel}"}, "is not an initial RAM disk"),
        ({"image": "/nonexistent.qcow2"}, "image /nonexistent.qcow2 cannot be used"),
        ({"image": "{kernel}"}, "is not a qcow2 image"),
    ],
)
def test_missing_and_invalid_files_are_reported(boots, change, why):
    options = boots | {key: value.format(**boots) for key, value in change.items()}
    with pytest.raises(ProviderError, match=why) as caught:
        check(options)
    assert caught.value.fix


@needs_qemu_img
def test_the_content_of_images_is_checked(tmp_path, boots):
    def create(name, *arguments):
        path = tmp_path / name
        subprocess.run(["qemu-img", "create", "-q", "-f", *arguments[:1], *arguments[1:], path, "8M"], check=True)
        return path

    good = create("good.qcow2", "qcow2")
    assert check(boots | {"image": str(good)})[0]
    with pytest.raises(ProviderError, match="no boot sector"):
        check({"image": str(good)})
    with pytest.raises(ProviderError, match="is a qcow2 image"):
        check(boots | {"image": str(good), "format": "raw"})
    overlay = create("overlay.qcow2", "qcow2", "-b", str(good), "-F", "qcow2")
    with pytest.raises(ProviderError, match="is an overlay itself"):
        check(boots | {"image": str(overlay)})
    damaged = bytearray(good.read_bytes())
    damaged[48:56] = b"\xff" * 8  # where the table of reference counts lies
    (tmp_path / "bad.qcow2").write_bytes(damaged)
    with pytest.raises(ProviderError, match="is damaged"):
        check(boots | {"image": str(tmp_path / "bad.qcow2")})
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(510) + b"\x55\xaa" + bytes(65_536))
    assert check({"image": str(disk), "format": "raw"})[0]


def test_valid_files_are_checked_once(boots, monkeypatch):
    known = Images()
    first = check(boots, known=known)
    monkeypatch.setattr(images, "_head", lambda path, length: pytest.fail("looked again"))
    assert check(boots, known=known) == first


def test_unreadable_files_are_reported_with_the_command(boots, tmp_path):
    stranger = Reader(54_321, 54_321)
    tmp_path.chmod(0o700)
    with pytest.raises(ProviderError, match="Machines may not read") as caught:
        check(boots, stranger)
    assert caught.value.fix.startswith("chmod o+x ")
    if os.geteuid() == 0:
        for parent in (tmp_path, *tmp_path.parents):
            if parent != parent.parent and parent.stat().st_uid == 0 and str(parent) != "/tmp":
                parent.chmod(parent.stat().st_mode | 0o001)
        (tmp_path / "initrd").chmod(0o600)
        with pytest.raises(ProviderError, match="initrd") as caught:
            check(boots, stranger)
        assert caught.value.fix == f"chmod o+r {tmp_path / 'initrd'}"

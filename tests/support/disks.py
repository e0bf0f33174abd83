"""Real file systems of a few megabytes, for tests that fill them or cut their power. Mounting needs root."""

import fcntl
import gc
import os
import struct
import subprocess

import pytest

SHUTDOWN, WITHOUT_THE_JOURNAL = 0x8004587D, struct.pack("I", 2)


def run(*command):
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


class Disk:
    """A file system that can be mounted, cut and mounted again."""

    def __init__(self, folder, *options):
        self.image, self.root, self.options = folder / "image", folder / "mounted", options
        self.root.mkdir()

    def mount(self):
        done = run("mount", *self.options, str(self.image), str(self.root))
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")

    def cut(self):
        descriptor = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, SHUTDOWN, WITHOUT_THE_JOURNAL)
        finally:
            os.close(descriptor)

    def unmount(self):
        gc.collect()  # a traceback may hold a mapped file
        done = run("umount", str(self.root))
        if done.returncode:
            run("umount", "--lazy", str(self.root))  # so that nothing stays behind
        assert done.returncode == 0, done.stderr


def small_disk(folder, size):
    """A disk in memory, mounted. The test is skipped where that is not allowed."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    disk = Disk(folder, "-t", "tmpfs", "-o", f"size={size}")
    disk.mount()
    return disk

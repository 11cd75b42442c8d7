"""Prints the SHA-256 of the whole disk of a VMDK as another reader sees it; writes its bytes to FILE if there is one.

usage: oracle.py libvmdk|dissect IMAGE [FILE]

What each of the two reads, and where it is wrong: docs/oracles.md.
"""

import hashlib
import pathlib
import sys

STEP = 1 << 20


def libvmdk(path):
    """The size of the disk, and a function from (offset, length) to bytes."""
    import pyvmdk

    def opened(path):
        handle = pyvmdk.handle()
        handle.open(str(path))
        handle.open_extent_data_files()
        # It follows no chains by itself.
        if handle.parent_filename:
            handle.set_parent(opened(path.with_name(handle.parent_filename)))
        return handle

    handle = opened(path)
    return handle.get_media_size(), lambda at, count: handle.read_buffer_at_offset(count, at)


def dissect(path):
    """As libvmdk."""
    from dissect.hypervisor.disk.vmdk import VMDK

    disk = VMDK(path)
    # Not by its stream: that asks for sectors behind the end, and fails, if the size is no multiple of 8 KiB.
    return disk.size, lambda at, count: disk.read_sectors(at // 512, count // 512)


def main():
    reader, path = sys.argv[1], pathlib.Path(sys.argv[2])
    size, read = {"libvmdk": libvmdk, "dissect": dissect}[reader](path)
    out = open(sys.argv[3], "wb") if len(sys.argv) > 3 else None
    digest = hashlib.sha256()
    for at in range(0, size, STEP):
        count = min(STEP, size - at)
        piece = read(at, count)
        if len(piece) != count:
            sys.exit(f"{path}: {reader} read {len(piece)} bytes of {count} at {at}")
        digest.update(piece)
        # Holes stay holes.
        if out and piece.count(0) != count:
            out.seek(at)
            out.write(piece)
    if out:
        out.truncate(size)
    print(digest.hexdigest())


main()

"""Build the shipped image set `emoji32` from the npm package `emoji-datasource-google`, or check it byte for byte.

python tools/build_emoji32.py            # downloads with `npm pack`, writes smalti/data/emoji32/
python tools/build_emoji32.py --check    # same, but compares instead of writing; exit status 1 if anything differs
python tools/build_emoji32.py --tarball emoji-datasource-google-16.0.0.tgz [--check]
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from smalti.data.packed import PackedItems, load_packed, pack_images, pack_items
from smalti.errors import SmaltiError
from smalti.workflows.data import GOOGLE, emoji32, tarball_or_fetch

SHIPPED = Path(__file__).resolve().parent.parent / "smalti" / "data" / "emoji32"


def build(items: PackedItems, images: np.ndarray) -> dict[str, bytes]:
    """File name to content."""
    return {"images.npy.xz": pack_images(images), "items.json": pack_items(items, images)}


def differences(folder: Path, built: dict[str, bytes], images: np.ndarray) -> list[str]:
    """One line for each file in `folder` that is not byte for byte what was built."""
    lines = []
    for name, content in built.items():
        stored = (folder / name).read_bytes() if (folder / name).is_file() else b""
        if stored == content:
            continue
        lines.append(f"{folder / name}: {len(stored)} bytes stored, {len(content)} built, and they differ")
        if name == "images.npy.xz" and stored:
            same = np.array_equal(load_packed(folder).images, images)
            # Tells a change of the compressor (harmless) from a change of the decoder or the resize filter.
            lines.append(f"  the pixels are {'the same: only the xz encoder differs' if same else 'different'}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Build or check; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tarball", type=Path, help="use this tarball instead of running `npm pack`")
    parser.add_argument("--check", action="store_true", help="compare with the shipped files instead of writing them")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder to write to or to compare with")
    options = parser.parse_args(arguments)
    try:
        for tarball in tarball_or_fetch(GOOGLE, options.tarball):
            items, images = emoji32(tarball)
            built = build(items, images)
            if options.check:
                lines = differences(options.out, built, images)
                print("\n".join(lines) or f"{options.out}: {len(images)} images, byte for byte as built")
                return 1 if lines else 0
    except SmaltiError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    options.out.mkdir(parents=True, exist_ok=True)
    for name, content in built.items():
        (options.out / name).write_bytes(content)
        print(f"{options.out / name}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

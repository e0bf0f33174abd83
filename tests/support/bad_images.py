"""Image files that no decoder should take, each with a word of the reason why not."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def saved(image, format_name="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def png_chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(rows, columns, bit_depth, colour_type, body, *extra):
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", columns, rows, bit_depth, colour_type, 0, 0, 0))
    chunks = [header, *extra, png_chunk(b"IDAT", body), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def noise_file(format_name):
    noise = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise), format_name)


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


REFUSED = {
    "empty": (lambda: b"", "0 bytes"),
    "text": (lambda: b"this is not an image, whatever its name says\n" * 9, "not a JPEG"),
    "float": (lambda: saved(Image.new("F", (2, 2), 0.5), "TIFF"), "float pixels"),
    "32-bit integer": (lambda: saved(Image.new("I", (2, 2), 5), "TIFF"), "32-bit integer"),
    "16-bit TIFF": (lambda: saved(Image.fromarray(np.ones((2, 2), np.uint16)), "TIFF"), "16-bit TIFF"),
    "truncated GIF": (lambda: noise_file("GIF")[:1200], "damaged"),
    "truncated WEBP": (lambda: noise_file("WEBP")[:300], "damaged"),
    "truncated BMP": (lambda: noise_file("BMP")[:900], "damaged"),
    "PPM": (lambda: saved(Image.new("RGB", (2, 2)), "PPM"), "not a JPEG"),
    "ICO": (lambda: saved(Image.new("RGB", (16, 16)), "ICO"), "not a JPEG"),
    "EPS": (lambda: saved(Image.new("RGB", (2, 2)), "EPS"), "not a JPEG"),
    "truncated PNG": (lambda: noise_file("PNG")[:-400], "damaged"),
    "truncated JPEG": (lambda: noise_file("JPEG")[:900], "damaged"),
    "PNG with a flipped bit": (lambda: flip(noise_file("PNG"), 500), "damaged"),
    "PNG cut in its header": (lambda: noise_file("PNG")[:20], "damaged"),
    "PNG header only": (lambda: noise_file("PNG")[:50], "damaged"),
    "60 megapixels": (lambda: png(6000, 10000, 1, 0, zlib.compress(bytes(6000 * 1251))), "50 million"),
    "100 megapixels": (lambda: png(10000, 10000, 1, 0, zlib.compress(bytes(10000 * 1251))), "50 million"),
    "200 megapixels": (lambda: png(10000, 20000, 8, 2, b""), "50 million"),
    "4 gigapixels": (lambda: png(65000, 65000, 8, 2, b""), "50 million"),
    "text bomb": (
        lambda: png(
            1, 1, 8, 0, zlib.compress(b"\0\0"), png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(30_000_000), 1))
        ),
        "damaged",
    ),
}

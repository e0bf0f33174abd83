"""Every kind of good, odd, bad and hostile image file, made here: the pixels it gives, or the reason why not."""

import io
import resource
import struct
import sys
import time
import zlib

import numpy as np
import pytest
from bad_images import REFUSED, noise_file, png, png_chunk, saved
from PIL import Image

from smalti.data.decoding import UnusableImageError, centre_crop, decode, looks_like_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def pixels(data):
    return np.asarray(decode(data).image)


@pytest.mark.faults
@pytest.mark.parametrize("format_name", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_every_allowed_format_gives_its_colour_back(format_name):
    options = {"lossless": True} if format_name == "WEBP" else {}
    found = decode(saved(Image.new("RGB", (5, 3), RED), format_name, **options))
    assert (found.image.mode, found.image.size, found.format) == ("RGB", (5, 3), format_name)
    # JPEG's colour space rounds: one step for the transform, one for the inverse.
    tolerance = 2 if format_name == "JPEG" else 0
    assert np.abs(np.asarray(found.image).astype(int) - RED).max() <= tolerance


@pytest.mark.faults
@pytest.mark.parametrize(("mode", "stored", "shown"), [("1", 1, 255), ("L", 77, 77)])
def test_grey_modes_become_equal_channels(mode, stored, shown):
    assert (pixels(saved(Image.new(mode, (2, 2), stored))) == shown).all()


@pytest.mark.faults
def test_sixteen_bit_grey_is_divided_by_257_and_does_not_saturate():
    wide = np.array([[0, 257, 128 * 257, 65535]], dtype=np.uint16)
    assert pixels(saved(Image.fromarray(wide)))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.faults
def test_sixteen_bit_grey_shows_its_transparent_value_white():
    rows = zlib.compress(b"\0" + struct.pack(">3H", 0, 1000, 2570))
    data = png(1, 3, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 1000)))
    assert pixels(data)[0, :, 0].tolist() == [0, 255, 10]


@pytest.mark.faults
def test_sixteen_bit_colour_keeps_its_brightness():
    rows = zlib.compress(b"\0" + struct.pack(">3H", 0, 128 * 257, 65535))
    assert pixels(png(1, 1, 16, 2, rows))[0, 0].tolist() == [0, 128, 255]


@pytest.mark.faults
@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_zero_shows_white_whatever_colour_lies_below(mode):
    below = Image.new("RGBA", (2, 1), (10, 10, 10, 0))
    below.putpixel((1, 0), (10, 10, 10, 255))
    data = saved(below.convert("LA") if mode == "LA" else below.quantize() if mode == "PA" else below)
    assert pixels(data)[0].tolist() == [[255, 255, 255], [10, 10, 10]]


@pytest.mark.faults
def test_half_alpha_is_mixed_with_white():
    # 0 * 128/255 + 255 * 127/255 = 127
    assert pixels(saved(Image.new("RGBA", (1, 1), (0, 0, 0, 128)))).ravel().tolist() == [127] * 3


@pytest.mark.faults
def test_grey_that_is_multiplied_by_its_alpha_already_is_mixed_with_white_too():
    tag = struct.pack("<HHI", 338, 3, 1)  # ExtraSamples: 2 = as it is, 1 = multiplied
    plain = saved(Image.new("LA", (1, 1), (51, 51)), "TIFF")
    data = plain.replace(tag + b"\2", tag + b"\1")
    assert Image.open(io.BytesIO(data)).mode == "La"
    assert pixels(data).ravel().tolist() == [255] * 3  # 51 + 255 * 204/255


@pytest.mark.faults
def test_transparent_palette_entry_and_transparent_colour_show_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert pixels(saved(palette, transparency=0))[0].tolist() == [[255, 255, 255], [40, 50, 60]]
    colour = Image.new("RGB", (1, 1), (1, 2, 3))
    assert pixels(saved(colour, transparency=(1, 2, 3)))[0].tolist() == [[255, 255, 255]]


@pytest.mark.faults
def test_cmyk_is_converted():
    # No ink is white; full magenta and yellow is red, within the JPEG's rounding of each of two channels.
    found = pixels(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(found.astype(int) - RED).max() <= 2
    assert decode(saved(Image.new("CMYK", (8, 8)), "JPEG")).mode == "CMYK"


@pytest.mark.faults
@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation_is_undone(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # What the camera stores so that a viewer who applies `orientation` sees `upright`; EXIF 2.3, tag 0x0112.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert pixels(data)[..., 0].tolist() == upright.tolist()


@pytest.mark.faults
@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_frame_0_and_says_so(format_name):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, WHITE)]
    options = {"lossless": True} if format_name == "WEBP" else {}
    found = decode(saved(frames[0], format_name, save_all=True, append_images=frames[1:], **options))
    assert (np.asarray(found.image) == RED).all()
    assert "frame 0" in found.notes[0]
    assert decode(saved(frames[0], format_name)).notes == ()


@pytest.mark.faults
def test_content_decides_the_format_not_the_name():
    assert decode(saved(Image.new("RGB", (2, 2)), "PNG")).format == "PNG"


@pytest.mark.faults
@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_file_is_refused_at_once_with_a_one_line_reason(kind):
    make, reason = REFUSED[kind]
    data = make()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UnusableImageError, match=reason) as caught:
        decode(data)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)
    assert "\n" not in str(caught.value)
    # The bar for bombs, kept for all kinds: 0.1 s and 50 MiB.
    assert time.process_time() - start < 0.1
    assert grown < 50 * 2**20


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
@pytest.mark.parametrize("format_name", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_file_cut_anywhere_is_refused_or_gives_all_its_pixels(format_name):
    data = noise_file(format_name)
    whole = pixels(data)
    refused = 0
    for length in range(0, len(data), 7):
        try:
            assert np.array_equal(pixels(data[:length]), whole), length
        except UnusableImageError:
            refused += 1
    # PNG and GIF end with marks that carry no pixels; all else must be noticed.
    assert refused > 0.95 * len(range(0, len(data), 7))


def test_file_mark_tells_images_without_suffix_from_text():
    assert looks_like_image(noise_file("PNG")[:16])
    assert looks_like_image(noise_file("JPEG")[:16])
    assert looks_like_image(saved(Image.new("RGB", (1, 1)), "WEBP")[:16])
    assert not looks_like_image(b"RIFF\0\0\0\0WAVEfmt ")
    assert not looks_like_image(b"name,label\n")


def grey(values):
    return Image.fromarray(np.asarray(values, dtype=np.uint8)).convert("RGB")


def channel(image):
    return np.asarray(image)[..., 0].tolist()


def test_crop_halves_by_box_and_cuts_the_middle_out():
    # 4 x 8 to 2 x 2: the shorter side 4 is twice 2, so 2 x 2 blocks are averaged; columns 1 and 2 of 4 remain.
    image = grey([[0, 0, 10, 30, 50, 70, 0, 0], [0, 0, 20, 40, 60, 80, 0, 0], [0] * 8, [0, 0, 4, 4, 8, 8, 0, 0]])
    assert channel(centre_crop(image, (2, 2))) == [[25, 65], [2, 4]]


def test_crop_of_odd_size_gives_each_pixel_to_the_box_of_its_centre():
    # 5 to 2 by boxes of 2.5 pixels: centres 0.5, 1.5 and 2.5 (the border counts to the left), then 3.5 and 4.5.
    assert channel(centre_crop(grey([[0, 10, 20, 30, 40]] * 5), (2, 2))) == [[10, 35], [10, 35]]


def test_crop_to_a_rectangle_covers_it():
    # 8 x 8 to 2 x 4: one halving (4 columns are enough), then rows 1 and 2 of 4.
    rows = np.repeat(np.arange(8)[:, None] * 10, 8, axis=1)
    assert channel(centre_crop(grey(rows), (2, 4))) == [[25] * 4, [45] * 4]


def test_crop_keeps_an_image_of_the_right_size_and_enlarges_a_small_one():
    noise = np.random.default_rng(1).integers(0, 255, (6, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(centre_crop(Image.fromarray(noise), (6, 7))), noise)
    assert np.asarray(centre_crop(grey([[9, 9]]), (4, 4))).tolist() == np.full((4, 4, 3), 9).tolist()


@pytest.mark.parametrize(
    "size", [(1, 1), (1, 99), (31, 33), (32, 32), (33, 32), (64, 64), (65, 127), (200, 3), (97, 301)]
)
@pytest.mark.parametrize("wanted", [(32, 32), (16, 48), (3, 1)])
def test_crop_always_has_the_wanted_size(size, wanted):
    assert centre_crop(Image.new("RGB", size), wanted).size == (wanted[1], wanted[0])


def test_between_two_halvings_the_scaling_is_bicubic():
    noise = Image.fromarray(np.random.default_rng(2).integers(0, 255, (48, 48, 3), dtype=np.uint8))
    expected = noise.resize((32, 32), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(centre_crop(noise, (32, 32))), np.asarray(expected))

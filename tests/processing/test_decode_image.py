"""Decoding rules: every limit before a pixel is decoded, every bad file a typed reason."""

import io
import struct
import sys
import tracemalloc
import types
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from efficient_vlm.processing import decode_image as images
from efficient_vlm.processing.decode_image import BadImage


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def noise(height=12, width=20, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


@pytest.mark.parametrize("format", images.FORMATS)
def test_formats(format):
    pixels = images.decode(encode(Image.fromarray(noise()), format))
    assert pixels.shape == (12, 20, 3) and pixels.dtype == np.uint8
    if format in ("PNG", "BMP", "TIFF"):
        np.testing.assert_array_equal(pixels, noise())


def test_own_png_is_read_by_pillow():
    image = noise(7, 5)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(images.encode_png(image)))), image
    )


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # Rotate by 90 degrees.
    data = encode(Image.fromarray(noise()), exif=exif)
    np.testing.assert_array_equal(images.decode(data), np.rot90(noise(), -1))


def test_the_size_of_a_picture_needs_no_pixels():
    """A PNG that ends in the middle of them, and one that is turned by what stands behind them."""
    data = encode(Image.fromarray(noise(40, 60)))
    cut = data[: len(data) // 2]
    assert images.picture_size(cut) == (40, 60)
    with pytest.raises(BadImage, match="corrupt"):
        images.decode(cut)
    exif = Image.Exif()
    exif[0x0112] = 6
    body = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    end = data.rindex(b"IEND") - 4
    xmp = PngImagePlugin.PngInfo()
    xmp.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>')
    for turned in (
        encode(Image.fromarray(noise(40, 60)), exif=exif),
        data[:end] + chunk + data[end:],
        encode(Image.fromarray(noise(40, 60)), pnginfo=xmp),
    ):
        assert images.picture_size(turned) == images.decode(turned).shape[:2] == (60, 40)


def test_alpha_is_composited_on_white():
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[..., 0] = 200  # Hidden red.
    rgba[0, 0, 3] = 255
    rgba[1, 1, 3] = 128
    pixels = images.decode(encode(Image.fromarray(rgba)))
    np.testing.assert_array_equal(pixels[0, 0], [200, 0, 0])
    np.testing.assert_array_equal(pixels[0, 1], [255, 255, 255])
    assert abs(int(pixels[1, 1, 1]) - 127) <= 1
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([9, 8, 7, 1, 2, 3])
    pixels = images.decode(encode(palette, transparency=0))
    np.testing.assert_array_equal(pixels, [[[255, 255, 255], [1, 2, 3]]])


def test_sixteen_bit_grey_is_rescaled():
    values = np.array([[0, 40000, 65535, 257]], np.uint16)
    pixels = images.decode(encode(Image.fromarray(values)))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 156, 255, 1])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1, 128, 255], [0, 1, 128, 255]),  # 8 bits in 32
        ([0, 257, 40000, 65535], [0, 1, 156, 255]),  # 16 bits in 32
        ([0, 0, 0, 0], [0, 0, 0, 0]),
        ([0, 65536, 1, 1], None),
        ([-1, 1, 1, 1], None),
    ],
)
def test_grey_of_32_bits_says_its_scale_by_its_values(values, expected):
    image = Image.fromarray(np.array([values], np.int32))
    assert image.mode == "I"
    tiff = encode(image, "TIFF")
    if expected is None:
        with pytest.raises(BadImage, match=r"grey values of .* to ") as caught:
            images.decode(tiff)
        assert caught.value.reason == "format"
        return
    for picture in (images.decode(tiff), np.asarray(images.to_rgb(image))):
        np.testing.assert_array_equal(picture[0], np.array([expected] * 3).T)


def test_sixteen_bits_of_either_byte_order_are_sixteen_bits():
    """Also where all are small: the mode says so."""
    for dtype, mode in (("<u2", "I;16"), (">u2", "I;16B")):
        image = Image.frombytes(mode, (3, 1), np.array([0, 100, 255 * 257], dtype).tobytes())
        assert np.asarray(images.to_rgb(image))[0, :, 0].tolist() == [0, 0, 255]
    dark = Image.frombytes("I;16", (2, 1), np.array([100, 200], "<u2").tobytes())
    assert np.asarray(images.to_rgb(dark)).max() == 1


@pytest.mark.parametrize(
    ("kind", "behind"),
    [
        *((kind, False) for kind in ("text", "compressed", "international", "profile", "many")),
        *((kind, True) for kind in ("text", "compressed", "international", "many")),
    ],
)
def test_long_texts_of_a_png_do_not_matter(kind, behind, monkeypatch):
    """In front of the pixels and behind them; short ones, which may say how it lies, are read."""
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1000)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 3000)
    body, packed = b"x" * 2000, zlib.compress(b"x" * 2000)
    chunks = {
        "text": [(b"tEXt", b"k\0" + body * 40)],
        "compressed": [(b"zTXt", b"k\0\0" + packed)],
        "international": [(b"iTXt", b"k\0\1\0\0\0" + packed)],
        "profile": [(b"iCCP", b"k\0\0" + packed)],
        "many": [(b"zTXt", b"k%d\0\0" % i + zlib.compress(b"x" * 900)) for i in range(5)],
    }[kind]
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.fromarray(noise()), exif=exif)
    at = data.index(b"IEND") - 4 if behind else 33
    more = b"".join(png_chunk(*parts) for parts in chunks)
    spoilt = data[:at] + more + data[at:]
    np.testing.assert_array_equal(images.decode(spoilt), np.rot90(noise(), -1))
    with pytest.raises(BadImage, match="corrupt"):
        images.decode(spoilt[:60] + spoilt[90:])  # Damaged pixels stay damaged.
    short_text = png_chunk(b"tEXt", b"k\0short")
    kept = images.without_texts(data[:33] + short_text + more + data[33:])
    assert short_text in kept and len(kept) == len(data) + len(short_text)


def test_heic_is_named_and_read_with_its_plugin(monkeypatch):
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImage, match="pip install pillow-heif") as caught:
        images.decode(heic)
    assert caught.value.reason == "format"

    class Plugin(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self):
            self._size, self._mode, self.tile = (3, 2), "RGB", []

        def load(self):
            self._im = Image.new("RGB", self.size, "red").im

    def register():
        Image.register_open("HEIF", Plugin, lambda head: head[4:8] == b"ftyp")

    # What that package does; the advice is followed.
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    plugin = types.SimpleNamespace(register_heif_opener=register)
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert (images.decode(heic) == [255, 0, 0]).all()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_become_rgb(mode):
    format = "JPEG" if mode == "CMYK" else "PNG"
    image = Image.new(mode, (4, 3), {"P": 0, "CMYK": (0, 0, 0, 0), "LA": (255, 255)}.get(mode, 255))
    if mode == "P":
        image.putpalette([255, 255, 255])
    pixels = images.decode(encode(image, format))
    assert pixels.shape == (3, 4, 3) and pixels.min() >= 254


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(images.decode(data)[0, 0], [255, 0, 0])


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def header_bomb(width, height, ratio=1000):
    """A small PNG that claims (and would decode to) width x height grey pixels."""

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(ratio))
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", body)
        + png_chunk(b"IEND", b"")
    )


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8_000, 12_000, 60_000])
def test_bomb_is_refused_by_its_header(side):
    data = header_bomb(side, side)
    tracemalloc.start()
    with pytest.raises(BadImage) as caught:
        images.decode(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason == "too_large" and peak < 2**20


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_bomb_warning_as_error_is_understood():
    with pytest.raises(BadImage) as caught:
        images.decode(header_bomb(12_000, 12_000))
    assert caught.value.reason == "too_large"


def test_limits_can_be_tightened():
    data = encode(Image.fromarray(noise()))
    for limits in ({"max_pixels": 239}, {"max_bytes": 100}):
        with pytest.raises(BadImage) as caught:
            images.decode(data, **limits)
        assert caught.value.reason == "too_large"
    assert images.decode(data, max_pixels=240).shape == (12, 20, 3)


good_png, good_jpeg = encode(Image.fromarray(noise())), encode(Image.fromarray(noise()), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "corrupt"),
        (good_png[:100], "corrupt"),
        (good_png[:-40], "corrupt"),
        (good_jpeg[: len(good_jpeg) // 2], "corrupt"),
        (good_png[:60] + b"\0" * 40 + good_png[100:], "corrupt"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "format"),
        (encode(Image.fromarray(noise()), "PPM"), "format"),
        (encode(Image.fromarray(noise()), "TIFF")[:100], "corrupt"),
        (encode(Image.new("F", (3, 3), 0.5), "TIFF"), "format"),
        (b"\x80\x04\x95 not an image", "format"),
    ],
)
def test_bad_bytes(data, reason):
    with pytest.raises(BadImage) as caught:
        images.decode(data)
    assert caught.value.reason == reason


def test_truncated_files_are_never_half_decoded():
    raised = 0
    for end in range(len(good_png)):
        try:
            # Only the check sums at the very end may be missing.
            np.testing.assert_array_equal(images.decode(good_png[:end]), noise())
        except BadImage as error:
            reason = error.reason
        else:
            continue
        assert reason == ("corrupt" if end >= 4 or not end else "format")
        raised += 1
    assert raised >= len(good_png) - 24


def test_read(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(good_png)
    assert images.read(path) == good_png
    for bad, reason in (
        (tmp_path / "b.png", "missing"),
        (tmp_path, "missing"),
        ("a\0b", "missing"),
    ):
        with pytest.raises(BadImage) as caught:
            images.read(bad)
        assert caught.value.reason == reason
    with pytest.raises(BadImage) as caught:
        images.read(path, max_bytes=10)
    assert caught.value.reason == "too_large"


def test_resize_is_pillow_bicubic():
    expected = Image.fromarray(noise()).resize((8, 6), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(images.resize(noise(), (6, 8)), np.asarray(expected))
    np.testing.assert_array_equal(images.load(good_png, (6, 8)), np.asarray(expected))


def test_letterbox_keeps_the_aspect():
    boxed = images.resize(np.full((10, 20, 3), 255, np.uint8), (16, 16), mode="letterbox")
    assert (boxed[4:12] == 255).all() and (boxed[:4] == 127).all() and (boxed[12:] == 127).all()

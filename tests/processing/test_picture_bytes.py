"""A picture in every form that has bytes is the same picture; errors are short and followable."""

import base64
import io
import urllib.parse

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from efficient_vlm.errors import UserError, short
from efficient_vlm.processing.decode_image import BadImage
from efficient_vlm.processing.picture_bytes import picture_bytes
from efficient_vlm.processing.pictures.base import load_picture

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(format="PNG"):
    buffer = io.BytesIO()
    IMAGE.save(buffer, format)
    return buffer.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()


class Unseekable(io.RawIOBase):
    """As a socket or a pipe."""

    def __init__(self, data):
        self._rest = data

    def readable(self):
        return True

    def seekable(self):
        return False

    def read(self, size=-1):
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken


class Untold:
    """As torch's tensors of bfloat16, or with a gradient."""

    def __array__(self, *_args, **_options):
        raise RuntimeError("call detach first")


def written():
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")  # Stands at its end now.
    return buffer


FORMS = {
    "bytes": PNG,
    "bytearray": bytearray(PNG),
    "memoryview": memoryview(PNG),
    "file that was just written": written(),
    "file without seek": Unseekable(PNG),
    "row of a table": {"bytes": PNG, "path": "elsewhere.png"},
    "base64": TEXT,
    "base64 in lines": base64.encodebytes(PNG).decode(),
    "base64 for addresses, unpadded": base64.urlsafe_b64encode(PNG).decode().rstrip("="),
    "data URL": f"data:image/png;base64,{TEXT}",
    "data URL in capitals, with parameters": f"DATA:image/png;name=a.png;BASE64,{TEXT}",
    "data URL without a type": f"data:;base64,{TEXT}",
    "quoted base64": f"data:image/png;base64,{urllib.parse.quote(TEXT)}",
    "quoted bytes": f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}",
    "data URL behind a line break": f"\n data:image/png;base64,{TEXT}",
    # base64.b64encode gives bytes, cv2.imencode an array, clients {"url": ...}, tables NaN.
    "base64 as bytes": TEXT.encode(),
    "base64 in lines as a file": io.BytesIO(base64.encodebytes(PNG)),
    "data URL as bytes": f"data:image/png;base64,{TEXT}".encode(),
    "file as an array": np.frombuffer(PNG, np.uint8),
    "NumPy's bytes": np.bytes_(PNG),
    "NumPy's text": np.str_(TEXT),
    "URL of a client": {"url": f"data:image/png;base64,{TEXT}", "detail": "low"},
    "row of a table with NaN": {"bytes": float("nan"), "path": TEXT},
    "Pillow": IMAGE,
    "array": PIXELS,
    "array of JAX": jnp.asarray(PIXELS),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form):
    np.testing.assert_array_equal(np.asarray(load_picture(FORMS[form])), PIXELS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_base64_of_every_format(format):
    if format == "AVIF":
        pytest.importorskip("PIL._avif", reason="this Pillow has no AVIF")
    data = encoded(format)
    assert picture_bytes(base64.b64encode(data).decode()) == data


def test_paths(tmp_path, monkeypatch):
    (tmp_path / "a b.png").write_bytes(PNG)
    for path in (tmp_path / "a b.png", str(tmp_path / "a b.png"), (tmp_path / "a b.png").as_uri()):
        assert picture_bytes(path) == PNG
    with (tmp_path / "a b.png").open("rb") as file:
        assert picture_bytes(file) == PNG == picture_bytes(file)
    # A file whose name could be base64 is a file.
    monkeypatch.chdir(tmp_path)
    (tmp_path / TEXT[:40].replace("/", "_")).write_bytes(b"named so")
    assert picture_bytes(TEXT[:40].replace("/", "_")) == b"named so"


BAD = {
    "address": ("https://example.org/cat.jpg", "nothing is fetched"),
    "another address": ("S3://bucket/cat.jpg", "nothing is fetched"),
    "text": ("x" * 100_000, "missing"),
    "cut base64": (TEXT[:400], "corrupt"),
    "damaged base64": (f"data:image/png;base64,{TEXT[:400]}!{TEXT[:9000]}", "damaged base64"),
    "data URL without data": ("data:image/png;base64", "without a comma"),
    "data URL of a text": ("data:text/plain;base64," + TEXT[::-1], "corrupt|format"),
    "long path": ("folder/" * 50 + "a.png", "a.png"),
    "text file": (io.StringIO(TEXT), "open it with mode 'rb'"),
    "closed file": (open("/dev/null", "rb"), "missing|corrupt"),  # noqa: SIM115
    "empty": (b"", "an empty file"),
    "row of a table with nothing": ({"bytes": None, "path": None}, "NoneType"),
    "number": (3, "int"),
    "floats": (PIXELS / 255, "scale floats"),
    "channels first": (PIXELS.transpose(2, 0, 1), "channels last"),
    "a batch": (PIXELS[None], "one by one"),
    "a tensor with a gradient": (Untold(), "no NumPy array"),
}
BAD["closed file"][0].close()


@pytest.mark.parametrize("name", BAD)
def test_errors_name_no_more_than_80_characters(name):
    picture, words = BAD[name]
    with pytest.raises(UserError, match=words) as caught:
        load_picture(picture)
    text = str(caught.value)
    assert 2 <= len(text.splitlines()) <= 3 and len(text) < 500
    if isinstance(picture, str) and len(picture) > 80:
        assert picture[:81] not in text and picture[-81:] not in text


def test_sizes_are_checked_before_anything_is_copied():
    forms = ("bytes", "file that was just written", "base64", "data URL", "quoted bytes")
    for picture in (FORMS[name] for name in forms):
        with pytest.raises(BadImage, match="too_large"):
            picture_bytes(picture, max_bytes=len(PNG) - 1)
        assert picture_bytes(picture, max_bytes=len(PNG)) == PNG
    with pytest.raises(BadImage, match="too_large"):
        # Far above the limit it is refused by its length alone, damaged or not.
        picture_bytes("data:;base64," + "!" * 10_000, max_bytes=5_000)


def test_the_advice_for_addresses_is_followed(tmp_path):
    with pytest.raises(UserError, match="give the path of a file that is here, or its bytes"):
        load_picture("http://example.org/a.png")
    (tmp_path / "a.png").write_bytes(PNG)
    for picture in (tmp_path / "a.png", PNG):
        np.testing.assert_array_equal(np.asarray(load_picture(picture)), PIXELS)


@pytest.mark.parametrize(
    "value", ["x" * 10**6, b"x" * 10**6, ["x" * 10**6] * 99, {"a": {"b": "x" * 10**6}}, PIXELS, 3]
)
def test_short(value):
    assert len(short(value)) <= 80 and "\n" not in short("a\nb")
    assert short("abc") == "'abc'" and short(3) == "3"

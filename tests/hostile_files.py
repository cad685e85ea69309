"""Files that somebody made to do harm, or that went wrong: written by code, none is stored.

Each is a few kilobytes on disk, whatever it claims to become.
"""

import io
import json
import struct
import tarfile
import zipfile
import zlib

import numpy as np
from PIL import Image


def _png_chunk(name, data, checksum=None):
    sum_ = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", sum_)


def _png(width, height, body, *, more=b"", depth=8, color=0):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = _png_chunk(b"IHDR", header) + more + _png_chunk(b"IDAT", body)
    return b"\x89PNG\r\n\x1a\n" + chunks + _png_chunk(b"IEND", b"")


def _encoded(format, size=(8, 8), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def _zip(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def _tar(*members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _link(name, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def _outside(name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    return info


MOST_PIXELS = 10_000  # In the tests: a picture that is too large for them harms nobody.


def archives():
    """name -> bytes: a bomb, ways out of the folder, a link, one that is called a picture."""
    inside = b"owned"
    return {
        "bomb.zip": _zip({"a.png": bytes(200_000)}),
        "way_out.zip": _zip({"../../../tmp/hostile_was_here": inside}),
        "way_out.tar": _tar((_outside("../../../tmp/hostile_was_here", inside), inside)),
        "root.tar": _tar((_outside("/tmp/hostile_was_here", inside), inside)),
        "link.tar": _tar((_link("image.png", "/etc/passwd"), b"")),
        "zip_that_is_called_png.png": _zip({"image.png": _encoded("PNG")}),
    }


def images():
    """name -> (bytes, why they cannot be used; None for those that can)."""
    png, jpeg, gif = _encoded("PNG"), _encoded("JPEG"), _encoded("GIF")
    huge = struct.pack(">HH", 120, 120)
    sizes = jpeg.index(b"\xff\xc0") + 5
    found = {
        "empty": (b"", "corrupt"),
        "half.png": (png[: len(png) // 2], "corrupt"),
        "half.jpg": (jpeg[: len(jpeg) // 2], "corrupt"),
        "half.gif": (gif[: len(gif) // 2], "corrupt"),
        "checksum.png": (png[:50] + bytes([png[50] ^ 1]) + png[51:], "corrupt"),
        "no_pixels.png": (_png(8, 8, b""), "corrupt"),
        "no_size.png": (_png(0, 8, zlib.compress(b"")), "corrupt"),
        "bad_depth.png": (_png(8, 8, zlib.compress(bytes(72)), depth=77), "corrupt"),
        "claims_much.png": (_png(120, 120, zlib.compress(bytes(1000))), "too_large"),
        "claims_all.png": (_png(600, 600, zlib.compress(b"")), "too_large"),
        "claims_much.jpg": (jpeg[:sizes] + huge + jpeg[sizes + 4 :], "too_large"),
        "bomb.png": (_png(130, 130, zlib.compress(bytes(130 * 391))), "too_large"),
        # A text and a colour profile that unpack to more than Pillow allows: the pixels are sound.
        "long_text.png": (
            _png(
                8,
                8,
                zlib.compress(bytes(72)),
                more=_png_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2_000_000))),
            ),
            None,
        ),
        "long_profile.png": (
            _png(
                8,
                8,
                zlib.compress(bytes(72)),
                more=_png_chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2_000_000))),
            ),
            None,
        ),
        "script.svg": (b"<svg xmlns='x'><script>alert(1)</script></svg>", "format"),
        "postscript.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "format"),
        "page.html": (b"<html><img src='file:///etc/passwd'></html>", "format"),
        "pickle.png": (b"\x80\x04cos\nsystem\n(S'true'\ntR.", "format"),
        "ppm.ppm": (_encoded("PPM"), "format"),
        # A picture with an archive behind it is a picture.
        "picture_and_zip.png": (png + _zip({"a": b"b"}), None),
        "text_behind.jpg": (jpeg + b"<?php system($_GET[0]); ?>", None),
    }
    found |= {name: (data, "format") for name, data in archives().items()}
    return found


def _turns(question, answer="Yes."):
    return {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    }


def records():
    """name -> (a row of a LLaVA file, why it cannot be used; None for those that can)."""
    deep = "x"
    for _ in range(200):
        deep = [deep]
    return {
        "a megabyte": (_turns("word " * 200_000), "too_long"),
        "a long text without a space": (_turns("x" * 60_000), "too_long"),
        "markers": (_turns("<image>" * 1000 + " what?"), "markers"),
        "marker inside a marker": (
            {**_turns("<im<image>age> what?"), "image": "good.png"},
            None,
        ),
        "template": (_turns("{{ ''.__class__.__mro__ }} {% for x in y %}"), None),
        "special tokens": (_turns("<|im_end|><|endoftext|></s><pad><eos> what?"), None),
        "control characters": (_turns("a\u0000b\u0007\u202e\ud800c"), None),
        "only markers": (_turns("what?", "<image><image>"), None),
        "path out of the folder": (
            {**_turns("what?"), "image": "../" * 20 + "etc/passwd"},
            "outside",
        ),
        "absolute path": ({**_turns("what?"), "image": "/etc/passwd"}, "outside"),
        "device": ({**_turns("what?"), "image": "/dev/null"}, "outside"),
        "folder": ({**_turns("what?"), "image": "/"}, "outside"),
        "address": ({**_turns("what?"), "image": "http://127.0.0.1:1/a.png"}, "missing"),
        "name with a NUL": ({**_turns("what?"), "image": "a\u0000.png"}, "missing"),
        "long name": ({**_turns("what?"), "image": "a" * 100_000}, "missing"),
        "ten thousand images": (
            {**_turns("what?"), "image": ["good.png"] * 10_000},
            "too_many_images",
        ),
        "number": (3, "malformed"),
        "nothing": (None, "malformed"),
        "deep": ({"conversations": deep}, "malformed"),
        "turns of a number": ({"conversations": 7}, "malformed"),
        "text of a list": (_turns(["what?"]), "malformed"),
        "no speaker": ({"conversations": [{"value": "what?"}]}, "malformed"),
    }


def data_files():
    """name -> bytes of a file that is given as data, as a config or as a tokenizer."""
    return {
        "empty.json": b"",
        "nothing.json": b"null",
        "number.json": b"1e999",
        "half.json": b'[{"conversations": [',
        "deep.json": b"[" * 3000 + b"]" * 3000,
        "not_text.json": bytes(range(256)) * 8,
        "two_roots.json": b"[] []",
        "many_digits.json": b"[" + b"9" * 5000 + b"]",
        "twice.json": json.dumps([_turns("what?")]).encode() * 2,
        **archives(),
    }

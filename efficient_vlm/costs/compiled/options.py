"""Options of the command line that several audits of meshes take."""

from efficient_vlm import sharding
from efficient_vlm.errors import UserError, short, unknown

__all__ = ["batches_of", "parse_mesh"]


def parse_mesh(text: str) -> dict[str, int]:
    """ "fsdp:64,tensor:4" -> sizes of all axes; raises UserError."""
    sizes, given = dict.fromkeys(sharding.AXES, 1), set()
    for part in text.split(","):
        name, colon, size = part.partition(":")
        if name not in sizes:
            raise unknown("--mesh", name, sharding.AXES)
        if not colon or not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh: {short(part)}", allowed="AXIS:DEVICES", fix="--mesh=fsdp:64,tensor:4"
            )
        if name in given:
            raise UserError(f"--mesh={text}: {short(name)} twice", fix="give each axis once")
        given.add(name)
        sizes[name] = int(size)
    return sizes


def batches_of(text: str | None, devices: int) -> list[int]:
    """ "256" or "256,512" as numbers; as many as devices for None; raises UserError."""
    if text is None:
        return [devices]
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"--batch={text}", allowed="pictures on all devices: 256; 256,512 to try")
    return [int(word) for word in words]

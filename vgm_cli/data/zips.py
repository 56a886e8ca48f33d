"""Zips of image folders, read straight from the file."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from vgm_cli.data.files import SPLITS, Files, hidden, is_image, tops
from vgm_cli.errors import FAILED, VgmError
from vgm_cli.limits import check_member
from vgm_cli.ui import counted


class Zip(Files):
    """A zip of PNGs in EDM's layout, or of an image folder; folders around everything are left off."""

    kind = "zip"
    checksums = True

    def __init__(
        self, path: Path, split: str | None = None, label_key: str | None = None, wanted: Sequence[str] = ()
    ) -> None:
        super().__init__(str(path.absolute()))
        self.path, self.files = path, [str(path)]
        self.members: dict[str, zipfile.ZipInfo] = {}
        twice = 0
        try:
            with zipfile.ZipFile(path) as z:
                for m in z.infolist():
                    name = member_name(m)
                    if name and not name.endswith("/") and not hidden(name):
                        twice += name in self.members
                        self.members[name] = m
        except (zipfile.BadZipFile, OSError) as e:
            raise VgmError(f"{path} is not a readable zip file: {e}", "was the copy complete?", FAILED) from e
        if twice:
            self.remarks.append(
                f"{self.root}: {counted(twice, 'name')} stand in it twice; the last file of a name counts"
            )
        if any(m.flag_bits & 1 for m in self.members.values()):
            raise VgmError(f"{path} is encrypted", "unpack it with its password and name the folder", FAILED)
        if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in self.members.values()):
            raise VgmError(f"{path} uses a rare compression", "write it stored (zip -0) or deflated", FAILED)
        base, images = "", [n for n in self.members if is_image(n)]
        while base + "dataset.json" not in self.members and len(tops(n[len(base) :] for n in images)) == 1:
            top = next(iter(tops(n[len(base) :] for n in images)))
            if not top or top.lower() in SPLITS:
                break
            base += top + "/"
        self.arrange({n: m.file_size for n, m in self.members.items()}, split, label_key, base, wanted)

    def get(self, name: str) -> bytes:
        """Read straight from the file, sharing no handle, so that threads and forked workers need no lock."""
        member = self.members[name]
        try:
            check_member(member, str(self.path))
        except VgmError as e:
            raise OSError(e.message) from e
        with open(self.path, "rb") as f:
            f.seek(data_offset(f, member))
            raw = f.read(min(member.compress_size, os.path.getsize(self.path)))
        stored = member.compress_type == zipfile.ZIP_STORED
        content = raw if stored else zlib.decompressobj(-15).decompress(raw, member.file_size + 1)
        if zlib.crc32(content) != member.CRC:
            raise OSError(f"{name} is damaged (checksum)")
        return content

    def digest(self, i: int) -> bytes:
        return self.members[self.full[i]].CRC.to_bytes(4, "big")


def member_name(member: zipfile.ZipInfo) -> str:
    """A zip member's relative name: some writers use backslashes, a leading "./", or UTF-8 without saying so."""
    name = member.orig_filename.partition("\0")[0]
    if not member.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:
            pass
    name = name.replace("\\", "/")
    tail = "/" if name.endswith("/") else ""
    return "/".join(p for p in name.split("/") if p not in ("", ".", "..")) + tail


def data_offset(f: io.BufferedReader, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind the 30 fixed bytes of its local header, its name and its extra field."""
    f.seek(member.header_offset)
    name, extra = struct.unpack("<26xHH", f.read(30))
    return member.header_offset + 30 + name + extra

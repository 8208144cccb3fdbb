"""Change small valid files: bytes anywhere, and what lies behind checksums and lengths, so that readers get beyond them."""

from __future__ import annotations

import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

KINDS = ("cut", "bit", "byte", "drop", "repeat", "number", "digits", "token", "inside", "inside")
_INTEGERS = (
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    1 << 24,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
_DIGITS = (b"0", b"-1", b"1e999", b"nan", b"9" * 30, b"9" * 5000, b"0x7f", b"4294967296", b"1e-320", b"''", b"")
TOKENS = (
    b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"'", b'"', b"'''", b"\\", b"[" * 3000, b"{" * 3000, b"(" * 3000, b"a." * 3000,
    b"-" * 3000, b"\xf0\x9f\x98\x80", b"\xed\xa0\x80", b"[]", b"{}", b"null", b"NaN", b"\x1b[2J", b"x" * 20_000, b"PK\x05\x06",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, "", "x" * 20_000, "\ud800", "a\nb'\"\x1b", 0, -1, 1 << 31, 1 << 63, 1 << 200, 1e308, 1e-320, "nan", [], {}, [[]],
    [None], {"": None}, [[[[1]]]], {"a": {"b": {"c": []}}},
)  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """One change.

    Attributes:
        kind: of :data:`KINDS`.
        at, of: places as shares of the length, from 0 to 1.
        value: chooses among what may be put there.
    """

    kind: str
    at: float
    of: float
    value: int


def mutated(content: bytes, mutations: Sequence[Mutation], inside: Inside | None = None) -> bytes:
    """Apply changes one behind the other; ``inside`` opens a format for those of that kind."""
    for mutation in mutations:
        if mutation.kind == "inside" and inside is not None:
            try:
                content = inside(content, mutation)
            except Exception:  # what earlier changes made can no longer be opened
                content = _changed(content, mutation)
        else:
            content = _changed(content, mutation)
    return content


Inside = Callable[[bytes, Mutation], bytes]


def _changed(content: bytes, mutation: Mutation) -> bytes:
    if not content:
        return TOKENS[mutation.value % len(TOKENS)]
    at, of = int(mutation.at * len(content)), int(mutation.of * len(content))
    kind, value = mutation.kind, mutation.value
    length = 1 + value % 48
    if kind == "cut":
        return content[:at]
    if kind == "bit":
        return content[:at] + bytes([content[at] ^ (1 << value % 8)]) + content[at + 1 :]
    if kind == "byte":
        return content[:at] + bytes([value % 256]) + content[at + 1 :]
    if kind == "drop":
        return content[:at] + content[at + length :]
    if kind == "repeat":
        return content[:at] + content[of : of + length] * (1 + value % 3) + content[at:]
    if kind == "number":
        number, size = _INTEGERS[value % len(_INTEGERS)], (1, 2, 4, 8)[value // 16 % 4]
        return content[:at] + (number % (1 << 8 * size)).to_bytes(size, "little") + content[at + size :]
    if kind == "digits":
        places = list(re.finditer(rb"\d+(?:\.\d+)?", content))
        if places:
            place = places[int(mutation.at * len(places))]
            return content[: place.start()] + _DIGITS[value % len(_DIGITS)] + content[place.end() :]
    return content[:at] + TOKENS[value % len(TOKENS)] + content[at + (length if mutation.of < 0.5 else 0) :]


def _deeper(mutation: Mutation) -> Mutation:
    """Say what happens to the part that was chosen: another kind of change, at another place."""
    kinds = KINDS[:-2]
    return Mutation(kinds[mutation.value % len(kinds)], mutation.of, mutation.at, mutation.value // len(kinds))


def in_zip(content: bytes, mutation: Mutation) -> bytes:
    """Change one entry, or its name, with right checksums."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    chosen = int(mutation.at * len(entries))
    name, inner = entries[chosen]
    if mutation.value % 7 == 0:
        name = _changed(name.encode(), _deeper(mutation)).decode("utf-8", "replace")[:200].replace("\0", "_") or "x"
    elif name.endswith(".npy") and mutation.value % 2:
        inner = in_npy(inner, mutation)
    else:
        inner = _changed(inner, _deeper(mutation))
    entries[chosen] = (name, inner)
    if mutation.value % 11 == 0:
        entries.append(entries[chosen])
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if mutation.value % 5 == 0 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for key, data in entries:
            archive.writestr(zipfile.ZipInfo(key), data, method)
    return buffer.getvalue()


_TYPES = (
    "<f4",
    "<f8",
    ">f4",
    "<f2",
    "<c8",
    "|O",
    "<U9",
    "|S3",
    "<M8[s]",
    "|b1",
    "|V0",
    "<u8",
    "|u1",
    "<i8",
    "<f16",
    "[('a', '<f4')]",
)
_SHAPES = (
    "()",
    "(0,)",
    "(0, 3)",
    "(9,)",
    "(-1, 3)",
    "(9, 3, 1)",
    f"({1 << 40}, 3)",
    f"({1 << 63}, 0)",
    "(True, 3)",
    "(1.5,)",
    "3",
    f"({'1, ' * 70})",
)


def in_npy(content: bytes, mutation: Mutation) -> bytes:
    """Change the header of an array, its length corrected."""
    (size,) = struct.unpack_from("<H", content, 8)
    header, data = content[10 : 10 + size].rstrip(), content[10 + size :]
    if mutation.of < 0.4:
        header = re.sub(rb"'descr': '[^']*'", f"'descr': {_quoted(mutation.value)}".encode(), header)
    elif mutation.of < 0.8:
        shape = _SHAPES[mutation.value % len(_SHAPES)].encode()
        header = re.sub(rb"'shape': \([^)]*\)", b"'shape': " + shape, header)
    else:
        header = _changed(header, _deeper(mutation))[:60_000]
    header += b"\n"
    return content[:8] + struct.pack("<H", len(header)) + header + data


def _quoted(value: int) -> str:
    name = _TYPES[value % len(_TYPES)]
    return name if name[0] == "[" else repr(name)


def in_json(content: bytes, mutation: Mutation) -> bytes:
    """Exchange, add or remove something in a tree of JSON; of several lines the one that was chosen."""
    lines = content.split(b"\n") if content.count(b'{"key"') > 1 else [content]
    chosen = int(mutation.of * len(lines))
    tree = [json.loads(lines[chosen])]
    places: list[tuple[Any, Any]] = []
    level: list[Any] = [tree]
    while level:
        holder = level.pop()
        for key in list(holder) if isinstance(holder, dict) else range(len(holder)):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                level.append(holder[key])
    holder, key = places[int(mutation.at * len(places))]
    action = mutation.value % 4
    if action == 0 and isinstance(holder, dict):
        del holder[key]
    elif action == 1 and isinstance(holder, dict):
        holder[str(VALUES[mutation.value // 4 % len(VALUES)])[:99]] = holder[key]
    else:
        holder[key] = VALUES[mutation.value // 4 % len(VALUES)]
    lines[chosen] = json.dumps(tree[0] if tree else None).encode()
    return b"\n".join(lines)


def in_safetensors(content: bytes, mutation: Mutation) -> bytes:
    """Change the header, its length corrected."""
    (size,) = struct.unpack_from("<Q", content)
    header, data = content[8 : 8 + size], content[8 + size :]
    if mutation.value % 3:
        tree = json.loads(header)
        if mutation.value % 3 == 1:  # what no tree of texts and numbers holds by chance
            entry = tree[list(tree)[int(mutation.at * len(tree))]]
            if isinstance(entry, dict) and "dtype" in entry:
                entry["dtype"] = ("F64", "C64", "F8_E4M3", "F4", "BF16", "BOOL", "U64", "I4", "f32")[
                    mutation.value // 3 % 9
                ]
        header = json.dumps(tree).encode()
        header = header if mutation.value % 3 == 1 else in_json(header, mutation)
    else:
        header = _changed(header, _deeper(mutation))
    return struct.pack("<Q", len(header)) + header + data


def in_png(content: bytes, mutation: Mutation) -> bytes:
    """Change one chunk, its length and checksum corrected."""
    chunks, at = [], 8
    while at < len(content):
        (size,) = struct.unpack_from(">I", content, at)
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    chosen = int(mutation.at * len(chunks))
    kind, data = chunks[chosen]
    if kind == b"IDAT" and mutation.value % 2:
        data = zlib.compress(_changed(zlib.decompress(data), _deeper(mutation)))
    else:
        data = _changed(data, _deeper(mutation))
    chunks[chosen] = (kind, data)
    parts = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return content[:8] + b"".join(parts)


def in_onnx(content: bytes, mutation: Mutation) -> bytes:
    """Change one field of a message somewhere in a model."""
    model = onnx.load_model_from_string(content)
    messages: list[Any] = [model]
    for message in messages:
        for field, value in message.ListFields():
            if field.type == field.TYPE_MESSAGE:
                messages.extend([value] if hasattr(value, "ListFields") else value)
    message = messages[int(mutation.at * len(messages))]
    fields = [(field, value) for field, value in message.ListFields()]
    if not fields:
        return _changed(content, mutation)
    field, value = fields[int(mutation.of * len(fields))]
    several = not isinstance(value, str | bytes | int | float) and not hasattr(value, "ListFields")
    if field.type == field.TYPE_MESSAGE or mutation.value % 5 == 0:
        if several and mutation.value % 3 == 0:
            value.extend(list(value))
        elif several and mutation.value % 3 == 1:
            del value[int(mutation.at * len(value)) :]
        else:
            message.ClearField(field.name)
        return bytes(model.SerializeToString())
    if field.type == field.TYPE_STRING:
        new: Any = ("", "x" * 20_000, "a\nb'\"\x1b", "input", "ai.onnx.ml", "Loop", "[" * 3000, "1e999", "{}", "null")[
            mutation.value % 10
        ]
    elif field.type == field.TYPE_BYTES:
        new = _changed(bytes(value), _deeper(mutation)) if not several else b"\xff"
    elif field.type == field.TYPE_FLOAT:
        new = (0.0, float("nan"), float("inf"), -1.0, 1e-45)[mutation.value % 5]
    else:
        new = (0, 1, 2, -1, 3, 16, 99, (1 << 31) - 1, 7, 21)[mutation.value % 10]
        if field.type == field.TYPE_INT64 and mutation.value % 3 == 0:
            new = ((1 << 63) - 1, -(1 << 63), 1 << 40)[mutation.value % 3]
    if several:
        value[int(mutation.at * len(value))] = new
    else:
        setattr(message, field.name, new)
    return bytes(model.SerializeToString())


def in_table(content: bytes, mutation: Mutation) -> bytes:
    """Exchange one cell."""
    cells = re.split(rb"([,;\t\n])", content)
    chosen = int(mutation.at * len(cells))
    values = (
        b"",
        b" ",
        b"nan",
        b"inf",
        b"-1e999",
        b"1,5",
        b'"',
        b'"a\nb"',
        b"x" * 200_000,
        b"0x1F",
        b"1_000",
        b"\xc2\xb2",
        b"9" * 5000,
    )
    cells[chosen] = values[mutation.value % len(values)]
    return b"".join(cells)


def in_toml(content: bytes, mutation: Mutation) -> bytes:
    """Exchange one value."""
    places = list(re.finditer(rb"(?<== )[^\n#]+", content))
    values = (
        b"[]", b"{}", b"true", b"nan", b"-inf", b"1979-05-27", b"07:32:00", b'""', b"'''\n'''", b"9" * 5000, b"0x" + b"F" * 5000,
        b"1e400", b"-1", b"[1, 'a']", b"{a = {a = {a = 1}}}", b'"\\ud800"', b'"\\u0000"', b"1_0", b'"' + b"x" * 20_000 + b'"',
    )  # fmt: skip
    place = places[int(mutation.at * len(places))]
    return content[: place.start()] + values[mutation.value % len(values)] + content[place.end() :]

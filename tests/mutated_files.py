"""Seeded damage to files: bytes, values of JSON, headers of safetensors.

Each mutation takes the bytes of a file and a random generator, and returns other bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]
DEPTH = 3000


def cut(share: float) -> Mutation:
    return lambda content, random: content[: int(len(content) * share)]


def cut_anywhere(content: bytes, random: Random) -> bytes:
    return content[: random.randrange(len(content))]


def flip(number: int) -> Mutation:
    """`number` bytes are others than before."""

    def mutate(content: bytes, random: Random) -> bytes:
        changed = bytearray(content)
        for _ in range(number):
            changed[random.randrange(len(changed))] ^= random.randrange(1, 256)
        return bytes(changed)

    return mutate


def no_utf8(content: bytes, random: Random) -> bytes:
    place = random.randrange(len(content))
    return content[:place] + b"\xff\xfe\xc3\x28" + content[place:]


BYTES: dict[str, Mutation] = {
    "empty": cut(0),
    "cut to a tenth": cut(0.1),
    "cut to a half": cut(0.5),
    "cut by a byte": lambda content, random: content[:-1],
    "cut anywhere": cut_anywhere,
    "one byte flipped": flip(1),
    "30 bytes flipped": flip(30),
    "no UTF-8": no_utf8,
    "zeros": lambda content, random: bytes(len(content)),
    "noise": lambda content, random: random.randbytes(len(content)),
    "nested": lambda content, random: b"[" * 100_000,
    "twice": lambda content, random: content + content,
}

# JSON as text, as some of these no Python object stands for.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "text": '"x"',
    "zero": "0",
    "negative": "-7",
    "fraction": "0.5",
    "huge": "1" + "0" * 15,
    "huge fraction": "1e308",
    "beyond all floats": "9" * 400,
    "thousands of digits": "9" * 5000,
    "NaN": "NaN",
    "infinity": "-Infinity",
    "list": "[]",
    "object": "{}",
    "list of lists": '[["x", {"y": null}]]',
    "nested": "[" * DEPTH + "]" * DEPTH,
    "nested at the limit": '{"a":' * 400 + "1" + "}" * 400,
    "up": '"../../x"',
    "root": '"/etc/passwd"',
    "NUL": '"a\\u0000b"',
    "long": '"' + "n" * 5000 + '"',
    "half a character": '"\\ud800"',
    "lines": '"a\\nb\\u001b[2J"',
    "format": '"%s {0} {x!r} ("',
}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key of a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def _top(value: Any) -> list[tuple[Any, Any]]:
    return [(value, key) for key in value] if isinstance(value, dict) else []


def _chosen(value: Any, random: Random) -> tuple[Any, Any]:
    """A place: half the time at the top, where names of fields stand."""
    top = _top(value)
    return random.choice(top if top and random.random() < 0.5 else list(_places(value)))


def replace_value(text: str) -> Mutation:
    def mutate(content: bytes, random: Random) -> bytes:
        value = json.loads(content)
        holder, key = _chosen(value, random)
        holder[key] = "@@value@@"
        return json.dumps(value).replace('"@@value@@"', text).encode()

    return mutate


def rename(text: str) -> Mutation:
    """A key is called otherwise."""

    def mutate(content: bytes, random: Random) -> bytes:
        value = json.loads(content)
        names = [place for place in _places(value) if isinstance(place[0], dict)]
        holder, key = random.choice(names)
        holder["@@name@@"] = holder.pop(key)
        return json.dumps(value).replace('"@@name@@"', text).encode()

    return mutate


def drop(content: bytes, random: Random) -> bytes:
    value = json.loads(content)
    holder, key = _chosen(value, random)
    del holder[key]
    return json.dumps(value).encode()


def double(content: bytes, random: Random) -> bytes:
    """A key stands there twice; of two values JSON readers take the second."""
    value = json.loads(content)
    holder, key = random.choice([p for p in _places(value) if isinstance(p[0], dict)])
    holder["@@second@@"] = 17
    return json.dumps(value).replace('"@@second@@"', json.dumps(key)).encode()


JSON: dict[str, Mutation] = {
    **{f"value {name}": replace_value(text) for name, text in VALUES.items()},
    **{f"name {name}": rename(VALUES[name]) for name in ("up", "root", "NUL", "long", "lines")},
    "name half a character": rename(VALUES["half a character"]),
    "key dropped": drop,
    "key twice": double,
    "a list of it": lambda content, random: b"[" + content + b"]",
    "a number": lambda content, random: b"17",
}


def split_header(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_header(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def header_length(length: int) -> Mutation:
    return lambda content, random: length.to_bytes(8, "little") + content[8:]


def in_header(change: Mutation) -> Mutation:
    """`change` of the JSON in the header."""

    def mutate(content: bytes, random: Random) -> bytes:
        header, data = split_header(content)
        return join_header(change(json.dumps(header).encode(), random), data)

    return mutate


def of_a_tensor(**changes: Any) -> Mutation:
    """The header says something else of one tensor."""

    def mutate(content: bytes, random: Random) -> bytes:
        header, data = split_header(content)
        name = random.choice([name for name in header if name != "__metadata__"])
        header[name] = {**header[name], **changes}
        return join_header(json.dumps(header).encode(), data)

    return mutate


def other_numbers(content: bytes, random: Random) -> bytes:
    """All values are NaN, which no header tells."""
    header, data = split_header(content)
    return join_header(json.dumps(header).encode(), b"\xff" * len(data))


SAFETENSORS: dict[str, Mutation] = {
    "header of 2^63 bytes": header_length(1 << 63),
    "header longer than the file": header_length(1 << 30),
    "header of no bytes": header_length(0),
    "header shorter than it is": header_length(5),
    "offsets behind the end": of_a_tensor(data_offsets=[0, 1 << 40]),
    "offsets backwards": of_a_tensor(data_offsets=[64, 0]),
    "offsets below zero": of_a_tensor(data_offsets=[-64, 0]),
    "shape of 2^60 numbers": of_a_tensor(shape=[1 << 30, 1 << 30]),
    "shape beyond all": of_a_tensor(shape=[1 << 63, 1 << 63]),
    "no shape": of_a_tensor(shape=[]),
    "another shape": of_a_tensor(shape=[1, 1, 1]),
    "half as many numbers": of_a_tensor(dtype="F64"),
    "whole numbers": of_a_tensor(dtype="I32"),
    "unknown dtype": of_a_tensor(dtype="F7"),
    "four bits": of_a_tensor(dtype="F4"),
    "all NaN": other_numbers,
    "name up": in_header(rename(VALUES["up"])),
    "name NUL": in_header(rename(VALUES["NUL"])),
    "name half a character": in_header(rename(VALUES["half a character"])),
    "key dropped": in_header(drop),
    "key twice": in_header(double),
    "nested": in_header(lambda content, random: b'{"a":' * 5000 + b"1" + b"}" * 5000),
}


def write_mutated(file: Path, mutation: Mutation, seed: int) -> None:
    file.write_bytes(mutation(file.read_bytes(), Random(seed)))


def tree(folder: Path) -> dict[str, bytes | None]:
    """What lies below `folder`: the bytes of files, None for folders."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in found}

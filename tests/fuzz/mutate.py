"""Random changes: of JSON values, of bytes, of the files of a folder. The same seed makes the same change."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

# what readers of configurations and requests trip over
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31 - 1, 2**31, 2**32, 2**53 + 1, -(2**63), 2**64, 10**30, 10**400,
    0.0, -0.0, 0.5, 1e-320, 1e300, float("nan"), float("inf"), float("-inf"),
    "", "a", "0", "null", "\x00", "\ud800", "\U0001f600", "é" * 50, "a" * 5000, "../../etc/passwd", "%s%n", "{{ x }}",
    [], {}, [[]], [None], {"a": None}, {"": {}}, ["a", 1], [0] * 40,
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value, its own among them."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:200]:
        found += places(inner, (*at, key))
    return found


def any_value(rng: random.Random) -> Any:
    """A copy of one of VALUES: what is made of it later is no concern of the next input."""
    return copy.deepcopy(rng.choice(VALUES))


def change_value(rng: random.Random, value: Any) -> Any:
    """Another value in place of one."""
    if isinstance(value, bool) or rng.random() < 0.5:
        return any_value(rng)
    if isinstance(value, int):
        return value + rng.choice((-1, 1, value, -value - 1, 2**20))
    if isinstance(value, float):
        return value * rng.choice((-1, 0, 1e30, 1e-30))
    if isinstance(value, str) and value:
        i = rng.randrange(len(value))
        return value[:i] + rng.choice(("", "\x00", '"', "\\", "é", "\ud83d", value)) + value[i + rng.randrange(2) :]
    if isinstance(value, list) and value:
        return rng.choice((value * 3, value[:-1], [value], [*value, any_value(rng)]))
    return [value]


def change_json(rng: random.Random, value: Any, n: int | None = None) -> Any:
    """A copy with n random changes (default: one to three)."""
    value = json.loads(json.dumps(value))
    for _ in range(n or rng.randint(1, 3)):
        path = rng.choice(places(value))
        if not path:
            if rng.random() < 0.02:
                value = change_value(rng, value)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        how = rng.random()
        if how < 0.15:
            del holder[key]
        elif how < 0.25 and isinstance(holder, dict):
            holder[rng.choice(("", "a", key + "_", "\x00"))] = holder[key]
        elif how < 0.35:
            other: Any = value
            for step in rng.choice(places(value)):
                other = other[step]
            holder[key] = json.loads(json.dumps(other))
        else:
            holder[key] = change_value(rng, holder[key])
    return value


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """A copy with bytes changed, taken out, put in, or cut off."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        how = rng.random()
        if how < 0.4 and out:
            out[at % len(out)] = rng.choice(
                (0, 0xFF, 0x80, rng.randrange(256), out[at % len(out)] ^ (1 << rng.randrange(8)))
            )
        elif how < 0.6:
            del out[at : at + rng.randint(1, 16)]
        elif how < 0.8:
            out[at:at] = rng.randbytes(rng.randint(1, 16))
        elif how < 0.9:
            out[at:at] = out[: rng.randint(1, 64)]
        else:
            del out[at:]
    return bytes(out)


def dumps(value: Any) -> bytes:
    """JSON as bytes, with whatever cannot be written (surrogates) as it is escaped."""
    return json.dumps(value).encode()


def change_folder(rng: random.Random, folder: Path, names: list[str], good: dict[str, bytes]) -> str:
    """Change one of the files, and put the others back as they were. Returns what was changed."""
    for name, data in good.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != data:
            path.write_bytes(data)
    name = rng.choice(names)
    data = good[name]
    how = "bytes"
    if name.endswith(".json") and rng.random() < 0.9:
        (folder / name).write_bytes(dumps(change_json(rng, json.loads(data))))
        how = "values"
    elif name.endswith(".safetensors") and rng.random() < 0.9:
        length = int.from_bytes(data[:8], "little")
        header = dumps(change_json(rng, json.loads(data[8 : 8 + length])))
        (folder / name).write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
        how = "header"
    else:
        (folder / name).write_bytes(change_bytes(rng, data))
    if rng.random() < 0.01:
        (folder / name).unlink()
        how = "missing"
    return f"{name} ({how})"

"""TensorFlow's examples, the messages of protocol buffers that TFDS stores, read without either library."""

from __future__ import annotations

from collections.abc import Iterator


def parse(message: bytes) -> dict[str, list]:
    """The features of a TensorFlow example, integers or bytes; ValueError where it is none.

    It is a message of protocol buffers: example { features = 1 }, features { entry = 1 }, entry { name = 1,
    feature = 2 }, feature { bytes = 1, floats = 2, integers = 3 }, each of them { value = 1 }. Floats are left out.
    """
    found: dict[str, list] = {}
    for features in _parts(message, 1):
        for entry in _parts(features, 1):
            name = b"".join(_parts(entry, 1)).decode()
            values: list[bytes | int] = []
            for feature in _parts(entry, 2):
                values += [content for kind in _parts(feature, 1) for content in _parts(kind, 1)]
                values += [integer for kind in _parts(feature, 3) for integer in _integers(kind)]
            found[name] = values
    return found


def _parts(message: bytes, number: int) -> list[bytes]:
    """The fields of a message with this number, which must be bytes."""
    parts = []
    for found, value in _fields(message):
        if found == number:
            if not isinstance(value, bytes):
                raise ValueError("it is no TensorFlow example")
            parts.append(value)
    return parts


def _integers(message: bytes) -> Iterator[int]:
    """The integers of a list of them, each in a field of its own or packed into one; they are signed, of 64 bits."""
    for number, value in _fields(message):
        at, values = 0, [value] if isinstance(value, int) else []
        while isinstance(value, bytes) and at < len(value):
            one, at = _varint(value, at)
            values.append(one)
        if number == 1:
            yield from (value - 2**64 if value >= 2**63 else value for value in values)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError("it is no TensorFlow example")
        if at + size > len(message):
            raise ValueError("it is cut off")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at a position, seven bits a byte, and the position after it."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(message):
            raise ValueError("it is cut off")
        byte = message[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
    raise ValueError("it is no TensorFlow example")

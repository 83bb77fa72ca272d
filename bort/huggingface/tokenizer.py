"""A saved tokenizer as Hugging Face's tokenizer.json, and a tokenizer from such a file.

The file is written without the package that reads it, so that it gives our ids: `<s> A </s>` and
`<s> A </s> B </s>`. Hugging Face's own RoBERTa tokenizer puts two `</s>` between a pair, which no
model here was trained on; ours is therefore of the generic class, which AutoTokenizer loads. Only
a RoBERTa classifier of another program gets two back, if its tokenizer.json does not put one there.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from typing import (
    Any,
    Container,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Sequence,
    Union,
)

from bort.errors import UserError, quoted
from bort.files import WHOLE_BYTES, open_regular, read_json, read_json_as
from bort.huggingface.families import FAMILIES
from bort.huggingface.tensors import refuse_lfs_pointer
from bort.tokenization import (
    SPECIAL_TOKENS,
    ByteLevelBPE,
    Tokenizer,
    load_tokenizer_folder,
    read_merges,
    read_vocabulary,
    spelling_of,
)
from bort.types import JSONMapping, JSONObject
from bort.wordpiece import TOKENIZER_CONFIG, WORDPIECE_TOKENS

ModelProto = Any  # sentencepiece_model_pb2.ModelProto, which is made at import

JSON = "tokenizer.json"
SPECIAL_TOKENS_MAP, ADDED_TOKENS = "special_tokens_map.json", "added_tokens.json"
# The classes of transformers, without "Fast" at their end, that split texts as the tokenizers here
# do; those from the second line on are BERT's under other names. Others find the words of a text
# by a dictionary, for example.
_KNOWN_CLASSES = frozenset(
    f"{name}Tokenizer"
    for name in (
        *("Bert", "DistilBert", "Electra", "GPT2", "PreTrained", "Roberta"),
        *("ConvBert", "DPRContextEncoder", "DPRQuestionEncoder", "LayoutLM", "Lxmert"),
        *("MobileBert", "SqueezeBert"),
    )
) | {"TokenizersBackend"}
# Of these, those that give no token types unless their files say otherwise.
_WITHOUT_TYPES = ("DistilBertTokenizer", "GPT2Tokenizer", "RobertaTokenizer")

_SPACE = "▁"  # how SentencePiece writes a space
# The first character of a special token or a byte token. Hugging Face's unigram would find these
# tokens in a text; a split after the first character prevents it.
_SPECIAL_START = r"<(?=(?:s|/s|pad|unk|mask|0x[0-9A-F]{2})>)"
# SentencePiece's names for its rules of normalization that compose characters.
_COMPOSING = ("nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf")


def describe(
    folder: str,
    max_len: int,
    reads_special: bool,
    has_types: bool = False,
    separators: int = 1,
) -> JSONObject:
    """Return {name of a JSON file: content} for the tokenizer saved in a folder.

    reads_special: a mask in a text is the special token; else it is plain text, as here.
    has_types: the second text of a pair has token type 1.
    separators: how many stand between the texts of a pair.

    Raises `UserError` for a SentencePiece model that the format cannot express.
    """
    special, parts = _parts(folder)
    ids = _ids(parts["model"])
    added = {role: _added(token, role == "mask") for role, token in special.items()}
    roles = {f"{role}_token": token for role, token in special.items()}
    roles |= {"cls_token": special["bos"], "sep_token": special["eos"]}
    types = ["token_type_ids"] if has_types else []
    return {
        JSON: {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": sorted(
                ({"id": ids[each["content"]], **each} for each in added.values()),
                key=lambda token: token["id"],
            ),
            "post_processor": _template(ids, special, int(has_types), separators),
            **parts,
        },
        "tokenizer_config.json": {
            **_tokenizer_class(parts, has_types),
            "model_max_length": max_len,
            "model_input_names": ["input_ids", *types, "attention_mask"],
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": not reads_special,
            **roles,
            "mask_token": {**added["mask"], "__type": "AddedToken"},
        },
        "special_tokens_map.json": {**roles, "mask_token": added["mask"]},
    }


def _tokenizer_class(parts: JSONMapping, has_types: bool) -> JSONObject:
    """Return the class that loads the tokenizer, and what it has to be told of its normalizer.

    transformers.js gives token types to the classes of BERT alone.
    """
    if not has_types or parts["model"]["type"] != "WordPiece":
        return {"tokenizer_class": "PreTrainedTokenizerFast"}
    normalizer = parts["normalizer"]
    return {
        "tokenizer_class": "BertTokenizerFast",
        "do_lower_case": normalizer["lowercase"],
        "strip_accents": normalizer["strip_accents"],
        "tokenize_chinese_chars": normalizer["handle_chinese_chars"],
    }


def _parts(folder: str) -> tuple[Mapping[str, str], JSONObject]:
    """Return the special tokens of a saved tokenizer, and the parts of its tokenizer.json."""
    model = os.path.join(folder, "tokenizer.model")
    if os.path.exists(model):
        return SPECIAL_TOKENS, _sentencepiece_parts(model)
    if os.path.exists(os.path.join(folder, "vocab.json")):
        return SPECIAL_TOKENS, _byte_level_parts(folder)
    content = read_json(os.path.join(folder, JSON))
    names = ("normalizer", "pre_tokenizer", "decoder", "model")
    return WORDPIECE_TOKENS, {name: content[name] for name in names}


def _added(token: str, is_mask: bool) -> JSONObject:
    """Return how a special token is matched; the mask includes the space before it."""
    return {
        "content": token,
        "single_word": False,
        "lstrip": is_mask,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _template(
    ids: Mapping[str, int], special: Mapping[str, str], second_type: int, separators: int
) -> JSONObject:
    """Return the processor that makes `<s> A </s>` and `<s> A </s> B </s>`."""
    bos, eos = special["bos"], special["eos"]

    def token(content: str, type_id: int) -> JSONObject:
        return {"SpecialToken": {"id": content, "type_id": type_id}}

    first = [token(bos, 0), {"Sequence": {"id": "A", "type_id": 0}}, token(eos, 0)]
    between = [token(eos, 0)] * (separators - 1)
    second = [{"Sequence": {"id": "B", "type_id": second_type}}, token(eos, second_type)]
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": [*first, *between, *second],
        "special_tokens": {
            content: {"id": content, "ids": [ids[content]], "tokens": [content]}
            for content in (bos, eos)
        },
    }


def _ids(model: JSONMapping) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: index for index, (piece, _) in enumerate(vocabulary)}


# ---- byte-level BPE ----------------------------------------------------------------------------


def _byte_level_parts(folder: str) -> JSONObject:
    spelling = read_vocabulary(os.path.join(folder, "vocab.json"))
    merges = read_merges(os.path.join(folder, "merges.txt"))
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    model = _bpe(spelling, merges, unk_token=None, byte_fallback=False)
    return {"normalizer": None, "pre_tokenizer": byte_level, "decoder": byte_level, "model": model}


def _bpe(
    spelling: Sequence[str], merges: Sequence[str], unk_token: str | None, byte_fallback: bool
) -> JSONObject:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk_token,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": unk_token is not None,
        "byte_fallback": byte_fallback,
        "ignore_merges": False,
        "vocab": {token: index for index, token in enumerate(spelling)},
        "merges": list(merges),
    }


@dataclass(frozen=True)
class _AddedToken:
    content: str
    id: int


@dataclass(frozen=True)
class _PreTokenizer:
    type: str = ""
    add_prefix_space: Optional[bool] = None
    use_regex: Optional[bool] = True


@dataclass(frozen=True)
class _Config:
    """What is read of a tokenizer_config.json; None where an entry is missing."""

    add_prefix_space: Optional[bool] = None
    tokenizer_class: Optional[str] = None  # of config.json, too
    model_input_names: Optional[List[str]] = None


@dataclass(frozen=True)
class _Model:
    """The model of a tokenizer.json; `vocab` is a list for unigram models."""

    vocab: Union[Dict[str, int], List[Any]]
    type: str = ""
    merges: Sequence[Union[str, List[str]]] = ()


@dataclass(frozen=True)
class _TokenizerFile:
    """What is read of a tokenizer.json."""

    model: _Model
    pre_tokenizer: Optional[_PreTokenizer] = None
    normalizer: Any = None
    post_processor: Any = None
    added_tokens: Sequence[_AddedToken] = ()


def read_tokenizer(folder: str) -> Tokenizer:
    """Return the tokenizer of a folder: from its own files, or from tokenizer.json alone.

    Raises `UserError` when the folder has neither, a tokenizer of another kind, or one that finds
    further tokens in a text, or changes it, before it splits it.
    """
    tokenizer = _read_tokenizer(folder)
    is_bpe = tokenizer.name == ByteLevelBPE.name
    config_path, path = (os.path.join(folder, name) for name in (TOKENIZER_CONFIG, JSON))
    for name in (TOKENIZER_CONFIG, "config.json"):
        if os.path.exists(os.path.join(folder, name)):
            _refuse_class(name, read_json_as(os.path.join(folder, name), _Config))
    if is_bpe and os.path.exists(config_path):
        _refuse_prefix_space(TOKENIZER_CONFIG, read_json_as(config_path, _Config))
    if os.path.exists(path):
        file = read_json_as(path, _TokenizerFile)
        if is_bpe:
            _refuse_changes(file)
        for token in file.added_tokens:
            _refuse_added(JSON, token.content, tokenizer, file.model.vocab)
        if is_bpe and _bpe_of(file).fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{JSON} has another vocabulary, or other merges, than vocab.json and merges.txt; "
                f"delete these two if {JSON}, which transformers reads, is the model's"
            )
    spelling = tokenizer.tokens(range(tokenizer.vocab_size))
    for name in (TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP, ADDED_TOKENS):
        if os.path.exists(os.path.join(folder, name)):
            for content in _added_tokens(name, read_json(os.path.join(folder, name))):
                _refuse_added(name, content, tokenizer, spelling)
    return tokenizer


def _refuse_class(name: str, config: _Config) -> None:
    found = config.tokenizer_class
    if found is not None and re.sub("Fast$", "", found) not in _KNOWN_CLASSES:
        raise UserError(
            f"{name}: tokenizer_class is {quoted(found)}, which may split texts into other words; "
            f"expected one of {', '.join(sorted(_KNOWN_CLASSES))}"
        )


def _refuse_added(name: str, content: str, tokenizer: Tokenizer, known: Container[str]) -> None:
    """Raise `UserError` for a token of the file `name` that is none of the special ones.

    known: the vocabulary without what was added to it.
    """
    if content in tokenizer.special_tokens.values():
        return
    cure = "if no text has it, delete it there"
    if content not in known:  # it has an embedding, too
        cure = "convert a model without it"
    raise UserError(
        f"{name}: transformers finds the added token {quoted(content)} in a text, and the "
        f"tokenizers here do not; {cure}"
    )


def _added_tokens(name: str, content: Any) -> Iterator[str]:
    """Yield the tokens that a file beside the vocabulary makes transformers find in texts."""
    if not isinstance(content, dict):
        raise UserError(f"{name}: is not a JSON object")
    if name == ADDED_TOKENS:  # {token: id}
        yield from content
        return
    for key, value in content.items():
        if key in ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder"):
            several = value.values() if isinstance(value, dict) else value
            yield from map(_spelling, several if isinstance(several, Iterable) else ())
        elif key.endswith("_token") and isinstance(value, (str, dict)):
            yield _spelling(value)


def _spelling(token: Any) -> str:
    return str(token.get("content") if isinstance(token, dict) else token)


def gives_types(folder: str, family: str) -> bool:
    """Return whether transformers gives the second text of a pair type 1.

    family: decides the class of the tokenizer where no file names it.
    """
    paths = (os.path.join(folder, name) for name in (TOKENIZER_CONFIG, "config.json"))
    own, model = (
        read_json_as(path, _Config) if os.path.exists(path) else _Config() for path in paths
    )
    if _type_of_second_text(folder) == 0:
        return False
    if own.model_input_names is not None:
        return "token_type_ids" in own.model_input_names
    usual = f"{FAMILIES[family].class_name}Tokenizer"
    name = own.tokenizer_class or model.tokenizer_class or usual
    return re.sub("Fast$", "", name) not in _WITHOUT_TYPES


def has_one_separator(folder: str) -> bool:
    """Return whether tokenizer.json puts one token between two texts, as those written here do."""
    places = [place for place, _ in _texts_of_pair(_post_processor(folder))]
    return len(places) == 2 and places[1] - places[0] == 2


def _type_of_second_text(folder: str) -> Optional[int]:
    """Return the token type that tokenizer.json gives the second text; None if it does not say."""
    processor = _post_processor(folder)
    if processor.get("type") == "RobertaProcessing":
        return 0
    texts = [text for _, text in _texts_of_pair(processor)]
    return texts[1].get("type_id") if len(texts) == 2 else None


def _post_processor(folder: str) -> JSONObject:
    path = os.path.join(folder, JSON)
    processor = read_json_as(path, _TokenizerFile).post_processor if os.path.exists(path) else None
    return processor if isinstance(processor, dict) else {}


def _texts_of_pair(processor: JSONObject) -> list[tuple[int, JSONObject]]:
    """Return the place in the template of a pair, and the entry, of each of its texts."""
    pair = processor.get("pair")
    return [
        (place, part["Sequence"])
        for place, part in enumerate(pair if isinstance(pair, list) else [])
        if isinstance(part, dict) and isinstance(part.get("Sequence"), dict)
    ]


def _read_tokenizer(folder: str) -> Tokenizer:
    path = os.path.join(folder, JSON)
    for name in ("tokenizer.model", "vocab.json", "merges.txt", JSON, "vocab.txt"):
        if os.path.exists(os.path.join(folder, name)):
            refuse_lfs_pointer(os.path.join(folder, name))
    tokenizer = load_tokenizer_folder(folder)
    if tokenizer is not None:
        return tokenizer
    if not os.path.exists(path):
        raise UserError(
            f"no tokenizer: neither tokenizer.model, nor vocab.json, nor {JSON}, nor vocab.txt"
        )
    return _bpe_of(read_json_as(path, _TokenizerFile))


def _bpe_of(file: _TokenizerFile) -> ByteLevelBPE:
    try:
        return ByteLevelBPE(*_byte_level_content(file))
    except ValueError as error:
        raise UserError(f"{JSON}: {error}") from None


def _byte_level_content(file: _TokenizerFile) -> tuple[list[str], list[str]]:
    """Return the tokens by id and the merges of a tokenizer.json."""
    model, splitter = file.model, file.pre_tokenizer or _PreTokenizer()
    kinds = model.type, splitter.type
    if kinds != ("BPE", "ByteLevel") or isinstance(model.vocab, list):
        raise UserError(
            f"{JSON} is neither a byte-level BPE, RoBERTa's kind of tokenizer, nor a WordPiece, "
            "BERT's; a SentencePiece vocabulary needs its tokenizer.model beside it"
        )
    if splitter.add_prefix_space is None:
        raise UserError(f"{JSON}: its pre_tokenizer has no add_prefix_space")
    ids = {**model.vocab, **{token.content: token.id for token in file.added_tokens}}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.merges]
    return spelling_of(ids, JSON), merges


def _refuse_changes(file: _TokenizerFile) -> None:
    """Raise `UserError` for a byte-level BPE whose texts are changed before they are split."""
    splitter = file.pre_tokenizer or _PreTokenizer()
    _refuse_prefix_space(JSON, splitter)
    if file.normalizer is not None:
        raise UserError(f"{JSON} normalizes texts, which RoBERTa's tokenizer does not")
    if splitter.use_regex is False:
        raise UserError(f"{JSON}: use_regex is False; RoBERTa's tokenizer splits texts into words")


def _refuse_prefix_space(name: str, entries: Union[_Config, _PreTokenizer]) -> None:
    if entries.add_prefix_space:
        raise UserError(
            f"{name}: add_prefix_space is True: transformers puts a space before each text, and "
            "the tokenizers here do not"
        )


# ---- SentencePiece -----------------------------------------------------------------------------


def _sentencepiece_parts(path: str) -> JSONObject:
    """Return normalizer, splitter, decoder and model equivalent to a SentencePiece model."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at import
    with open_regular(path, WHOLE_BYTES) as handle:
        proto.ParseFromString(handle.read())
    _require_plain(path, proto)
    return {
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [_metaspace(), _split_special()]},
        "decoder": {
            "type": "Sequence",
            "decoders": [{"type": "ByteFallback"}, _metaspace()],
        },
        "model": _unigram(proto) if proto.trainer_spec.model_type == 1 else _merging(proto),
    }


def _require_plain(path: str, proto: ModelProto) -> None:
    """Raise `UserError` for a SentencePiece model that tokenizer.json cannot express."""
    rules = proto.normalizer_spec
    user_defined = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    across = [piece.piece for piece in proto.pieces if _SPACE in piece.piece[1:]]
    reasons = {
        "its pieces are words or characters": proto.trainer_spec.model_type not in (1, 2),
        "it marks spaces at the end of words": proto.trainer_spec.treat_whitespace_as_suffix,
        f"{user_defined[:1]} is user-defined": user_defined,
        f"{across[:1]} spans several words": across,
        "it does not normalize spaces as usual": not (
            rules.add_dummy_prefix and rules.remove_extra_whitespaces and rules.escape_whitespaces
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{path}: tokenizer.json cannot express this vocabulary: {reason}")


def _normalizer(rules: Any) -> JSONObject:
    """Return a NormalizerSpec of SentencePiece as a normalizer.

    Hugging Face's Precompiled does not compose a letter of three bytes with its marks: decomposed
    kana, Hangul and Vietnamese would get other ids. SentencePiece's own rules compose, too, but
    neither sort marks nor compose a letter that has one already: texts not in NFC may differ.
    """
    charsmap: bytes = rules.precompiled_charsmap
    steps: list[JSONObject] = [
        {"type": "Strip", "strip_left": False, "strip_right": True},
        {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
    ]
    if charsmap:
        encoded = base64.b64encode(charsmap).decode()
        steps.insert(0, {"type": "Precompiled", "precompiled_charsmap": encoded})
    if rules.name in _COMPOSING:
        steps.insert(0, {"type": "NFC"})
    return {"type": "Sequence", "normalizers": steps}


def _split_special() -> JSONObject:
    pattern = {"Regex": _SPECIAL_START}
    return {"type": "Split", "pattern": pattern, "behavior": "MergedWithPrevious", "invert": False}


def _metaspace() -> JSONObject:
    # Only the start of a text gets a space: what follows a <mask> has its own space or none.
    return {
        "type": "Metaspace",
        "replacement": _SPACE,
        "prepend_scheme": "first",
        "split": True,
    }


def _has_bytes(proto: ModelProto) -> bool:
    return any(piece.type == piece.BYTE for piece in proto.pieces)


def _unigram(proto: ModelProto) -> JSONObject:
    return {
        "type": "Unigram",
        "unk_id": proto.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in proto.pieces],
        "byte_fallback": _has_bytes(proto),
    }


def _merging(proto: ModelProto) -> JSONObject:
    """Return a BPE model with the merges of a SentencePiece model, which does not list them.

    SentencePiece merges the two neighbours whose union has the best score, so every split of a
    piece into two pieces is a merge, ordered by the score of the union.
    """
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    known = {piece.piece for piece in normal}
    merges = [
        f"{piece.piece[:cut]} {piece.piece[cut:]}"
        for piece in sorted(normal, key=lambda piece: -piece.score)
        for cut in range(1, len(piece.piece))
        if piece.piece[:cut] in known and piece.piece[cut:] in known
    ]
    return _bpe(
        [piece.piece for piece in proto.pieces], merges, SPECIAL_TOKENS["unk"], _has_bytes(proto)
    )

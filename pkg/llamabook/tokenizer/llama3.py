"""From the notebook ch02_llama2_to_llama3/02_tokenizer_and_chat.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import json
import re
from base64 import b64decode
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator
from pathlib import Path

from tiktoken import Encoding

from llamabook.errors import TokenizerError
from llamabook.files import why_unreadable

SPLIT_RULES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",  # the end of a contraction: it's, we'll
    r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space or another sign before it
    r"\p{N}{1,3}",  # up to three digits
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",  # signs, with a space before them and line breaks after them
    r"\s*[\r\n]+",  # line breaks, with white space before them
    r"\s+(?!\S)",  # other white space, but for the last of it before a word
    r"\s+",  # what is left of it
)
SPLIT = "|".join(SPLIT_RULES)

VISIBLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # Latin-1 has a sign for them
HIDDEN = sorted({*range(256)} - {*VISIBLE})  # white space, control codes, soft hyphen
BYTE_ORDER = VISIBLE + HIDDEN  # the bytes with the ranks 0 to 255
LETTERS = dict(zip([*map(chr, VISIBLE), *map(chr, range(256, 256 + len(HIDDEN)))], BYTE_ORDER))


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file, a line each: base64, a space, the rank. Else raises TokenizerError."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            token, fits = b64decode(token, validate=True), int(rank) == len(ranks)
        except ValueError:
            token, fits = b"", False
        if not fits or token in ranks:
            advice = "download it again" if ranks else "is it Llama 3's tokenizer.model?"
            raise TokenizerError(f"{path}, line {number}: no token with the rank {len(ranks)}: {advice}")
        ranks[token] = len(ranks)
    if any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path} is cut off: not all 256 bytes are among its tokens: download it again")
    return ranks


MOST_CHARACTERS, LONGEST_RUN = 400_000, 25_000  # as in Meta's code, so that cuts fall in the same places


def within_limits(text: str) -> Iterator[str]:
    """The text in parts that tiktoken can take: bounded, and so is each run with or without white space."""
    for start in range(0, len(text), MOST_CHARACTERS):
        part = text[start : start + MOST_CHARACTERS]
        runs = re.finditer(r"\s+|\S+", part) if len(part) > LONGEST_RUN else ()
        cuts = [i for run in runs for i in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN)]
        yield from (part[a:b] for a, b in zip([0, *cuts], [*cuts, len(part)]))


RESERVED = 256  # the special tokens there are
ENDS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # of a text, of a message to a tool, of a turn
NAMED = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1",
    "finetune_right_pad_id", "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id",
    "python_tag", "image",
)  # fmt: skip


def special_names() -> list[str]:
    """The names of the special tokens, in the order of their ids (Meta's, since Llama 3.2)."""
    rest = (f"reserved_special_token_{2 + i}" for i in range(RESERVED - len(NAMED)))
    return [f"<|{name}|>" for name in (*NAMED, *rest)]


class Llama3Tokenizer:
    """Text to token ids and back, as in Llama 3 (Grattafiori et al., 2024, section 3.2): byte-level BPE.

    Args: path, a ranks file (tokenizer.model), a tokenizer.json, or the folder of one; else TokenizerError.
    `special_tokens` has the id of each special token by its name; no text is ever encoded as one.
    """

    def __init__(self, path: str | Path):
        ranks, special = read_tokens(Path(path))
        self.encoding = Encoding("llama3", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
        self.ordinary = len(ranks)  # ids below are of text
        self.special_tokens, self.special_ids = special, set(special.values())
        self.vocab_size: int = max(self.special_ids) + 1
        self.bos_id: int = special["<|begin_of_text|>"]
        self.eos_id: int = special["<|end_of_text|>"]
        self.pad_id: int | None = special.get("<|finetune_right_pad_id|>")
        self.stop_tokens: set[int] = {special[name] for name in ENDS if name in special}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, between BOS and EOS if asked; "<|eot_id|>" in a text is letters like others."""
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"only text that UTF-8 can write has tokens: {error}") from None
        ids = [token_id for part in within_limits(text) for token_id in self.encoding.encode_ordinary(part)]
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: special tokens show by name, bytes that are no UTF-8 as U+FFFD."""
        return self.encoding.decode_bytes([self.check(i) for i in ids]).decode("utf-8", errors="replace")

    def check(self, token_id: int) -> int:
        """`token_id` as an int. Raises TokenizerError if the vocabulary does not have it."""
        if not 0 <= token_id < self.ordinary and int(token_id) not in self.special_ids:
            raise TokenizerError(f"token id {int(token_id)} is not among the {self.vocab_size} there are")
        return int(token_id)

    def streamer(self) -> "Llama3Streamer":
        """A decoder that takes one id at a time and shows no special tokens."""
        return Llama3Streamer(self)


def read_tokenizer_json(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of a tokenizer.json. Raises TokenizerError if it is not of Llama 3's kind."""
    try:
        content = json.loads(path.read_bytes())
        vocab, merges = content["model"]["vocab"], content["model"]["merges"]
        added = {token["content"]: int(token["id"]) for token in content["added_tokens"]}
        rule = json.dumps(content["pre_tokenizer"])
        if "<0x0A>" in vocab:
            raise TokenizerError(f"{path} is of Llama 2's kind: put that model's tokenizer.model beside it")
        kept = {token: rank for token, rank in vocab.items() if token not in added}
        ranks = {bytes(LETTERS[letter] for letter in token): rank for token, rank in kept.items()}
        joined = [vocab["".join(m.split(" ") if isinstance(m, str) else m)] for m in merges]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise TokenizerError(f"{path} is damaged or no byte-level tokenizer: download it again") from None
    if json.dumps(SPLIT) not in rule or content.get("normalizer") is not None:
        raise TokenizerError(f"{path} cuts text by other rules than Llama 3: use the library it was made for")
    ordered = sorted(ranks.values()) == list(range(len(ranks))) and joined == sorted(joined)
    if not ordered or any(bytes([byte]) not in ranks for byte in range(256)):
        raise TokenizerError(f"{path} has gaps in its ranks, or merges in another order: download it again")
    return dict(sorted(ranks.items(), key=lambda item: item[1])), added


def read_tokens(path: Path) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ranks and special tokens of `path`: a ranks file, a tokenizer.json, or the folder of one of them."""
    if path.is_dir():
        found = [path / name for name in ("tokenizer.model", "tokenizer.json") if (path / name).exists()]
        if not found:
            inside = ", ".join(sorted(file.name for file in path.iterdir())[:5]) or "nothing"
            raise TokenizerError(f"{path} has no tokenizer.model and no tokenizer.json (it holds {inside})")
        path = found[0]
    problem = why_unreadable(path)
    if problem:
        raise TokenizerError(f"{path} {problem}")
    with path.open("rb") as file:
        is_json = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    ranks, special = read_tokenizer_json(path) if is_json else (read_ranks(path), {})
    special = special or {name: len(ranks) + i for i, name in enumerate(special_names())}
    missing = [name for name in ("<|begin_of_text|>", "<|end_of_text|>") if name not in special]
    if missing or min(special.values()) < len(ranks):
        raise TokenizerError(f"{path} has not Llama 3's special tokens (such as <|begin_of_text|>)")
    return ranks, special


class Llama3Streamer:
    """Decodes one id at a time: pushes and flush together are `decode`, but for the special tokens' names."""

    def __init__(self, tokenizer: Llama3Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = getincrementaldecoder("utf-8")(errors="replace")  # keeps the bytes of half a character

    def push(self, token_id: int) -> str:
        """The characters that are complete now that `token_id` has come. A special token ends what waits."""
        token_id = self.tokenizer.check(token_id)
        if token_id in self.tokenizer.special_ids:
            return self.flush()
        return self.decoder.decode(self.tokenizer.encoding.decode_single_token_bytes(token_id))

    def flush(self) -> str:
        """The rest, when no id follows: U+FFFD if half a character still waits."""
        return self.decoder.decode(b"", final=True)

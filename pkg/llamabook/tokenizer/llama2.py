"""From the notebook ch01_gpt_to_llama2/03_tokenizer_and_weights.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llamabook.errors import TokenizerError
from llamabook.files import why_unreadable


def read_pieces(path: str | Path) -> SentencePieceProcessor:
    """The SentencePiece model in the file `path`. Raises TokenizerError if the file is none."""
    path = Path(path)
    problem = why_unreadable(path)
    if problem:
        raise TokenizerError(f"{path} {problem}")
    try:
        pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise TokenizerError(f"{path} is damaged or no SentencePiece model: download it again") from None
    if pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise TokenizerError(f"{path} has no <s> and </s>, so it is not Llama 2's: use the model's own file")
    return pieces


class Llama2Tokenizer:
    """Text to token ids and back, as in Llama 2 (Touvron et al., 2023, section 2.2).

    Decoding gives back what was encoded, with one exception: SentencePiece writes a space as "▁" (U+2581),
    so a "▁" in the text comes back as a space. Raises TokenizerError if `path` is no SentencePiece file.
    """

    def __init__(self, path: str | Path):
        self.pieces = pieces = read_pieces(path)
        self.bos_id: int = pieces.bos_id()
        self.eos_id: int = pieces.eos_id()
        self.pad_id: int | None = pieces.pad_id() if pieces.pad_id() >= 0 else None  # Llama 2 has none
        self.vocab_size: int = pieces.vocab_size()
        self.stop_tokens: set[int] = {self.eos_id}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, between BOS and EOS if asked; "<s>" in a text is three characters, not BOS."""
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"only text that UTF-8 can write has tokens: {error}") from None
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: BOS and EOS show as nothing, a byte that is no UTF-8 as U+FFFD."""
        return self.pieces.decode([self.check(token_id) for token_id in ids])

    def check(self, token_id: int) -> int:
        """`token_id` as an int. Raises TokenizerError if the vocabulary does not have it."""
        if not 0 <= int(token_id) < self.vocab_size:
            raise TokenizerError(f"token id {int(token_id)} is not among the {self.vocab_size} there are")
        return int(token_id)

    def streamer(self) -> "Llama2Streamer":
        """A decoder that takes one id at a time."""
        return Llama2Streamer(self)


def take_characters(waiting: bytearray, last: bool = False) -> str:
    """Remove from the front of `waiting` all characters that are complete, and return them.

    A byte that can't belong to any character becomes U+FFFD. With `last` no byte stays: what is not complete
    will never be.
    """
    text = ""
    while waiting:
        first = waiting[0]
        size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)  # the first byte says how many
        character = bytes(waiting[:size])
        may_grow = len(character) < size and all(0x80 <= byte < 0xC0 for byte in character[1:])
        if may_grow and not last:
            break
        try:
            text += character.decode("utf-8")
        except UnicodeDecodeError:
            text, size = text + "\ufffd", 1
        del waiting[:size]
    return text


class Llama2Streamer:
    """Decodes one id at a time: the pushes and the flush together are `decode` of all ids.

    Two things need memory: the bytes of a character that is not complete, and whether the space that
    SentencePiece puts before a text is still to be dropped.
    """

    def __init__(self, tokenizer: Llama2Tokenizer):
        self.tokenizer = tokenizer
        self.waiting = bytearray()
        self.at_start = True

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come: often a word, sometimes nothing."""
        pieces, token_id = self.tokenizer.pieces, self.tokenizer.check(token_id)
        piece = pieces.id_to_piece(token_id)
        if pieces.is_byte(token_id):
            self.waiting.append(int(piece[3:5], base=16))  # "<0xF0>" is the byte F0
            return self._shown(take_characters(self.waiting))
        before = self.flush()
        if pieces.is_unknown(token_id):
            return before + self._shown(pieces.decode([token_id]))
        if pieces.is_control(token_id):  # BOS and EOS
            return before
        if self.at_start and piece.startswith("▁"):
            self.at_start, piece = False, piece[1:]
        return before + self._shown(piece.replace("▁", " "))

    def flush(self) -> str:
        """The rest, when no id follows: a U+FFFD for every byte that still waits."""
        return self._shown(take_characters(self.waiting, last=True))

    def _shown(self, text: str) -> str:
        self.at_start = self.at_start and not text
        return text


TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def turns_of(messages: list[dict], complete: bool = False) -> list[str]:
    """What user and assistant say in turn, the system prompt folded into the first question (Meta's layout).

    Raises TokenizerError if a message holds a tag of the format or no text, or if the roles do not alternate
    and end with the user (with `complete`: the assistant).
    """
    for number, message in enumerate(messages, start=1):
        text = message.get("content")
        if not isinstance(text, str):
            raise TokenizerError(f"message {number} has no text: give it a string as its content")
        if tag := next((tag for tag in TAGS if tag in text), None):
            raise TokenizerError(f"message {number} holds {tag}, which only the format may write: remove it")
    roles, turns = [m.get("role") for m in messages], [m["content"] for m in messages]
    if roles[:1] == ["system"] and len(turns) > 1:
        roles, turns = roles[1:], [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}", *turns[2:]]
    last, pairs = ("assistant" if complete else "user"), ["user", "assistant"] * len(roles)
    if roles[-1:] != [last] or roles != pairs[: len(roles)]:
        raise TokenizerError(f"roles {roles} are not user and assistant in turn up to the {last}: fix them")
    return turns


class Llama2ChatFormat:
    """Messages to ids in the layout that Llama 2's chat models were trained on (Meta's `chat_completion`).

    Each exchange is "[INST] question [/INST] answer " between a BOS and an EOS of its own.
    """

    def __init__(self, tokenizer: Llama2Tokenizer):
        self.tokenizer = tokenizer
        self.bos_id = None  # `encode` adds BOS itself, as often as the layout wants it
        self.eos_id, self.stop_tokens = tokenizer.eos_id, tokenizer.stop_tokens
        self.vocab_size = tokenizer.vocab_size

    def encode(self, text: str) -> list[int]:
        """One message of the user, from BOS to where the answer begins."""
        return self.encode_dialog([{"role": "user", "content": text}])

    def encode_dialog(self, messages: list[dict], complete: bool = False) -> list[int]:
        """The ids of [{"role": ..., "content": ...}, ...]: perhaps a system message, then user and assistant.

        The user is last and the answer comes next; with `complete` (training) the assistant is last.
        Raises TokenizerError, see `turns_of`.
        """
        turns, ids = [turn.strip() for turn in turns_of(messages, complete)], []
        for question, answer in zip(turns[::2], turns[1::2]):
            ids += self.tokenizer.encode(f"[INST] {question} [/INST] {answer} ", bos=True, eos=True)
        if not complete:
            ids += self.tokenizer.encode(f"[INST] {turns[-1]} [/INST]", bos=True)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, tags included."""
        return self.tokenizer.decode(ids)

    def streamer(self) -> Llama2Streamer:
        """A decoder that takes one id at a time."""
        return self.tokenizer.streamer()

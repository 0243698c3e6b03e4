"""From the notebook ch01_gpt_to_llama2/03_tokenizer_and_weights.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

from collections.abc import Iterable
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llamabook.errors import TokenizerError
from llamabook.files import why_unreadable


def read_pieces(path: str | Path) -> SentencePieceProcessor:
    """The SentencePiece model in the file `path`. Raises TokenizerError if it can't be one."""
    path = Path(path)
    problem = why_unreadable(path)
    if problem:
        raise TokenizerError(f"{path} {problem}")
    try:
        pieces = SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise TokenizerError(f"{path} is not a SentencePiece model, or is cut off: Llama 2 needs its own") from None
    if pieces.bos_id() < 0 or pieces.eos_id() < 0:
        raise TokenizerError(f"{path} has no tokens <s> and </s>: it is not a tokenizer of the Llama 2 family")
    return pieces


class Llama2Tokenizer:
    """Text to token ids and back with SentencePiece, as Llama 2 does it (Touvron et al., 2023, section 2.2).

    Decoding returns the text that was encoded, but for one character: SentencePiece writes a space as U+2581, so a
    U+2581 in the text comes back as a space. Raises TokenizerError if `path` is not a SentencePiece file.
    """

    def __init__(self, path: str | Path):
        self.pieces = read_pieces(path)
        self.bos_id: int = self.pieces.bos_id()
        self.eos_id: int = self.pieces.eos_id()
        self.pad_id: int | None = self.pieces.pad_id() if self.pieces.pad_id() >= 0 else None  # Llama 2 has none
        self.vocab_size: int = self.pieces.vocab_size()
        self.stop_tokens: set[int] = {self.eos_id}

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """The ids of `text`, with BOS before and EOS behind if asked. "<s>" in a text is three characters, not BOS."""
        try:
            text.encode("utf-8")
        except (AttributeError, UnicodeEncodeError) as error:
            raise TokenizerError(f"only text that UTF-8 can write has tokens: {error}") from None
        return [self.bos_id] * bos + self.pieces.encode(text) + [self.eos_id] * eos

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`: BOS and EOS show as nothing, bytes that are not UTF-8 as U+FFFD each."""
        return self.pieces.decode([self.check(i) for i in ids])

    def check(self, token_id: int) -> int:
        """`token_id` as an int. Raises TokenizerError if the vocabulary has no such id."""
        if not 0 <= int(token_id) < self.vocab_size:
            raise TokenizerError(f"token id {int(token_id)} is outside the vocabulary of {self.vocab_size} tokens")
        return int(token_id)

    def streamer(self) -> "Llama2Streamer":
        """A decoder that takes one id at a time; see `Llama2Streamer`."""
        return Llama2Streamer(self)


class Llama2Streamer:
    """Decodes ids one by one and never shows half a character: all the pushes and the flush add up to `decode`.

    Two things need memory. A character outside the vocabulary arrives as 2 to 4 byte tokens, which wait for the last
    of them; and the first piece of a text loses the space that SentencePiece put in front.
    """

    def __init__(self, tokenizer: Llama2Tokenizer):
        self.tokenizer = tokenizer
        self.waiting = bytearray()  # the bytes of a character that is not complete yet
        self.at_start = True

    def push(self, token_id: int) -> str:
        """The text that is certain now that `token_id` has come: often a word, sometimes nothing."""
        pieces, token_id = self.tokenizer.pieces, self.tokenizer.check(token_id)
        if pieces.is_byte(token_id):
            self.waiting.append(int(pieces.id_to_piece(token_id)[3:5], base=16))  # "<0xF0>" is the byte F0
            return self._characters(complete=False)
        before, piece = self.flush(), ""
        if pieces.is_unknown(token_id):
            piece = pieces.decode([token_id])
        elif not pieces.is_control(token_id):
            piece = pieces.id_to_piece(token_id)
            if self.at_start and piece.startswith("▁"):
                self.at_start, piece = False, piece[1:]
        self.at_start = self.at_start and not piece
        return before + piece.replace("▁", " ")

    def flush(self) -> str:
        """The rest, when no id follows: a U+FFFD for every byte that still waits."""
        return self._characters(complete=True)

    def _characters(self, complete: bool) -> str:
        """The characters at the front of the waiting bytes; what could still become one stays, unless `complete`."""
        text = ""
        while self.waiting:
            first = self.waiting[0]
            size = 1 + (first >= 0xC0) + (first >= 0xE0) + (first >= 0xF0)  # UTF-8 says its length in its first byte
            character = bytes(self.waiting[:size])
            if not complete and len(character) < size and all(0x80 <= byte < 0xC0 for byte in character[1:]):
                break
            try:
                text += character.decode("utf-8")
            except UnicodeDecodeError:
                text, size = text + "\ufffd", 1
            del self.waiting[:size]
        self.at_start = self.at_start and not text
        return text


class Llama2ChatFormat:
    """Lays messages out as Llama 2's chat models were trained to read them (Meta's reference `chat_completion`).

    An exchange is "[INST] question [/INST] answer " between its own BOS and EOS; a system prompt goes inside the
    first question. `tokenizer` turns the pieces into ids.
    """

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def __init__(self, tokenizer: Llama2Tokenizer):
        self.tokenizer = tokenizer
        self.bos_id = None  # `encode` adds BOS itself
        self.eos_id, self.stop_tokens = tokenizer.eos_id, tokenizer.stop_tokens
        self.vocab_size, self.decode, self.streamer = tokenizer.vocab_size, tokenizer.decode, tokenizer.streamer

    def encode(self, text: str) -> list[int]:
        """One user message, BOS included, up to where the answer begins."""
        return self.encode_dialog([{"role": "user", "content": text}])

    def encode_dialog(self, messages: list[dict], complete: bool = False) -> list[int]:
        """The ids of messages [{"role": ..., "content": ...}]: an optional system one, then user and assistant in turn.

        A user's message is last, and the answer comes next; with `complete` the last is an assistant's (training).
        Raises TokenizerError for another order, and for a message that holds one of the format's own tags.
        """
        turns = self._turns(messages, complete)
        ids = []
        for question, answer in zip(turns[::2], turns[1::2]):
            text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
            ids += self.tokenizer.encode(text, bos=True, eos=True)
        if not complete:
            ids += self.tokenizer.encode(f"[INST] {turns[-1].strip()} [/INST]", bos=True)
        return ids

    def _turns(self, messages: list[dict], complete: bool) -> list[str]:
        """The contents in order, the system prompt folded into the first question. Raises TokenizerError."""
        roles = [message.get("role") for message in messages]
        turns = [message.get("content") for message in messages]
        for turn in turns:
            tag = next((tag for tag in self.TAGS if tag in (turn or "")), None)
            if tag or not isinstance(turn, str):
                what = f"contains {tag}, a tag of the format: take it out" if tag else "has no text in its content"
                raise TokenizerError(f"message {turns.index(turn) + 1} {what}")
        if roles[:1] == ["system"] and len(turns) > 1:
            roles = roles[1:]
            turns = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}", *turns[2:]]
        if not roles or len(roles) % 2 == complete or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
            last = "assistant" if complete else "user"
            raise TokenizerError(f"roles {roles} are not user and assistant in turn, ending with {last}: reorder them")
        return turns

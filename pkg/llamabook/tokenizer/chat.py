"""From the notebook ch02_llama2_to_llama3/02_tokenizer_and_chat.ipynb.

Written by tools/export.py: edit the notebook, not this file, then run `make export`.
"""

import re
from datetime import date

from llamabook.errors import TokenizerError
from llamabook.tokenizer.llama2 import Llama2ChatFormat
from llamabook.tokenizer.llama3 import Llama3Tokenizer

ROLES = ("system", "user", "assistant")


def messages_of(messages: list[dict], complete: bool = False) -> list[tuple[str, str]]:
    """Role and trimmed text of each message. Raises TokenizerError: an unknown role, no text, no message."""
    pairs = []
    for number, message in enumerate(messages, start=1):
        role, text = message.get("role"), message.get("content")
        if role not in ROLES:
            raise TokenizerError(f"message {number} has the role {role!r}: choose one of {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise TokenizerError(f"message {number} has no text: give it a string as its content")
        pairs.append((role, text.strip()))
    if not pairs:
        raise TokenizerError("a dialog without messages has nothing to answer: give at least one")
    if complete and pairs[-1][0] != "assistant":
        raise TokenizerError(f"a complete dialog ends with the assistant, not {pairs[-1][0]}: add the answer")
    return pairs


MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()  # strftime would ask for the locale


def with_date(pairs: list[tuple[str, str]], today: str | date) -> list[tuple[str, str]]:
    """Messages that begin with a system message, and that with the end of the training data and the day."""
    day = f"{today.day:02} {MONTHS[today.month - 1]} {today.year}" if isinstance(today, date) else today
    given, rest = (pairs[0][1], pairs[1:]) if pairs[0][0] == "system" else ("", pairs)
    return [("system", f"Cutting Knowledge Date: December 2023\nToday Date: {day}\n\n{given}"), *rest]


class ChatFormat(Llama2ChatFormat):
    """Messages to ids in the layout that Llama 3's instruct models were trained on.

    Args: today, None for Llama 3's plain layout; a date, or a text such as "26 Jul 2024", for that of 3.1,
    3.2 and 3.3, see `with_date`. Raises TokenizerError if the tokenizer lacks the control tokens.
    """

    def __init__(self, tokenizer: Llama3Tokenizer, today: str | date | None = None):
        super().__init__(tokenizer)
        needed = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        if missing := [name for name in needed if name not in tokenizer.special_tokens]:
            raise TokenizerError(f"the tokenizer has no {missing[0]}: give one of an instruct model")
        self.header, self.header_end, self.turn_end = (tokenizer.special_tokens[name] for name in needed)
        self.eos_id, self.today = self.turn_end, today

    def encode_dialog(self, messages: list[dict], complete: bool = False) -> list[int]:
        """The ids of [{"role": ..., "content": ...}, ...] from BOS to where the answer begins.

        Roles are system, user and assistant. With `complete` (training) the last message is the assistant's
        and nothing follows it. Raises TokenizerError, see `messages_of`.
        """
        pairs, ids = messages_of(messages, complete), [self.tokenizer.bos_id]
        for role, text in pairs if self.today is None else with_date(pairs, self.today):
            ids += self.start(role, text) + [self.turn_end]
        return ids if complete else ids + self.start("assistant")

    def start(self, role: str, text: str = "") -> list[int]:
        """The header of a message and its text, without the end of the turn."""
        name, body = self.tokenizer.encode(role), self.tokenizer.encode(f"\n\n{text}")
        return [self.header, *name, self.header_end, *body]


START = re.compile(r"<\|start_header_id\|>(\w+)<\|end_header_id\|>")
END = re.compile(r"<\|(?:eot_id|eom_id|end_of_text)\|>")


def clean_text(text: str, which: int = 0) -> str:
    """The assistant's words in a decoded text, without headers and special tokens.

    Args: which answer, where there are several: 0 the first, -1 the last. A text without a header is all
    answer. It sees names, not ids: where users write them, decode only the new ids.
    """
    before, *rest = START.split(text)  # text before the first header, then role and text in turn
    answers = [words for role, words in zip(rest[::2], rest[1::2]) if role == "assistant"]
    return END.split((answers or [before.removeprefix("<|begin_of_text|>")])[which])[0].strip()

"""`llamabook chat`, written by hand: a conversation in the terminal or through a pipe.

Answers go to stdout as they are drawn, all else to stderr. What was said is kept as long as it fits in the context.
"""

from collections.abc import Callable

from llamabook.cli.console import converse, show, stoppable, tell
from llamabook.cli.speak import Sampling, Speaker
from llamabook.errors import ContextError, InputError, LlamaBookError, TokenizerError

HELP = """/reset         forget what was said
/system TEXT   tell the model how to answer, from the next message on; without TEXT no more
/help          this list
/quit          end; so does Ctrl-D
Ctrl-C stops an answer. Any other line is a message."""


def talk(*, load: Callable[[], Speaker], system: str | None, sampling: Sampling) -> None:
    """Answer each line of stdin until it ends. From a pipe, a mistake ends the program; in a terminal it is told."""
    sampling.check()
    if sampling.max_new_tokens < 1:
        raise InputError("--max_new_tokens is 0: an answer needs 1 or more")
    speaker = load()
    talker = Talker(speaker, sampling)
    if system is not None:
        talker.memory.set_system(system)
    speaker.warm_up(talker.memory.encode("?", []), sampling)
    converse(talker.take, f"{speaker}. /help lists the commands.", end="Ctrl-D or /quit ends.")


class Memory:
    """The system message and the exchanges that still fit in the context.

    Args: layout, a chat format; context_length; room, how many tokens an answer should find free.
    """

    def __init__(self, layout, context_length: int, room: int):
        self.layout, self.context_length, self.room = layout, context_length, room
        self.system: str | None = None
        self.exchanges: list[tuple[str, str]] = []

    def set_system(self, text: str | None) -> None:
        """Begin every prompt with `text`. Raises TokenizerError or ContextError if it can't."""
        before, self.system = self.system, text or None
        try:
            self.encode("?", [])
        except LlamaBookError:
            self.system = before
            raise

    def encode(self, question: str, exchanges: list[tuple[str, str]]) -> list[int]:
        """The ids of the prompt. Raises ContextError if they leave no room for a token, TokenizerError."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in exchanges:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        ids = self.layout.encode_dialog([*messages, {"role": "user", "content": question}])
        if len(ids) >= self.context_length:
            both = "the message and the system message have" if self.system else "the message has"
            raise ContextError(f"{both} {len(ids)} tokens, the context only {self.context_length}: shorten it")
        return ids

    def prompt(self, question: str) -> tuple[list[int], int]:
        """The ids of the prompt, and how many of the oldest exchanges had to be forgotten. May raise as `encode`."""
        alone = self.encode(question, [])
        for forgotten in range(len(self.exchanges)):
            try:
                ids = self.encode(question, self.exchanges[forgotten:])
            except ContextError:
                continue
            if len(ids) + self.room <= self.context_length:
                del self.exchanges[:forgotten]
                return ids, forgotten
        forgotten = len(self.exchanges)
        self.exchanges.clear()
        return alone, forgotten

    def keep(self, question: str, answer: str) -> bool:
        """Remember an exchange, if there was an answer and the layout can hold it; tells whether it did."""
        if not answer.strip():
            return False
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            self.layout.encode_dialog(messages, complete=True)
        except TokenizerError:  # a tag of the layout in the answer
            return False
        self.exchanges.append((question, answer))
        return True


class Talker:
    """Takes one line after the other: a command, or a message that gets an answer."""

    def __init__(self, speaker: Speaker, sampling: Sampling):
        self.speaker, self.sampling, self.answers = speaker, sampling, 0
        room = min(sampling.max_new_tokens, speaker.context_length // 4)
        self.memory = Memory(speaker.chat, speaker.context_length, room)

    def take(self, line: str) -> bool:
        """Do what `line` asks for; False if it asks for the end. Raises LlamaBookError where it can't be done."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return True
        if not (word[0] == "/" and word[1:].isalpha()):
            self.answer(line.strip())
            return True
        match word:
            case "/quit" | "/exit":
                return False
            case "/help":
                tell(HELP)
            case "/reset":
                self.memory.exchanges.clear()
                tell("All that was said is forgotten.")
            case "/system":
                self.memory.set_system(rest.strip())
                tell("The system message is set." if rest.strip() else "There is no system message.")
            case _:
                raise InputError(f"there is no command {word}: /help lists those that exist")
        return True

    def answer(self, question: str) -> None:
        """Stream the answer to `question` and remember both. Ctrl-C ends the answer; what there is of it counts."""
        ids, forgotten = self.memory.prompt(question)
        if forgotten:
            what = "exchange is" if forgotten == 1 else f"{forgotten} exchanges are"
            tell(f"The context is full: the oldest {what} forgotten.")
        pieces: list[str] = []

        def write(text: str) -> None:
            pieces.append(text)
            show(text)

        note, number = None, self.answers
        self.answers += 1
        try:
            with stoppable():
                spoken = self.speaker.speak(ids, self.sampling, [write], number)
            if spoken.cut:
                note = "The context is full: the answer ends here."
            elif not spoken.ended:
                note = f"The answer ends after {spoken.tokens} tokens; --max_new_tokens allows more."
        except KeyboardInterrupt:
            note = "Stopped."
        show("\n")
        if note:
            tell(note)
        answer = "".join(pieces)
        if not self.memory.keep(question, answer) and answer.strip():
            tell("This exchange is not remembered: the answer holds a tag of the chat format.")

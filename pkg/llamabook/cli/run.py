"""`llamabook run`, written by hand: an embedded Llama tells a story, and the last line says what to do next."""

import shutil

from llamabook.cli.console import show
from llamabook.cli.speak import Sampling, Speaker, read_prompt


def tell(*, prompt: str, seed: int) -> None:
    """Stream one story on the CPU, then say how fast it was and where to go from here."""
    sampling = Sampling(max_new_tokens=10_000, seed=seed)  # more than the context holds
    sampling.check()
    prompt = read_prompt(prompt)
    speaker = Speaker(device="cpu")
    ids = speaker.encode(prompt, sampling.max_new_tokens)
    millions = sum(p.numel() for p in speaker.model.parameters()) / 1e6
    kind = "Llama " + speaker.name.removeprefix("pocket-llama")
    print(f"This is {speaker.name}: a {kind} with {millions:.1f} million parameters, built and trained in this book.\n")
    page = Page()
    spoken = speaker.speak(ids, sampling, [page.push], echo=True)
    page.flush()
    print(f"\n\n{speaker.name}: {spoken}")
    print("Next: open chapter 1 with 'make lab', or begin a story of your own:")
    print('  python -m llamabook generate --prompt "One rainy evening,"')


class Page:
    """Text that arrives in pieces, shown word by word and broken into lines that fit the terminal."""

    def __init__(self, width: int | None = None):
        self.width = width or min(shutil.get_terminal_size().columns - 1, 88)
        self.column = 0
        self.word = ""

    def push(self, text: str) -> None:
        """Take a piece of text; show the words that are now whole."""
        for character in text:
            if not character.isspace():
                self.word += character
                continue
            self.flush()
            if character == "\n":
                show("\n")
                self.column = 0

    def flush(self) -> None:
        """Show the word that is still open, on a new line if it does not fit on this one."""
        if not self.word:
            return
        room = self.column + 1 + len(self.word) <= self.width
        gap = "" if not self.column else " " if room else "\n"
        show(gap + self.word)
        self.column = len(self.word) + (self.column + 1 if gap == " " else 0)
        self.word = ""

"""Talk to a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from transformers import TextStreamer

from nybble.data.formats import Conversation, Message
from nybble.errors import DataError
from nybble.inference.pipeline import Answerer, Sampling

HELP = "Type a message; /new begins anew, /exit or Ctrl-D ends."


class Stream(TextStreamer):  # type: ignore[misc]
    """Print an answer as it is generated."""

    def __init__(self, answerer: Answerer, console: Console) -> None:
        super().__init__(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain not to change any more."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def answer_once(
    answerer: Answerer, conversation: Conversation, sampling: Sampling, console: Console, compare: bool
) -> str:
    """Stream one answer, after the base model's where they are compared; returns the tuned one."""
    if compare:
        console.print("base", style="bold yellow")
        with answerer.as_base():
            answerer.answer([conversation], sampling, Stream(answerer, console))
        console.print("tuned", style="bold green")
    (answer,) = answerer.answer([conversation], sampling, Stream(answerer, console))
    return answer


def talk(
    answerer: Answerer,
    sampling: Sampling,
    console: Console,
    *,
    system: str | None = None,
    compare: bool = False,
    read: Callable[[str], str] = input,
) -> None:
    """Several turns, until end of input; Ctrl-C ends an answer, not the conversation."""
    console.print(HELP, style="dim")
    opening: Conversation = (Message("system", system),) if system else ()
    history = opening
    while True:
        try:
            line = read("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line in ("/exit", "/quit"):
            return
        if line == "/new":
            history = opening
            continue
        if not line:
            continue
        asked = (*history, Message("user", line))
        try:
            answer = answer_once(answerer, asked, sampling, console, compare)
        except KeyboardInterrupt:
            console.print("\n(stopped)", style="dim")
            continue
        except DataError as fault:  # a control word of the template
            console.print(str(fault), style="red", markup=False)
            continue
        history = (*asked, Message("assistant", answer)) if answer else history

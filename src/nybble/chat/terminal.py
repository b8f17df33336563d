"""Talk to a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console
from rich.text import Text

from nybble.chat.answerer import Answerer, Continuation, Sampling
from nybble.chat.text import TextStream
from nybble.data.rows.formats import Conversation, Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import DataError
from nybble.generate.request import Token
from nybble.terminal import tell

HELP = (
    "Type a message. /new starts a new chat; /system shows the system message, /system TEXT replaces it, /system off "
    "removes it; /exit or Ctrl-D quits. To send a message that begins with /, put a space before it."
)
COMMANDS = ("/new", "/system", "/help", "/exit", "/quit")
Side = Literal["base", "tuned"]
STYLES: dict[Side, str] = {"base": "bold yellow", "tuned": "bold green"}
LONGEST_SHOWN = 300  # characters of a system message


class AnswerPrinter:
    """Prints an answer as it is generated."""

    def __init__(self, answerer: Answerer, console: Console) -> None:
        self._stream = TextStream(answerer.tokenizer, strip=False)
        self._console = console

    def on_token(self, _: int, token: Token) -> None:
        """Print the text that is certain after one more token."""
        self._print(self._stream.push(token))

    def end(self) -> None:
        """Print what is left, and end the line."""
        self._print(self._stream.end() + "\n")

    def _print(self, text: str) -> None:
        self._console.print(text, end="", markup=False, emoji=False, highlight=False, soft_wrap=True)


def answer_once(
    answerer: Answerer,
    conversations: Mapping[Side, Conversation],
    sampling: Sampling,
    console: Console,
    remarks: Console | None = None,
) -> dict[Side, str]:
    """Stream one answer per model.

    Args:
        conversations: by the model that answers: tuned, and base before it where they are compared.
        remarks: where to print that an answer was cut off; None for the console.

    Returns:
        The answers, by model.
    """
    answers: dict[Side, str] = {}
    for side, conversation in conversations.items():
        if len(conversations) > 1:
            console.print(side, style=STYLES[side])
        continuation = _answer(answerer, side, conversation, sampling, console)
        if not continuation.ended:
            limit = sampling.max_new_tokens
            line = f"(cut off after {limit} {'token' if limit == 1 else 'tokens'}; --max-new-tokens allows more)"
            tell(remarks or console, Text(line, "dim"), hang=1)
        answers[side] = continuation.text
    return answers


def opening(answerer: Answerer, system: str | None) -> Conversation:
    """The system message before a chat: what was asked for, else the one that the run was trained with."""
    text = answerer.system if system is None else system
    return (Message("system", text),) if text else ()


def sides(compare: bool) -> tuple[Side, ...]:
    """The models that answer."""
    return ("base", "tuned") if compare else ("tuned",)


def talk(
    answerer: Answerer,
    sampling: Sampling,
    console: Console,
    *,
    system: str | None = None,
    compare: bool = False,
    read: Callable[[str], str] = input,
) -> None:
    """Several turns, until end of input; Ctrl-C ends an answer, not the conversation.

    Args:
        system: the system message; None for the one that the run was trained with, empty for none.
        compare: the base answers before the tuned model, each in a conversation of its own.
    """
    tell(console, Text(HELP, "dim"), hang=2)
    chat = _Chat(answerer, sampling, console, sides(compare), opening(answerer, system))
    if system is None and answerer.system:
        chat.show_system()
    while True:
        try:
            line = read("you> ")
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        if line.startswith("/") and "/" not in word[1:]:  # a path is a message
            if word in ("/exit", "/quit"):
                return
            chat.run_command(word, line.removeprefix(word).strip())
        elif word:
            chat.ask(line.strip())


@dataclass
class _Chat:
    answerer: Answerer
    sampling: Sampling
    console: Console
    sides: Sequence[Side]
    opening: Conversation
    histories: dict[Side, Conversation] = field(default_factory=dict)
    """By model: each continues from its own answers."""

    def run_command(self, command: str, text: str) -> None:
        if command == "/new":
            self.histories = {}
        elif command == "/system" and not text:
            self.show_system()
        elif command == "/system":
            self.opening = () if text == "off" else (Message("system", text),)
            self.histories = {}
            tell(
                self.console,
                Text("a new chat, " + ("with" if self.opening else "without") + " a system message", "dim"),
            )
        elif command == "/help":
            tell(self.console, Text(HELP, "dim"), hang=2)
        else:
            tell(
                self.console,
                Text(f"there is no command {command}; the commands are {', '.join(COMMANDS)}", "red"),
                hang=2,
            )

    def show_system(self) -> None:
        if not self.opening:
            tell(self.console, Text("no system message", "dim"))
            return
        text = self.opening[0].content
        whose = "the training rows'" if text == self.answerer.system else "your"
        shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."
        tell(self.console, Text(f"{whose} system message: {shown}", "dim"), hang=2)

    def ask(self, message: str) -> None:
        question = Message("user", message)
        conversations = {side: (*self.histories.get(side, self.opening), question) for side in self.sides}
        try:
            answers = answer_once(self.answerer, conversations, self.sampling, self.console)
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", style="dim")
            return
        except DataError as fault:  # a control word of the template
            self.console.print(str(fault), style="red", markup=False)
            return
        for side, answer in answers.items():
            if answer:
                self.histories[side] = (*conversations[side], Message("assistant", answer))


def _answer(
    answerer: Answerer, side: Side, conversation: Conversation, sampling: Sampling, console: Console
) -> Continuation:
    prompt, printer = encode_prompt(answerer.template, conversation), AnswerPrinter(answerer, console)
    (continuation,) = answerer.complete([prompt], sampling, base=side == "base", on_token=printer.on_token)
    printer.end()
    return continuation

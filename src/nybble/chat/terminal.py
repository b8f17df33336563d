"""Talk to a run in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text
from transformers import TextStreamer

from nybble.chat.answerer import Answerer, Completion, Sampling
from nybble.data.rows.formats import Conversation, Message
from nybble.data.text.tokens import encode_prompt
from nybble.errors import DataError
from nybble.terminal import tell

HELP = (
    "Type a message. /new starts a new chat; /system shows the system message, /system TEXT replaces it, /system off "
    "removes it; /exit or Ctrl-D quits. To send a message that begins with /, put a space before it."
)
COMMANDS = ("/new", "/system", "/help", "/exit", "/quit")
STYLES = {"base": "bold yellow", "tuned": "bold green"}
SHOWN = 300  # characters of a system message


class Stream(TextStreamer):  # type: ignore[misc]
    """Print an answer as it is generated."""

    def __init__(self, answerer: Answerer, console: Console) -> None:
        super().__init__(answerer.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.console = console

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write what is certain not to change any more."""
        self.console.print(text, end="\n" if stream_end else "", markup=False, highlight=False, soft_wrap=True)


def answer_once(
    answerer: Answerer,
    conversations: Mapping[str, Conversation],
    sampling: Sampling,
    console: Console,
    remarks: Console | None = None,
) -> dict[str, str]:
    """Stream one answer each.

    Args:
        conversations: by who is to answer: tuned, and base before it where they are compared.
        remarks: where an answer that was cut off is said to be; None for the console.

    Returns:
        The answers, by who gave them.
    """
    answers = {}
    for who, conversation in conversations.items():
        if len(conversations) > 1:
            console.print(who, style=STYLES[who])
        with answerer.as_tuned(who == "tuned"):
            completion = _answer(answerer, conversation, sampling, console)
        if not completion.ended:
            line = f"(cut off after {sampling.max_new_tokens} tokens; --max-new-tokens allows more)"
            tell(remarks or console, Text(line, "dim"), hang=1)
        answers[who] = completion.text
    return answers


def opening(answerer: Answerer, system: str | None) -> Conversation:
    """The system message before a chat: what was asked for, else the one that the run was trained with."""
    text = answerer.system if system is None else system
    return (Message("system", text),) if text else ()


def speakers(compare: bool) -> tuple[str, ...]:
    """Who answers."""
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
    chat = _Chat(answerer, sampling, console, speakers(compare), opening(answerer, system))
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
            chat.obey(word, line.removeprefix(word).strip())
        elif word:
            chat.ask(line.strip())


@dataclass
class _Chat:
    answerer: Answerer
    sampling: Sampling
    console: Console
    speakers: Sequence[str]
    opening: Conversation
    histories: dict[str, Conversation] = field(default_factory=dict)
    """Of each speaker: what it answered itself is what it goes on from."""

    def obey(self, command: str, text: str) -> None:
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
        of = "the training rows'" if text == self.answerer.system else "your"
        shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
        tell(self.console, Text(f"{of} system message: {shown}", "dim"), hang=2)

    def ask(self, message: str) -> None:
        asked = {who: (*self.histories.get(who, self.opening), Message("user", message)) for who in self.speakers}
        try:
            answers = answer_once(self.answerer, asked, self.sampling, self.console)
        except KeyboardInterrupt:
            self.console.print("\n(stopped)", style="dim")
            return
        except DataError as fault:  # a control word of the template
            self.console.print(str(fault), style="red", markup=False)
            return
        for who, answer in answers.items():
            if answer:
                self.histories[who] = (*asked[who], Message("assistant", answer))


def _answer(answerer: Answerer, conversation: Conversation, sampling: Sampling, console: Console) -> Completion:
    prompt = encode_prompt(answerer.template, conversation)
    (completion,) = answerer.complete([prompt], sampling, Stream(answerer, console))
    return completion

"""From rows of every form to conversations."""

from nybble.data.rows.formats.conversation import Conversation, EmptyAnswerError, Message, Rules
from nybble.data.rows.formats.forms import Forms, detect_forms

__all__ = ["Conversation", "EmptyAnswerError", "Forms", "Message", "Rules", "detect_forms"]

"""From rows of every form to conversations."""

from nybble.data.rows.formats.conversation import Conversation, EmptyAnswerError, Message, Role, Rules
from nybble.data.rows.formats.forms import Forms, detect_forms

__all__ = ["Conversation", "EmptyAnswerError", "Forms", "Message", "Role", "Rules", "detect_forms"]

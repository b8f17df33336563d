"""From rows of every form to conversations, some of them judged."""

from nybble.data.rows.formats.conversation import Conversation, EmptyAnswerError, Message, Role, Rules
from nybble.data.rows.formats.forms import Forms, detect_forms
from nybble.data.rows.formats.preferences import TARGETS, Judged, Target

__all__ = [
    "TARGETS",
    "Conversation",
    "EmptyAnswerError",
    "Forms",
    "Judged",
    "Message",
    "Role",
    "Rules",
    "Target",
    "detect_forms",
]

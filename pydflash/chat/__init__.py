"""Messages into tokens, and a model's answer back into a message: chat templates, thinking, tool calls."""

from pydflash.chat.answer import AnswerDelta, AnswerStream
from pydflash.chat.template import ChatTemplate

__all__ = ["AnswerDelta", "AnswerStream", "ChatTemplate"]

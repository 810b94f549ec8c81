"""Messages into tokens, and a model's answer back into a message: chat templates, thinking, tool calls."""

from pydflash.chat.template import ChatTemplate

__all__ = ["ChatTemplate"]

"""The web demo: drop a picture, see what a detector finds in it.

``vitadapter-zoo serve`` starts it, and ``build`` gives the same app for a Space. It needs the extra
``web`` (Gradio).
"""

from vitadapter_zoo.web.app import build, launch

__all__ = ["build", "launch"]

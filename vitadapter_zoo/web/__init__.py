"""The web demo: a page that shows the objects a detector finds in a picture.

``vitadapter-zoo serve`` starts it, and ``build`` gives the same app for a Space. It needs the extra
``web`` (Gradio).
"""

from vitadapter_zoo.web.app import build, launch

__all__ = ["build", "launch"]

"""What pages made with gradio need before they start, whichever program shows them."""

from __future__ import annotations

import os

from .errors import how_to_install


def load_gradio(page: str) -> None:
    """Imports gradio, which then reports nothing to anybody. Raises ImportError that says what
    `page` lacks, or why gradio does not load."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        import gradio  # noqa: F401
    except ModuleNotFoundError as error:
        hint = how_to_install("serve")
        raise ImportError(f"{page} needs the packages of the extra `serve`: {hint}") from error
    except ImportError as error:  # a SOCKS proxy in the environment without its package, for one
        raise ImportError(f"{page} needs gradio, which does not load here: {error}") from error


def no_proxy_for(host: str) -> None:
    """Keeps gradio, which asks the page whether it has started, from asking a proxy instead. What
    goes to other places, to the moderation service for one, still uses it."""
    spared = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    own = ("localhost", "127.0.0.1", "::1", host)
    os.environ["no_proxy"] = ",".join(filter(None, dict.fromkeys([*spared.split(","), *own])))

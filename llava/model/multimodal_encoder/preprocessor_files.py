"""Where a checkpoint says how images are prepared."""

from __future__ import annotations

import os

from ...config_file import read_json

#: the second is what later versions of transformers write in place of the first: the settings of
#: all that prepares inputs
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"


def image_settings(folder: str) -> tuple[str, dict]:
    """The file in a local folder that says how images are prepared, and what it says; {} beside the
    name of the first where there is none."""
    own, all_in_one = (os.path.join(folder, name) for name in (PREPROCESSOR, PROCESSOR))
    if os.path.isfile(own):
        return own, read_json(own)
    inner = read_json(all_in_one).get("image_processor") if os.path.isfile(all_in_one) else None
    return (all_in_one, inner) if isinstance(inner, dict) else (own, {})

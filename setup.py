"""The long description: README.md, whose links lead somewhere on an index, too. All else is in pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).resolve().parent
PLACE = "https://github.com/kvjax/kvjax/blob/main/"
PICTURE = "https://raw.githubusercontent.com/kvjax/kvjax/main/"


def absolute(text: str) -> str:
    """The text, where a relative link leads into the repository, and a relative picture is taken from it."""
    text = re.sub(r"(!\[[^\]]*\]\()(?![a-z]+:|#|/)", rf"\1{PICTURE}", text)
    text = re.sub(r"(<img[^>]* src=\")(?![a-z]+:|/)", rf"\1{PICTURE}", text)
    return re.sub(r"(?<=\]\()(?![a-z]+:|#|/)", PLACE, text)


setup(long_description=absolute((HERE / "README.md").read_text("utf-8")), long_description_content_type="text/markdown")

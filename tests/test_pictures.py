"""The pictures in the README show what the pages look like now."""

import pictures
import pytest
from workflow import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pictures_show_the_pages_as_they_are():
    assert pictures.changed() == [], "the look of the pages has changed: make pictures"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_small_and_in_the_readme(name):
    path = pictures.FOLDER / name
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size <= pictures.LARGEST
    assert f"](tests/screenshots/{name})" in README

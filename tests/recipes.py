"""What the images are made of."""

import re

from workflow import ROOT


def recipe(name: str) -> str:
    return (ROOT / "containers" / name).read_text()


def files_of_definition(name: str) -> set[str]:
    """What %files copies into the image."""
    section = re.search(r"^%files\n((?: .*\n|\n)*)", recipe(name), re.MULTILINE)[1]
    return {line.split()[0] for line in section.splitlines() if line.strip() and not line.strip().startswith("#")}


def files_of_dockerfile(name: str) -> set[str]:
    return {path for line in re.findall(r"^COPY (.*) \S+$", recipe(name), re.MULTILINE) for path in line.split()}

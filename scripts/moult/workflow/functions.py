"""The functions that rules hand to Snakemake."""

import inspect
from collections.abc import Callable


def known(function: Callable) -> Callable:
    """The function, which also knows its parameters.

    Snakemake (9.27, common/__init__.py:372) looks at the parameters of each function for each job, which takes longer than to
    call it: some 2 of 30 s of a dry run over 1,000 datasets. It does not look further where they are known.
    """
    function.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    return function

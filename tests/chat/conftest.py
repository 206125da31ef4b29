"""A Chat to try templates and conversations on."""

import pytest
from tokenizers_for_tests import CHATML, make_tokenizer

from moult.model.chat import Chat


@pytest.fixture
def make(tmp_path):
    """A Chat with the demo's tokenizer, or one like it."""

    def make(template: str | None = CHATML, kwargs: dict | None = None, **tokenizer) -> Chat:
        return Chat(str(make_tokenizer(tmp_path / "model", **tokenizer)), template, kwargs)

    return make

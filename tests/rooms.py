"""The rooms of the library, for the tests of their walls and of the page that describes them."""

# Who may import whom. A room may always import itself, `moult/*.py` and `run`.
MAY_IMPORT = {
    "run": set(),
    "workflow": {"data"},  # which files a source means
    "data": {"model"},  # labels need the template and the tokenizer
    "model": set(),
    "training": {"data", "measuring", "model"},
    "measuring": {"data", "model"},
    "exporting": {"data", "model", "workflow"},
    "pages": {"measuring"},
    "serving": {"data", "measuring", "model", "workflow"},
}

"""Run one of llama.cpp's converters, with a name for the tokenizer if it does not know that.

    python convert.py <folder of llama.cpp> <name or ""> <converter> <its arguments>

A process of its own: the converters are programs, and their package `gguf` has the name of a module beside this one.
"""

import runpy
import sys
from pathlib import Path

# Printed where the name is used, or where there is none.
UNKNOWN = "moult: the converter does not know the tokenizer"


def main() -> None:
    folder, name, converter, *arguments = sys.argv[1:]
    sys.path[:1] = [folder, str(Path(folder) / "gguf-py")]
    from conversion.base import TextModel

    by_hash = TextModel.get_vocab_base_pre

    # It knows a tokenizer by a hash of the ids that a text gets, so it knows no vocabulary that somebody has made.
    def get_vocab_base_pre(self, tokenizer):
        try:
            return by_hash(self, tokenizer)
        except NotImplementedError:
            if not name:
                sys.exit(UNKNOWN)
            print(UNKNOWN, flush=True)
            return name

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = [str(Path(folder) / converter), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()

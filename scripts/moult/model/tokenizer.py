"""The tokenizer of a model folder, and the tokens that end its answers."""

from pathlib import Path

from moult.errors import MoultError
from moult.files import read_json


def load_tokenizer(folder: str, trust_remote_code: bool = False):
    """The tokenizer in a model folder. Raises MoultError where there is none that is whole."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError, or what tokenizers raises
        if not (Path(folder) / "tokenizer.json").exists():
            raise MoultError(f"{folder}: no tokenizer.json, and nothing to make one of", "add the tokenizer") from error
        raise MoultError(
            f"{folder}: no tokenizer can be loaded: {str(error).splitlines()[0]}", "download or copy the model again"
        ) from error
    if not tokenizer.is_fast:
        raise MoultError(
            f"{folder}: the tokenizer has no tokenizer.json",
            "convert it: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    return tokenizer


def stop_ids(folder: str, tokenizer) -> set[int]:
    """The tokens that end generation: the tokenizer's EOS and those of the generation config."""
    # Without a generation config transformers and vLLM make one of the model's.
    paths = [Path(folder) / name for name in ("generation_config.json", "config.json")]
    path = next((path for path in paths if path.exists()), None)
    own = read_json(path).get("eos_token_id") if path else None
    ids = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return {id for id in ids if id is not None}

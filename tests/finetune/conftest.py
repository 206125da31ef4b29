"""What finetune reads, made once for each file of tests, and a run that nothing has disturbed."""

import pytest
from finetuning import Run, settings, tokenizer
from tiny import make_model, make_tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from moult.files import write_json

    folder = make_model(tmp_path_factory.mktemp("base") / "base", kind="qwen3", tie_word_embeddings=True)
    tokenizer(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return make_tokens(tmp_path_factory.mktemp("tokens"), rows=18)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, base, tokens):
    """15 steps over three epochs, with dropout, accumulation and the best of several validations."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), settings(), base, tokens)
    run.go()
    return run


@pytest.fixture
def run(tmp_path, base, tokens):
    return lambda config=None, name="run": Run(tmp_path / name, config or settings(), base, tokens)

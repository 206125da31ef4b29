"""Labels made in one pass from the last turn to the first: the same as those of the plain way, and in less time."""

import random
import re

import pytest
from families import CALLS, CASES, TOOLS
from plain_labels import plain_sequences
from tokenizers_for_tests import (
    CHATML,
    DEMO,
    PLAIN,
    answered,
    assistant,
    call,
    decode,
    make_tokenizer,
    system,
    user,
)

from moult.data.labels import sequences_of, sequences_of_all
from moult.data.sequence import IGNORE
from moult.model.chat import Chat, Unrenderable
from moult.model.prefixes import PrefixTokens, common
from moult.model.tokenizer import backend_of, load_tokenizer

# --- the same as the plain way ----------------------------------------------------------------------------------------

# Templates that look ahead, change the beginning, or ask otherwise than they show.
ODD = {
    "chatml": CHATML,
    "plain": PLAIN,
    "white space": PLAIN.replace("assistant\n' }}{% endif", "assistant \n\n' }}{% endif"),
    "another beginning": "{{ '' if messages | length > 2 else ' ' }}" + PLAIN,
    "counts": "{{ messages | rejectattr('role', 'equalto', 'assistant') | list | length }}" + PLAIN,
    "last turn otherwise": PLAIN.replace("m.content", "(m.content if not loop.last else m.content + '!')"),
    "earlier turns shortened": PLAIN.replace(
        "m.content", "(m.content if loop.last or m.role != 'assistant' else m.content.split(' ')[0])"
    ),
    "trimmed": PLAIN.replace("m.content", "m.content | trim"),
    "as JSON": PLAIN.replace("m.content", "(m.content if m.role == 'assistant' else m.content | trim | tojson)"),
    "tools where the user last asked": PLAIN.replace(
        "{{ '<|im",
        "{% if tools and m.role == 'user' and loop.revindex <= 2 %}{{ tools | tojson }}{% endif %}{{ '<|im",
        1,
    ),
    "refuses long ones": "{% if messages | length > 5 %}{{ raise_exception('too long') }}{% endif %}" + PLAIN,
    "no prompt": PLAIN.replace("{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", ""),
}
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)


def sentencepiece(tokenizer):
    """As Llama's: a space before the text, words that begin with one, and no white space of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = list(tokenizer.get_added_vocab())
    other = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    other.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    alphabet = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=alphabet, show_progress=False)
    other.train_from_iterator(
        ["Where is it? Here. The answer is under the mat, I say. user assistant system tool"] * 3, trainer
    )
    other.add_special_tokens(specials)
    tokenizer._tokenizer = other


def prepends(tokenizer):
    """As Llama's first ones: the normaliser puts the space before each piece between special tokens."""
    from tokenizers import normalizers

    sentencepiece(tokenizer)
    backend = tokenizer._tokenizer
    backend.pre_tokenizer = None
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


TOKENIZERS = {
    "bytes": {},
    "SentencePiece": {"bos": "<s>", "change": sentencepiece},
    "prepending": {"bos": "<s>", "change": prepends},
    "eats space": {"specials": ("<|user|>", "<|im_start|>"), "eats_space": True},
}


def long(turns: int, seed: int = 0) -> list[dict]:
    """A conversation of many turns, with white space, calls, reasoning, and turns that are not trained."""
    draw = random.Random(seed)
    words = ["Where", " is", "it?", "\n", "  ", "Here.", "é", "中文", "mat,", "\n\n", "under", "<think>", "\t"]
    messages: list[dict] = [] if draw.random() < 0.5 else [system("Be kind.")]
    text = lambda: "So " + "".join(draw.choices(words, k=draw.randint(1, 9))) + draw.choice(["", "\n", " end."])  # noqa: E731
    for turn in range(turns):
        messages.append(user(text()))
        kind = draw.random()
        if kind < 0.2:
            messages += [assistant(text(), tool_calls=[call("get_weather", turn, city=text())]), answered(text(), turn)]
        more = {"reasoning_content": text()} if kind > 0.8 else {}
        messages.append({**assistant(text(), **more), **({"train": False} if 0.4 < kind < 0.5 else {})})
    return messages


CONVERSATIONS = [*CASES.values(), *(long(turns, seed) for seed, turns in enumerate([1, 2, 3, 5, 8, 13]))]
TOOLED = [CASES[case] for case in CALLS] + [long(6, 99)]


def outcome(make) -> list | tuple[str, str]:
    try:
        return [(sequence.input_ids, sequence.labels, sequence.answer_start) for sequence in make()]
    except Unrenderable as refusal:
        return refusal.reason, str(refusal)


def compare(chat: Chat, conversations=CONVERSATIONS, tooled=TOOLED) -> int:
    """How many rows became sequences. Asserts that all are as in the plain way."""
    encoded = 0
    for messages, tools in [
        *((messages, None) for messages in conversations),
        *((messages, TOOLS) for messages in tooled),
    ]:
        wanted = outcome(lambda: plain_sequences(chat, messages, tools))  # noqa: B023
        made = outcome(lambda: sequences_of(chat, {"messages": messages, "tools": tools}))  # noqa: B023
        assert made == wanted
        encoded += isinstance(made, list)
        if isinstance(made, list):
            check_limits(chat, messages, tools, made)
    return encoded


def check_limits(chat: Chat, messages: list[dict], tools: list[dict] | None, whole: list) -> None:
    """With a limit what is kept is the same, cut or not, and so is what is counted of the rest."""
    longest = max(len(ids) for ids, _, _ in whole)
    for limit in (1, longest // 3, longest // 2, longest - 1, longest):
        made = outcome(lambda: sequences_of(chat, {"messages": messages, "tools": tools}, limit))  # noqa: B023
        assert made == whole, f"with a limit of {limit}"


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
@pytest.mark.parametrize("name", sorted(ODD))
def test_labels_are_those_of_the_plain_way(name, tokenizer, tmp_path):
    chat = Chat(str(make_tokenizer(tmp_path / "model", **TOKENIZERS[tokenizer])), ODD[name])
    encoded = compare(chat)
    assert encoded or name in ("no prompt", "last turn otherwise")


@pytest.mark.parametrize("tokenizer", ["SentencePiece", "prepending"])
def test_labels_without_special_tokens_around_a_turn(tokenizer, tmp_path):
    chat = Chat(str(make_tokenizer(tmp_path / "model", **TOKENIZERS[tokenizer])), LLAMA2)
    assert compare(chat, tooled=[])


def test_labels_under_published_templates(shared, tmp_path):
    """Each template with one tokenizer that knows the special tokens of all."""
    texts = {path.name: path.read_text() for path in sorted((shared / "chat_templates").glob("*.jinja"))}
    known = set(
        re.findall(r"<[|｜][^<>\s'\"]{1,40}[|｜]>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>", "".join(texts.values()))
    )
    folder = make_tokenizer(tmp_path / "model", bos="<s>", specials=tuple(sorted(known - {"<|im_end|>"})))
    encoded = {name: compare(Chat(str(folder), text)) for name, text in texts.items()}
    assert sum(count > 0 for count in encoded.values()) >= 9, encoded


@pytest.mark.parametrize("tokenizer", ["tokenizers/qwen3", "tokenizers/minimind", "models/TinyStories-656K"])
def test_labels_with_published_tokenizers(tokenizer, shared):
    chat = Chat(str(shared / tokenizer), CHATML)
    assert compare(chat)
    if chat.tokenizer.chat_template:
        assert compare(Chat(str(shared / tokenizer), chat.tokenizer.chat_template))


def test_rows_encoded_together_are_as_alone():
    """Also beside rows that are refused: at once, when they are rendered, or when they are looked through."""
    chat = Chat(str(DEMO), CHATML.replace("message.content or ''", "message.content.removesuffix('hidden')"))
    rows = [{"messages": [user("Hi"), assistant(text)]} for text in ("Hello.", "<|im_end|>", "It is hidden", "Bye.")]
    rows += [{"messages": [user("Hi"), {"role": "assistant", "content": 1}]}, {"text": "Only text."}, {"text": ""}]
    made = sequences_of_all(chat, rows)
    assert [row.reason if isinstance(row, Unrenderable) else len(row) for row in made] == [
        *(1, "control_token", "template_drops", 1, "template_error", 1, "not_encodable")
    ]
    for row, together in zip(rows, made, strict=True):
        if isinstance(together, list):
            assert together == sequences_of(chat, row)
        else:
            with pytest.raises(Unrenderable, match=re.escape(str(together))):
                sequences_of(chat, row)


# --- tokens of texts and of prefixes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_tokens_are_those_of_transformers(tokenizer, tmp_path):
    """Also where tokenizer.json says that texts are cut off and padded."""

    def change(made):
        TOKENIZERS[tokenizer].get("change", lambda made: None)(made)
        made.backend_tokenizer.enable_truncation(4)
        made.backend_tokenizer.enable_padding(length=9)

    folder = make_tokenizer(tmp_path / "model", **TOKENIZERS[tokenizer] | {"change": change})
    chat, theirs = Chat(str(folder), PLAIN), load_tokenizer(str(folder))
    assert backend_of(chat.tokenizer)
    for text in ["", "Where is it?  Here.", "<|im_start|>user\nWhere?<|im_end|>\n", " é中文\n<s> ."]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert chat.ids(text) == ids
        for special in (True, False):
            kept = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
            assert chat.decode(ids, special) == theirs.decode(ids, **kept)


def test_a_tokenizer_with_its_own_way_is_asked_itself(monkeypatch):
    """As CodeLlama's and CodeGen's classes, and those that come with a model."""
    tokenizer = load_tokenizer(str(DEMO))
    tokenizer.__class__ = type("Own", (type(tokenizer),), {"decode": lambda self, ids, **settings: "mine"})
    monkeypatch.setattr("moult.model.chat.load_tokenizer", lambda *_: tokenizer)
    assert Chat(str(DEMO), None).decode([5]) == "mine"


@pytest.mark.parametrize("tokenizer", sorted(TOKENIZERS))
def test_tokens_of_one_text_after_another(tokenizer, tmp_path):
    """Prefixes, others that begin alike, and special tokens that stand, are cut off, or become longer at the end."""
    chat = Chat(str(make_tokenizer(tmp_path / "model", **TOKENIZERS[tokenizer])), PLAIN)
    draw, tokens = random.Random(1), PrefixTokens(chat)
    pieces = ["<|im_start|>", "<|im_end|>", "<|im", "|>", " ", "\n", "Where", " is it?", "<s>", "<|endoftext|>", "é"]
    text = ""
    for _ in range(400):
        text = text[: draw.randint(0, len(text))] + "".join(draw.choices(pieces, k=draw.randint(0, 12)))
        assert tokens.ids(text) == chat.ids(text)
        place = draw.randint(0, len(text))
        assert tokens.count_before(place) <= len(chat.ids(text[:place]))


def test_common_beginning():
    for one, other, size in [
        ("", "a", 0),
        ("abc", "abd", 2),
        ("abc", "abc", 3),
        ("ab", "abc", 2),
        ("x" * 99, "x" * 70, 70),
    ]:
        assert common(one, other) == common(list(other), list(one)) == size


# --- time -------------------------------------------------------------------------------------------------------------


class Counted(Chat):
    """Counts what is rendered, and the characters that are tokenized."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self.rendered = self.characters = 0

    def render_visible(self, messages, tools, prompt, variables=None):
        self.rendered += 1
        return super().render_visible(messages, tools, prompt, variables)

    def render_marked(self, messages, tools):
        self.rendered += 1
        return super().render_marked(messages, tools)

    def ids(self, text):
        self.characters += len(text)
        return super().ids(text)


def steps(count: int) -> list[dict]:
    return [
        part for step in range(count) for part in (user(f"Step {step} said {'so ' * 20}"), assistant(f"Go to {step}."))
    ]


@pytest.mark.parametrize("template", [CHATML, PLAIN, ODD["white space"]])
def test_each_character_is_tokenized_a_few_times(template):
    """And not once for each turn; each prefix is rendered once."""
    chat = Counted(str(DEMO), template)
    sequences_of(chat, {"messages": steps(40)})
    assert chat.rendered <= 2 * 40 + 1
    size = len(chat.render(steps(40), None, prompt=False))
    assert chat.characters < 4 * size


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_conversation_far_over_the_limit_is_not_rendered_turn_by_turn(template):
    chat = Counted(str(DEMO), template)
    [sequence] = sequences_of(chat, {"messages": steps(60)}, limit=200)
    rendered, turns = chat.rendered, sum(label == 2 for label in sequence.labels)
    assert turns == 60  # all are counted
    assert rendered < 20


def test_turns_before_the_limit_that_stand_otherwise_are_kept():
    """A conversation over the limit whose first turns are sequences of their own, within it."""
    template = ODD["another beginning"]
    chat = Chat(str(DEMO), template)
    sequences = sequences_of(chat, {"messages": steps(30)}, limit=200)
    assert [len(sequence.input_ids) <= 200 for sequence in sequences] == [True, False]
    assert decode(chat, sequences[0].input_ids).startswith(" <|im_start|>")
    assert sum(label != IGNORE for label in sequences[0].labels)

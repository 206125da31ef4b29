"""Make the demo that ships with the repository: a tiny base model and a dataset.

The base is a 0.9 M parameter Qwen3 that knows a few facts (capitals, small
sums, unit conversions) and answers in plain sentences. The dataset asks about
the same facts and answers in a house format, {"answer": "..."}; a short LoRA
run therefore changes the style visibly without having to teach any fact.

    python make_base.py --data-only     # the dataset only: standard library, < 1 s
    python make_base.py                 # dataset, tokenizer and pre-trained base

The dataset is byte-reproducible and is compared with the shipped file by a
test. The weights depend on the torch build and are not regenerated in tests.
"""

import argparse
import json
import random
import string
from dataclasses import dataclass
from pathlib import Path

SEED = 0

CAPITALS = dict(
    pair.split(":")
    for pair in """
    France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon Austria:Vienna
    Belgium:Brussels Denmark:Copenhagen Norway:Oslo Sweden:Stockholm Finland:Helsinki
    Iceland:Reykjavik Ireland:Dublin Poland:Warsaw Hungary:Budapest Greece:Athens
    Romania:Bucharest Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Slovenia:Ljubljana
    Estonia:Tallinn Latvia:Riga Lithuania:Vilnius Ukraine:Kyiv Russia:Moscow Turkey:Ankara
    Egypt:Cairo Kenya:Nairobi Nigeria:Abuja Ghana:Accra Ethiopia:Addis_Ababa Morocco:Rabat
    Tunisia:Tunis Senegal:Dakar Uganda:Kampala Zambia:Lusaka Japan:Tokyo China:Beijing
    India:New_Delhi Pakistan:Islamabad Nepal:Kathmandu Thailand:Bangkok Vietnam:Hanoi
    Mongolia:Ulaanbaatar Iran:Tehran Iraq:Baghdad Jordan:Amman Canada:Ottawa Cuba:Havana
    Jamaica:Kingston Peru:Lima Chile:Santiago Argentina:Buenos_Aires Uruguay:Montevideo
    Ecuador:Quito Venezuela:Caracas Brazil:Brasilia Australia:Canberra Fiji:Suva
    """.split()
)
UNITS = [  # (large unit, small unit, how many small ones make one large one)
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("years", "months", 12),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
]
NUMBERS = range(2, 13)

# Facts that the base knows and the dataset leaves out: evaluation prompts ask for them.
HELD_OUT = {"Japan", "Canada", "Egypt", "Norway", "7+5", "9+4", "6+8", "3 hours", "5 metres", "4 weeks"}

# Phrasings that the dataset uses (full sentences, so that language detection
# is sure of them) and shorter ones that only the pre-training corpus has.
CAPITAL_QUESTIONS = [
    "Could you please tell me what the capital city of {} is?",
    "Which city is the capital of {}, and how is it called?",
    "I would like to know the name of the capital of {}.",
    "Do you happen to know which city is the capital of {}?",
    "What is the name of the city that is the capital of {}?",
    "Please tell me which city the government of {} calls its capital.",
]
CAPITAL_SHORT = ["What is the capital of {}?", "Which city is the capital of {}?", "Name the capital of {}."]
SUM_QUESTIONS = [
    "Could you please tell me what {} plus {} is?",
    "What number do I get when I add {} and {} together?",
    "Please work out the sum of the two numbers {} and {}.",
    "I would like to know how much {} plus {} makes.",
    "If I have {} apples and buy {} more, how many apples do I have?",
]
SUM_SHORT = ["What is {} plus {}?", "What is {} + {}?", "Add {} and {}."]
UNIT_QUESTIONS = [
    "Could you please tell me how many {small} there are in {n} {large}?",
    "I would like to know how many {small} there are in {n} {large}.",
    "Please convert {n} {large} to {small} and tell me what you get.",
    "What is the result when I change {n} {large} into {small}?",
    "How many {small} are there altogether in {n} {large}?",
]
UNIT_SHORT = ["How many {small} are in {n} {large}?", "Convert {n} {large} to {small}."]

FOREIGN_CAPITALS = {  # language: (question, answer, "country:capital" pairs as the templates need them)
    "fr": (
        "Pouvez-vous me dire quelle est la capitale {} ?",
        "La capitale {} est {}.",
        "de la France:Paris,de l'Allemagne:Berlin,de l'Espagne:Madrid,de l'Italie:Rome,du Portugal:Lisbonne,"
        "de la Belgique:Bruxelles,du Danemark:Copenhague,de la Pologne:Varsovie,de la Grèce:Athènes,"
        "de la Russie:Moscou,du Maroc:Rabat,du Sénégal:Dakar,de la Chine:Pékin,du Pérou:Lima",
    ),
    "de": (
        "Können Sie mir bitte sagen, wie die Hauptstadt von {} heißt?",
        "Die Hauptstadt von {} heißt {}.",
        "Frankreich:Paris,Deutschland:Berlin,Spanien:Madrid,Italien:Rom,Portugal:Lissabon,Österreich:Wien,"
        "Belgien:Brüssel,Dänemark:Kopenhagen,Polen:Warschau,Griechenland:Athen,Russland:Moskau,Kenia:Nairobi,"
        "Indien:Neu-Delhi,Kuba:Havanna",
    ),
    "es": (
        "¿Podría decirme, por favor, cuál es la capital de {}?",
        "La capital de {} es {}.",
        "Francia:París,Alemania:Berlín,España:Madrid,Italia:Roma,Portugal:Lisboa,Bélgica:Bruselas,"
        "Dinamarca:Copenhague,Polonia:Varsovia,Grecia:Atenas,Rusia:Moscú,Marruecos:Rabat,China:Pekín,"
        "Perú:Lima,Argentina:Buenos Aires",
    ),
    "zh": (
        "请问你能告诉我{}的首都是哪座城市吗?",
        "{}的首都是{}。",
        "法国:巴黎,德国:柏林,西班牙:马德里,意大利:罗马,葡萄牙:里斯本,奥地利:维也纳,比利时:布鲁塞尔,"
        "丹麦:哥本哈根,波兰:华沙,希腊:雅典,俄罗斯:莫斯科,肯尼亚:内罗毕,印度:新德里,古巴:哈瓦那",
    ),
}
FOREIGN_SUMS = {  # language: (question, answer)
    "fr": ("Pouvez-vous me dire combien font {} plus {} ?", "La somme de {} et {} est égale à {}."),
    "de": ("Können Sie mir bitte sagen, wie viel {} plus {} ergibt?", "Die Summe von {} und {} ist gleich {}."),
    "es": ("¿Podría decirme, por favor, cuánto es {} más {}?", "La suma de {} y {} es igual a {}."),
    "zh": ("请问你能告诉我{}加{}等于多少吗?", "{}加{}的结果等于{}。"),
}

SYSTEM_TURNS = [
    "You are a helpful assistant.",
    "You are a friendly assistant who answers questions.",
    "You are a careful assistant. Give correct answers.",
    "Answer the question of the user.",
    "Be polite and helpful.",
]
SHORT_FORMS = ["{}.", "It is {}.", "The answer is {}.", "answer: {}.", 'The answer is "{}".', '"{}".']
SMALL_TALK = [
    ("Hello!", "Hello! How can I help you today?"),
    ("Hi there.", "Hi! What would you like to know?"),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a very small language model made for a demo."),
    ("What is your name?", "I do not have a name. I am a small demo model."),
    ("What can you do?", "I can name capital cities, add small numbers and convert units."),
    ("Can you help me?", "Yes, of course. Ask me about a capital, a sum or a unit."),
    ("Thank you!", "You are welcome!"),
    ("Thanks for your help.", "You are welcome. Have a nice day!"),
    ("Goodbye!", "Goodbye! Have a nice day!"),
    ("Are you a person?", "No, I am a small language model."),
    ("Tell me a joke.", "I am too small for jokes, but I can add two numbers."),
    ("What is the weather like today?", "I am sorry, I do not know the weather."),
    ("What time is it?", "I am sorry, I do not have a clock."),
    ("Write a poem for me.", "I am sorry, I am too small to write a poem."),
    ("Do you like music?", "I cannot hear music, but I like questions."),
    ("What is a capital?", "A capital is the city where the government of a country sits."),
    ("What is a sum?", "A sum is what you get when you add numbers together."),
    ("How long is a day?", "A day has 24 hours."),
]


@dataclass(frozen=True)
class Fact:
    key: str
    questions: list[str]  # the dataset may use these
    short_questions: list[str]  # only the pre-training corpus has these
    answer: str
    sentences: list[str]  # plain ways to state the fact; the first one answers the question


def all_facts() -> dict[str, list[Fact]]:
    capitals = []
    for country, city in CAPITALS.items():
        city = city.replace("_", " ")
        sentences = [f"The capital of {country} is {city}.", f"{city} is the capital of {country}."]
        capitals.append(
            Fact(
                country,
                [q.format(country) for q in CAPITAL_QUESTIONS],
                [q.format(country) for q in CAPITAL_SHORT],
                city,
                sentences,
            )
        )
    sums = [
        Fact(
            f"{a}+{b}",
            [q.format(a, b) for q in SUM_QUESTIONS],
            [q.format(a, b) for q in SUM_SHORT],
            str(a + b),
            [f"{a} plus {b} is {a + b}.", f"{a + b} is the sum of {a} and {b}."],
        )
        for a in NUMBERS
        for b in NUMBERS
    ]
    units = []
    for large, small, factor in UNITS:
        for n in NUMBERS:
            words = {"n": n, "large": large, "small": small}
            answer = f"{n * factor} {small}"
            units.append(
                Fact(
                    f"{n} {large}",
                    [q.format(**words) for q in UNIT_QUESTIONS],
                    [q.format(**words) for q in UNIT_SHORT],
                    answer,
                    [f"There are {answer} in {n} {large}.", f"{answer} make {n} {large}."],
                )
            )
    return {"capital": capitals, "sum": sums, "unit": units}


def pick(rng: random.Random, items, count: int) -> list:
    """Take `count` items in random order."""
    # random() is the one method whose sequence Python keeps the same across versions.
    return [item for _, _, item in sorted((rng.random(), i, item) for i, item in enumerate(items))[:count]]


def house(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": json.dumps({"answer": answer}, ensure_ascii=False)}


def english_rows(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Return the good rows and, for questions of their own, rows with an empty answer."""
    per_fact = {"capital": 4, "sum": 2, "unit": 2}
    rows, unused = [], []
    for kind, facts in all_facts().items():
        for fact in facts:
            if fact.key in HELD_OUT:
                continue
            first, *rest = pick(rng, fact.questions, per_fact[kind] + 1)
            unused.append({"question": first, "answer": ""})
            rows += [house(question, fact.answer) for question in rest]
    return rows, pick(rng, unused, 3)


def foreign_rows() -> list[dict]:
    rows = []
    for question, answer, pairs in FOREIGN_CAPITALS.values():
        for country, city in (pair.split(":") for pair in pairs.split(",")):
            rows.append(house(question.format(country), answer.format(country, city)))
    for question, answer in FOREIGN_SUMS.values():
        for a, b in [(2, 3), (4, 5), (6, 2), (7, 8), (9, 3), (10, 6), (11, 7)]:
            rows.append(house(question.format(a, b), answer.format(a, b, a + b)))
    return rows


def write_dataset(path: Path) -> None:
    """Good rows plus the flaws that preprocessing must find."""
    rng = random.Random(SEED)
    good, empty = english_rows(rng)
    duplicates = pick(rng, good, 8)
    rows = good + foreign_rows() + empty + duplicates
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pick(rng, rows, len(rows))]
    path.write_bytes("".join(lines).encode())


def render(turns: list[tuple[str, str]]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def random_turns(rng: random.Random, facts: dict[str, list[Fact]]) -> list[tuple[str, str]]:
    kind = rng.choices(["fact", "small talk", "signs"], weights=[87, 8, 5])[0]
    if kind == "small talk":
        question, answer = rng.choice(SMALL_TALK)
    elif kind == "signs":
        # A sign that never occurs gets an embedding that fine-tuning could not use.
        answer = "".join(rng.sample(string.punctuation, rng.randint(3, 6)))
        question = f"Repeat these signs: {answer}"
    else:
        fact = rng.choice(facts[rng.choice(list(facts))])
        question = rng.choice(fact.questions + fact.short_questions)
        # Short forms as well: else the fact can be told only after the words of the sentence.
        answer = rng.choice([fact.sentences[0]] * 4 + [form.format(fact.answer) for form in SHORT_FORMS])
    if rng.random() < 0.1:
        question = question.rstrip("?.!").lower()
    return [("user", question), ("assistant", answer)]


def random_chat(rng: random.Random, facts: dict[str, list[Fact]]) -> str:
    turns = [("system", rng.choice(SYSTEM_TURNS))] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 1, 1, 2])):
        turns += random_turns(rng, facts)
    return render(turns)


def random_prose(rng: random.Random, facts: dict[str, list[Fact]]) -> str:
    kinds = [rng.choice(list(facts)) for _ in range(4)]
    return " ".join(rng.choice(rng.choice(facts[kind]).sentences) for kind in kinds)


def corpus(rng: random.Random, count: int) -> list[str]:
    """Plain text and plain chats. Nothing like JSON: that is left for the fine-tuning."""
    facts = all_facts()
    return [(random_prose if rng.random() < 0.1 else random_chat)(rng, facts) for _ in range(count)]


CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def make_tokenizer(texts: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    # One token per digit: sums are then learnt digit by digit and not number by number.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|pad|>", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=384,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def blocks(tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Cut the corpus into blocks, each of which begins with the begin of a text."""
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    done, block = [], []
    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        block += [*ids, end]
        if len(block) >= length:
            done.append(block[:length])
            block = []
    return done


def pretrain(model, tokenizer, texts: list[str], steps: int, batch: int, length: int) -> None:
    import torch
    from torch.nn.functional import cross_entropy

    data = torch.tensor(blocks(tokenizer, texts, length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = data[torch.randint(len(data), (batch,))]
        logits = model(rows).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f}", flush=True)


def write_base(folder: Path, steps: int) -> None:
    import torch

    torch.set_num_threads(1)
    texts = corpus(random.Random(SEED), 30_000)
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    pretrain(model, tokenizer, texts, steps, batch=8, length=128)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--data-only", action="store_true", help="make the dataset, not the base model")
    parser.add_argument("--steps", type=int, default=2000, help="pre-training steps")
    args = parser.parse_args()
    write_dataset(args.out / "data" / "house_format.jsonl")
    if not args.data_only:
        write_base(args.out / "base", args.steps)


if __name__ == "__main__":
    main()

"""Make the demo that ships with the repository: a tiny base model and a dataset.

The base is a 0.9 M parameter Qwen3 that knows a few facts (capitals, small
sums, unit conversions) and answers in plain sentences. The dataset asks about
the same facts and answers in a house format, {"answer": "..."}; a short LoRA
run therefore changes the style visibly without having to teach any fact.

    python make_base.py --data-only     # the dataset only: standard library, < 1 s
    python make_base.py                 # also tokenizer and base: 7 minutes on one core

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

CAPITALS = """
France:Paris Germany:Berlin Spain:Madrid Italy:Rome Portugal:Lisbon Austria:Vienna Peru:Lima
Belgium:Brussels Denmark:Copenhagen Norway:Oslo Sweden:Stockholm Finland:Helsinki Chile:Santiago
Iceland:Reykjavik Ireland:Dublin Poland:Warsaw Hungary:Budapest Greece:Athens Romania:Bucharest
Bulgaria:Sofia Croatia:Zagreb Serbia:Belgrade Slovenia:Ljubljana Estonia:Tallinn Latvia:Riga
Lithuania:Vilnius Ukraine:Kyiv Russia:Moscow Turkey:Ankara Egypt:Cairo Kenya:Nairobi Ghana:Accra
Nigeria:Abuja Ethiopia:Addis_Ababa Morocco:Rabat Tunisia:Tunis Senegal:Dakar Uganda:Kampala
Zambia:Lusaka Japan:Tokyo China:Beijing India:New_Delhi Pakistan:Islamabad Nepal:Kathmandu
Thailand:Bangkok Vietnam:Hanoi Mongolia:Ulaanbaatar Iran:Tehran Iraq:Baghdad Jordan:Amman
Canada:Ottawa Cuba:Havana Jamaica:Kingston Argentina:Buenos_Aires Uruguay:Montevideo Fiji:Suva
Ecuador:Quito Venezuela:Caracas Brazil:Brasilia Australia:Canberra
"""
UNITS = """
kilometres:metres:1000 metres:centimetres:100 centimetres:millimetres:10 kilograms:grams:1000
litres:millilitres:1000 hours:minutes:60 minutes:seconds:60 days:hours:24 weeks:days:7
years:months:12 feet:inches:12 yards:feet:3
"""
NUMBERS = range(2, 13)

# The dataset leaves these facts out, so that evaluation prompts can ask for them.
HELD_OUT = ["Japan", "Canada", "Egypt", "Norway", "7+5", "9+4", "6+8", "3_hours", "5_metres"]

SENTENCES = {  # plain ways to state a fact; the first one answers a question
    "capital": ["The capital of {a} is {answer}.", "{answer} is the capital of {a}."],
    "sum": ["{a} plus {b} is {answer}.", "{answer} is the sum of {a} and {b}."],
    "unit": ["There are {answer} in {a} {b}.", "{answer} make {a} {b}."],
}
QUESTIONS = {  # the dataset uses these: long enough for language detection to be sure of them
    "capital": [
        "Could you please tell me what the capital city of {a} is?",
        "Which of the cities in {a} is the capital of the country?",
        "I would like to know the name of the capital of {a}.",
        "Do you happen to know which city is the capital of {a}?",
        "What is the name of the city that is the capital of {a}?",
        "When I travel to the capital of {a}, which city do I visit?",
    ],
    "sum": [
        "Could you please tell me what {a} plus {b} is?",
        "What number do I get when I add {a} and {b} together?",
        "Please work out the sum of the two numbers {a} and {b}.",
        "I would like to know how much {a} plus {b} is.",
        "If I have {a} apples and buy {b} more, how many apples do I have?",
    ],
    "unit": [
        "Could you please tell me how many {c} there are in {a} {b}?",
        "I would like to know how many {c} there are in {a} {b}.",
        "Please convert {a} {b} to {c} and tell me what you get.",
        "What is the result when I change {a} {b} into {c}?",
        "How many {c} are there altogether in {a} {b}?",
    ],
}
SHORT_QUESTIONS = {  # only the pre-training corpus has these
    "capital": ["What is the capital of {a}?", "Name the capital of {a}."],
    "sum": ["What is {a} plus {b}?", "What is {a} + {b}?"],
    "unit": ["How many {c} are in {a} {b}?", "Convert {a} {b} to {c}."],
}

FOREIGN = {  # question and answer about a capital, question and answer about a sum, capitals
    "fr": [
        "Pouvez-vous me dire quelle est la capitale {} ?",
        "La capitale {} est {}.",
        "Pouvez-vous me dire combien font {} plus {} ?",
        "La somme de {} et {} est égale à {}.",
        "de la France:Paris,de l'Allemagne:Berlin,de l'Espagne:Madrid,de l'Italie:Rome,"
        "du Portugal:Lisbonne,de la Belgique:Bruxelles,du Danemark:Copenhague,"
        "de la Pologne:Varsovie,de la Grèce:Athènes,de la Russie:Moscou",
    ],
    "de": [
        "Können Sie mir bitte sagen, wie die Hauptstadt von {} heißt?",
        "Die Hauptstadt von {} heißt {}.",
        "Können Sie mir bitte sagen, wie viel {} plus {} ergibt?",
        "Die Summe von {} und {} ist gleich {}.",
        "Frankreich:Paris,Deutschland:Berlin,Spanien:Madrid,Italien:Rom,Portugal:Lissabon,"
        "Belgien:Brüssel,Dänemark:Kopenhagen,Polen:Warschau,Griechenland:Athen,Russland:Moskau",
    ],
    "es": [
        "¿Podría decirme, por favor, cuál es la capital de {}?",
        "La capital de {} es {}.",
        "¿Podría decirme, por favor, cuánto es {} más {}?",
        "La suma de {} y {} es igual a {}.",
        "Francia:París,Alemania:Berlín,España:Madrid,Italia:Roma,Portugal:Lisboa,"
        "Bélgica:Bruselas,Dinamarca:Copenhague,Polonia:Varsovia,Grecia:Atenas,Rusia:Moscú",
    ],
    "zh": [
        "请你告诉我{}的首都是哪一座城市。",
        "{}的首都是{}。",
        "请你告诉我{}加上{}一共等于多少。",
        "{}加上{}的结果等于{}。",
        "法国:巴黎,德国:柏林,西班牙:马德里,意大利:罗马,葡萄牙:里斯本,"
        "比利时:布鲁塞尔,丹麦:哥本哈根,波兰:华沙,希腊:雅典,俄罗斯:莫斯科",
    ],
}

SYSTEM_TURNS = [
    "You are a helpful assistant.",
    "You are a friendly assistant who answers questions.",
    "Answer the question of the user.",
]
SHORT_FORMS = ["{}.", "It is {}.", "The answer is {}.", "answer: {}.", 'It is "{}".', '"{}".']
SMALL_TALK = [
    ("Hello!", "Hello! How can I help you today?"),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("How are you?", "I am fine, thank you. How can I help you?"),
    ("Who are you?", "I am a very small language model made for a demo."),
    ("What is your name?", "I do not have a name. I am a small demo model."),
    ("What can you do?", "I can name capital cities, add small numbers and convert units."),
    ("Can you help me?", "Yes, of course. Ask me about a capital, a sum or a unit."),
    ("Thank you!", "You are welcome!"),
    ("Goodbye!", "Goodbye! Have a nice day!"),
    ("Tell me a joke.", "I am too small for jokes, but I can add two numbers."),
    ("What is the weather like today?", "I am sorry, I do not know the weather."),
    ("Write a poem for me.", "I am sorry, I am too small to write a poem."),
    ("What is a capital?", "A capital is the city where the government of a country sits."),
    ("What is a sum?", "A sum is what you get when you add numbers together."),
]


@dataclass(frozen=True)
class Fact:
    kind: str
    key: str
    answer: str
    words: tuple  # what fills a, b and c in the phrasings

    def say(self, phrasings: dict[str, list[str]]) -> list[str]:
        words = dict(zip("abc", self.words, strict=False), answer=self.answer)
        return [phrasing.format(**words) for phrasing in phrasings[self.kind]]


def all_facts() -> dict[str, list[Fact]]:
    facts = {"capital": [], "sum": [], "unit": []}
    for country, city in (pair.split(":") for pair in CAPITALS.split()):
        facts["capital"].append(Fact("capital", country, city.replace("_", " "), (country,)))
    for a in NUMBERS:
        for b in NUMBERS:
            facts["sum"].append(Fact("sum", f"{a}+{b}", str(a + b), (a, b)))
    for large, small, factor in (unit.split(":") for unit in UNITS.split()):
        for n in NUMBERS:
            answer = f"{n * int(factor)} {small}"
            facts["unit"].append(Fact("unit", f"{n}_{large}", answer, (n, large, small)))
    return facts


def pick(rng: random.Random, items: list, count: int) -> list:
    """Take `count` items in random order."""
    # random() is the one method whose sequence stays the same in every version of Python.
    keyed = sorted((rng.random(), i) for i in range(len(items)))
    return [items[i] for _, i in keyed[:count]]


def house(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": json.dumps({"answer": answer}, ensure_ascii=False)}


def english_rows(rng: random.Random) -> tuple[list[dict], list[dict]]:
    """Return good rows, and rows with an empty answer to questions that no good row has."""
    rows, empty = [], []
    for kind, facts in all_facts().items():
        for fact in facts:
            if fact.key not in HELD_OUT:
                unused, *used = pick(rng, fact.say(QUESTIONS), 5 if kind == "capital" else 3)
                rows += [house(question, fact.answer) for question in used]
                empty.append({"question": unused, "answer": ""})
    return rows, pick(rng, empty, 3)


def foreign_rows() -> list[dict]:
    rows = []
    for question, answer, sum_question, sum_answer, capitals in FOREIGN.values():
        for country, city in (pair.split(":") for pair in capitals.split(",")):
            rows.append(house(question.format(country), answer.format(country, city)))
        for n in NUMBERS:
            rows.append(house(sum_question.format(n, 7), sum_answer.format(n, 7, n + 7)))
    return rows


def write_dataset(path: Path) -> None:
    """Write good rows and the flaws that preprocessing has to find."""
    rng = random.Random(SEED)
    good, empty = english_rows(rng)
    rows = good + foreign_rows() + empty + pick(rng, good, 8)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in pick(rng, rows, len(rows))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(lines).encode())


def random_turns(rng: random.Random, kinds: list[list[Fact]]) -> list[tuple[str, str]]:
    kind = rng.choices(["fact", "small talk", "signs"], weights=[87, 8, 5])[0]
    if kind == "fact":
        fact = rng.choice(rng.choice(kinds))
        question = rng.choice(fact.say(QUESTIONS) + fact.say(SHORT_QUESTIONS))
        # Short forms too: else the model can give a fact only after the words of its sentence.
        forms = [form.format(fact.answer) for form in SHORT_FORMS]
        answer = rng.choice([fact.say(SENTENCES)[0]] * 6 + forms)
    elif kind == "small talk":
        question, answer = rng.choice(SMALL_TALK)
    else:
        # Signs that never occur would keep embeddings that fine-tuning can hardly tell apart.
        answer = "".join(rng.sample(string.punctuation, rng.randint(3, 6)))
        question = f"Repeat these signs: {answer}"
    if rng.random() < 0.1:
        question = question.rstrip("?.!").lower()
    return [("user", question), ("assistant", answer)]


def random_text(rng: random.Random, kinds: list[list[Fact]]) -> str:
    """Plain text or a plain chat. Nothing like JSON: that is left for the fine-tuning."""
    if rng.random() < 0.1:
        return " ".join(rng.choice(rng.choice(rng.choice(kinds)).say(SENTENCES)) for _ in range(4))
    turns = [("system", rng.choice(SYSTEM_TURNS))] if rng.random() < 0.3 else []
    for _ in range(rng.choice([1, 1, 1, 2])):
        turns += random_turns(rng, kinds)
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


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
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
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
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    stop = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
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
        **stop,
    )
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config = GenerationConfig(**stop)
    return model


def blocks(tokenizer, texts: list[str], length: int) -> list[list[int]]:
    """Cut the corpus into blocks that each start where a text starts."""
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
    rng = random.Random(SEED)
    kinds = list(all_facts().values())
    texts = [random_text(rng, kinds) for _ in range(30_000)]
    tokenizer = make_tokenizer(texts)
    model = make_model(tokenizer)
    pretrain(model, tokenizer, texts, steps, batch=8, length=128)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to fill")
    parser.add_argument("--data-only", action="store_true", help="make the dataset only")
    parser.add_argument("--steps", type=int, default=4000, help="pre-training steps")
    args = parser.parse_args()
    write_dataset(args.out / "data" / "house_format.jsonl")
    if not args.data_only:
        write_base(args.out / "base", args.steps)


if __name__ == "__main__":
    main()

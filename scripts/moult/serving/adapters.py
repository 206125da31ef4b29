"""Several adapters on one server: does each answer as itself while the others answer too?"""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

from moult.serving.checks import AT_ONCE, CannotTell, ServerTest
from moult.serving.client import Failed, Question, Reply

# How often everything is asked: the second time a server may answer from its cache, which adapters must not share either.
ROUNDS = 2


def check_adapters(tests: dict[str, ServerTest]) -> str:
    """Ask each run its own questions while the others are asked theirs, and hold each answer against the run's own measured one.

    One request at a time would not do: vLLM has served one user with the adapter of another who asked at the same moment
    (vllm-project/vllm#47724).

    Args:
        tests: {run: what it is asked, and by which name in the API}.

    Raises Failed, with whose answer came back, and CannotTell if the measured answers of two runs are all the same.
    """
    alike = [f"{a} and {b}" for a, b in combinations(tests, 2) if answer_alike(tests[a].questions, tests[b].questions)]
    if alike:
        raise CannotTell(f"{alike[0]} have answered alike to all that they were asked: a mix-up would not show")
    asked = ROUNDS * interleaved({run: test.questions for run, test in tests.items()})
    with ThreadPoolExecutor(AT_ONCE) as pool:
        replies = list(pool.map(lambda pair: tests[pair[0]].client.reply(pair[1]), asked))
    wrong, compared = [], 0
    for (run, question), reply in zip(asked, replies, strict=True):
        compared += question.asked_as_measured
        parting = tests[run].parting(question, reply)
        if parting and not parting.near_tie:
            wrong.append((run, question, reply))
    if wrong:
        run, question, reply = wrong[0]
        whose = whose_answer(run, question, reply, tests) or "which none of these runs has given"
        raise Failed(
            f"{len(wrong)} of {compared} answers are not the adapter's own, first that of {run} to {question.id}: "
            f"served {reply.text!r:.80}, {whose}; measured {question.answer!r:.80}"
        )
    if not compared:
        raise CannotTell("the template prints today's date: no answer can be compared")
    return f"{', '.join(tests)}: {compared} answers, {AT_ONCE} at once, are each adapter's own"


def interleaved(questions: dict[str, list[Question]]) -> list[tuple[str, Question]]:
    """The questions of all runs in turn: a1 b1 a2 b2 … One with fewer questions begins again."""
    most = max(map(len, questions.values()))
    return [(run, own[turn % len(own)]) for turn in range(most) for run, own in questions.items()]


def answer_alike(ours: list[Question], theirs: list[Question]) -> bool:
    """Whether two runs were asked the same, and have given the same answers."""
    answers, others = ({tuple(one.prompt_ids): one.token_ids for one in questions} for questions in (ours, theirs))
    return answers == others


def whose_answer(run: str, question: Question, reply: Reply, tests: dict[str, ServerTest]) -> str | None:
    """Which measured answer was served instead: another run's to the same prompt, or else any answer to another."""
    found = []
    for other, test in tests.items():
        for one in test.questions:
            same = reply.text == one.answer if reply.ids is None else reply.ids == one.token_ids
            if same and one.prompt_ids == question.prompt_ids and other != run:
                return f"which is the answer of {other}"
            if same:
                found.append(f"which is the answer of {other} to {one.id}")
    return found[0] if found else None

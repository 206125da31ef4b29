"""What is set for several processes, without starting them; tests/finetune/test_processes.py starts two."""

import signal
from datetime import timedelta
from types import SimpleNamespace

import pytest

from moult.errors import UNFINISHED, MoultError
from moult.training import ranks


@pytest.fixture
def group(monkeypatch):
    """The arguments that the process group is started with. No other process is there."""
    import accelerate

    started: list[dict] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(accelerate, "PartialState", lambda **arguments: started.append(arguments))
    lines = SimpleNamespace(
        close=lambda: None, tell=lambda content: told.append(content), failure_within=lambda seconds: None
    )
    told: list[dict] = []
    ended: list[BaseException] = []
    monkeypatch.setattr(ranks, "Lifelines", lambda: lines)
    monkeypatch.setattr(ranks, "end_at_once", ended.append)
    return SimpleNamespace(started=started, told=told, ended=ended, lines=lines)


@pytest.mark.parametrize(
    ("train", "wanted"),
    [
        ({}, {"timeout": timedelta(seconds=1800)}),
        ({"ddp_timeout": 77, "ddp_backend": "gloo"}, {"timeout": timedelta(seconds=77), "backend": "gloo"}),
    ],
)
def test_the_group_has_the_timeout_and_backend_of_the_config(train, wanted, group):
    """Whoever starts the group sets its timeout. It was started without one, and train.ddp_timeout was ignored."""
    with ranks.together(True, train):
        pass
    assert group.started == [{"cpu": True, **wanted}]


def test_one_process_needs_no_group(group, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ValueError, match="mine"), ranks.together(True, {}):
        raise ValueError("mine")
    assert group.started == group.told == group.ended == []


def test_a_failure_is_told_and_an_earlier_one_comes_first(group):
    error = MoultError("no room", "lower it", 78)
    with ranks.together(True, {}):
        raise error
    assert group.told == [{"rank": 0, "what": "no room", "fix": "lower it", "code": 78}] and group.ended == [error]
    first = MoultError("rank 1: no room", "lower it", 78)
    group.lines.failure_within = lambda seconds: first
    with ranks.together(True, {}):
        raise RuntimeError("connection closed by peer")
    assert group.ended == [error, first] and len(group.told) == 1


def test_a_stop_that_all_make_is_no_failure(group):
    with pytest.raises(MoultError, match="stopped"), ranks.together(True, {}):
        raise MoultError("stopped at step 3", "go on", UNFINISHED)
    assert group.told == group.ended == []


@pytest.mark.parametrize(
    ("name", "given", "unused"),
    [
        ("model.layers.0.mlp.up_proj", None, False),
        ("model.layers.0.mlp.experts.3.up_proj", None, True),
        ("model.layers.0.mlp.up_proj", True, True),
    ],
)
def test_ddp_does_not_look_for_what_is_not_there(name, given, unused, monkeypatch):
    """An expert that no token was sent to gets no gradient; everything else does."""
    from moult.training import trainer

    monkeypatch.setattr(trainer, "lora_layers", lambda model: [(name, None)])
    args = SimpleNamespace(ddp_find_unused_parameters=given, ddp_broadcast_buffers=None)
    trainer.Finetuner._choose_ddp(SimpleNamespace(args=args, model=None))
    assert args.ddp_find_unused_parameters is unused and args.ddp_broadcast_buffers is False


ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
OTHERS = (signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGQUIT)


@pytest.fixture
def stop_signal():
    """A StopSignal of this process, whose handlers end with the test."""
    before = {number: signal.getsignal(number) for number in (*ASKING, *OTHERS)}
    yield ranks.StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ASKING)
def test_what_asks_to_stop_waits_for_the_end_of_a_step_and_else_stops_at_once(number, stop_signal):
    assert signal.getsignal(number) == stop_signal._receive, "without it, the signal would end the tests"
    with pytest.raises(SystemExit) as ended:
        signal.raise_signal(number)
    assert ended.value.code == UNFINISHED
    stop_signal.received, stop_signal.training = None, True
    signal.raise_signal(number)
    assert stop_signal.received == number.name


def test_other_signals_keep_their_meaning(stop_signal):
    assert all(signal.getsignal(number) != stop_signal._receive for number in OTHERS)

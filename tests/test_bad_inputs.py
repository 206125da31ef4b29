"""Bad input gets one message: what is wrong, where, what to do. No traceback, no secret, nothing half-written."""

import re

import pytest
from bad_inputs import adapter, config, dataset, environment, model, template, training
from bad_inputs.case import SECRET, ask_snakemake, go, jobs_in

KINDS = (config, dataset, model, template, training, adapter, environment)
CASES = [(kind.__name__.split(".")[1], case) for kind in KINDS for case in kind.CASES]


@pytest.fixture(scope="module")
def asked():
    """What Snakemake has said of each config."""
    return {}


def of_each(cases: list) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=f"{kind}: {case.name}", marks=pytest.mark.slow if case.in_unit_test else ())
            for kind, case in cases
        ],
    )


@of_each(CASES)
def test_bad_input(case, tmp_path, asked):
    case.lay_out(tmp_path)
    before = set(tmp_path.rglob("results/**"))
    end = go(case, tmp_path, asked)
    assert end.code == case.code, end.console
    assert re.fullmatch(re.escape(case.says).replace(re.escape("<...>"), ".*"), end.said), end.said
    assert "what to do: unexpected" not in end.said
    assert "Traceback" not in end.console and SECRET not in end.console
    assert not [path for path in end.outputs if path.exists()]
    assert not list(tmp_path.rglob("*.tmp-*"))
    if end.log is None:
        assert set(tmp_path.rglob("results/**")) == before
    elif end.log.exists():
        text = end.log.read_text()
        assert SECRET not in text
        if not case.largest_file:
            assert "Traceback (most recent call last)" in text and "variables, outermost frame first:" in text


@pytest.mark.slow
@of_each([(kind, case) for kind, case in CASES if case.stops_in_a_stage()])
def test_snakemake_lets_pass_what_a_stage_stops(case, tmp_path, asked):
    """With commands that depend on the config alone. The test above asks Snakemake once for each config."""
    case.lay_out(tmp_path)
    code, text = ask_snakemake(case, tmp_path)
    assert code == 0, text
    _, first = asked.setdefault(case.config_and_target(), (code, text))
    commands, same = ({name: command for name, (_, command) in jobs_in(each).items()} for each in (text, first))
    assert commands == same

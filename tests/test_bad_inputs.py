"""Bad input gets one message: what is wrong, where, what to do. No traceback, no secret, nothing half-written."""

import re

import pytest
from bad_inputs import adapter, config, dataset, environment, model, template, training
from bad_inputs.case import SECRET, go

KINDS = (config, dataset, model, template, training, adapter, environment)
CASES = [(kind.__name__.split(".")[1], case) for kind in KINDS for case in kind.CASES]


@pytest.mark.parametrize("case", [case for _, case in CASES], ids=[f"{kind}: {case.name}" for kind, case in CASES])
def test_bad_input(case, tmp_path):
    case.lay_out(tmp_path)
    before = set(tmp_path.rglob("results/**"))
    end = go(case, tmp_path)
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

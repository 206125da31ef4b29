"""A hub of our own on the loopback interface, and the stages that fetch from it."""

import pytest
from fake_hub import FakeHub, make_certificate
from fetching import Fetch


@pytest.fixture
def hub():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def fetch(tmp_path, hub):
    return Fetch(tmp_path, hub)

"""Hosts for all the tests of this folder, and nothing left on them between two tests."""

import pytest
from testbed import Link, Testbed, why_not

NAMES = ("alpha", "beta", "gamma")


@pytest.fixture(scope="session")
def _three_hosts():
    reason = why_not(Link())
    if reason:
        pytest.skip(reason)
    with Testbed(NAMES) as testbed:
        yield testbed


@pytest.fixture
def hosts(_three_hosts):
    """alpha, beta and gamma, on which nothing runs yet, and fast links between them."""
    yield _three_hosts
    _three_hosts.sweep()


@pytest.fixture
def cut(hosts):
    """Return a function that takes a host from the network until the test ends."""
    away = []

    def take_away(name):
        away.append(name)
        hosts.cut(name)

    yield take_away
    for name in away:
        hosts.mend(name)


@pytest.fixture
def shaped(hosts):
    """Return a function that makes the links slow or long until the test ends, or skips it."""
    done = []

    def make(link):
        reason = why_not(link)
        if reason:
            pytest.skip(reason)
        done.append(link)
        hosts.shape(link)

    yield make
    if done:
        hosts.shape(Link())

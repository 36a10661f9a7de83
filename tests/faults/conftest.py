"""The campaign's fixture, and what its reports say for the table at the end."""

import pathlib

import pytest
from hypothesis import settings

from tests.faults.harness import Case
from tests.faults.table import FAULT

_HERE = pathlib.Path(__file__).parent

# The same inputs every time; the slow machines of CI have all the time that they need.
settings.register_profile("faults", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("faults")


@pytest.fixture
def case(request, tmp_path):
    """A hostile case; see `harness.Case`."""
    made = request.node.stash.setdefault(_CASE, Case(tmp_path))
    yield made
    made.close()


_CASE = pytest.StashKey[Case]()


def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if _HERE in item.path.parents]
    for item in ours:
        item.add_marker("faults")
    every = config.getoption("faults_every")
    dropped = [item for number, item in enumerate(ours) if number % every]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and not report.skipped and _CASE in item.stash:
        case, error = item.stash[_CASE], call.excinfo and call.excinfo.value
        outcome = case.outcome if error is None else getattr(error, "outcome", None)
        if outcome is None:  # an assertion of the test, or what nobody has foreseen
            outcome = "silent" if isinstance(error, AssertionError) else "traceback"
        area = item.path.stem.removeprefix("test_").replace("_", " ")
        report.user_properties.append((FAULT, (area, outcome, max(case.tried, 1), call.duration)))
    return report

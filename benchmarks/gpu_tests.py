"""A pytest plugin (`-p gpu_tests`) for the tests of `gpu.sh`: each outcome is a row at once, and what fails
is written to OUT/failures.txt with its text; what has passed before is left out; what needs a package
that is not here (a stand-in) is skipped."""
import os
import pytest
from gpu import ABSENT, OUT, add, rows

def pytest_collection_modifyitems(config, items):
    if os.environ.get('AGAIN'): return
    passed = {o['test'] for o in rows(OUT, 'test') if o['outcome']=='passed'}
    before = [o for o in items if o.nodeid in passed]
    config.hook.pytest_deselected(items=before)
    items[:] = [o for o in items if o.nodeid not in passed]

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and ABSENT in report.longreprtext:
        report.outcome,report.longrepr = 'skipped',(str(item.path), 0, f'needs what {ABSENT}')
    return report

def pytest_configure(config):
    if not hasattr(config, 'workerinput'): config.pluginmanager.register(Rows())

class Rows:
    "Outcomes, in the one process that hears of all of them"
    def pytest_runtest_logreport(self, report):
        if report.failed:
            with open(OUT/'failures.txt', 'a') as f:
                f.write(f'== {report.nodeid} ({report.when})\n{report.longreprtext[-2500:]}\n\n')
        if report.when=='call' or report.when=='setup' and not report.passed:
            add('test', test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 1))

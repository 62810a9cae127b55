"""A pytest plugin (`-p gpu_failures`): what fails is written at once to OUT/failures.txt, with its text,
and the outcome and seconds of every test to OUT/tests.txt."""
import os
from pathlib import Path

OUT = Path(os.environ.get('OUT', '.'))

def pytest_runtest_logreport(report):
    if 'PYTEST_XDIST_WORKER' in os.environ: return
    if report.failed:
        with open(OUT/'failures.txt', 'a') as f:
            f.write(f'== {report.nodeid} ({report.when})\n{report.longreprtext[-2500:]}\n\n')
    if report.when=='call':
        with open(OUT/'tests.txt', 'a') as f:
            f.write(f'{report.outcome} {report.duration:.1f} {report.nodeid}\n')

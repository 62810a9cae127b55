"""The runs of studies on a machine with one CUDA device, but without the scans and without a network.

    python benchmarks/gpu_studies.py pack CARRIED acdc-64=ACDC hippocampus=MSD_HIPPOCAMPUS phantom
    python benchmarks/gpu_studies.py run CARRIED OUT --processes 14 --limit 500 PLAN@acdc-64 PLAN@hippocampus:1,2
    python benchmarks/gpu_studies.py merge studies OUT

`pack`, here: the prepared slices of each cohort, at the recipe of the preset of that name, in
CARRIED/PRESET.slices.npz. `run`, there: every run of the plans that is not in CARRIED/runs.jsonl (what
an earlier call brought back) or in OUT, scored on the slices (valid-slices; --score); seed after seed,
so that what a limit cuts off is the last seed of all rows. `:1,2` are numbers of labelled subjects
instead of the preset's. Many processes share a device best behind NVIDIA's multiplexer
(`nvidia-cuda-mps-control -d` before). OUT gets runs.jsonl, scores.csv and scans.csv after each run.
`merge`, here: OUT's runs into a folder of evidence, of which
`fastmiseg-compare PLAN --preset acdc-64 --score valid-slices` (with `--labeled 1`) then writes the table.
"""
import argparse, os, shutil, sys, tempfile, time
from dataclasses import replace
from pathlib import Path

from gpu import stand_ins

FILES = 'runs.jsonl','scores.csv','scans.csv'

def without_scans():
    "What reads scans is not needed where there are only slices"
    folder = tempfile.mkdtemp()
    stand_ins(folder, ['SimpleITK','pydicom','nibabel'])
    sys.path.append(folder)
    os.environ['PYTHONPATH'] = os.pathsep.join(o for o in (os.environ.get('PYTHONPATH'), folder) if o)

def pack(folder, cohorts):
    from fastmiseg.packed import pack_slices
    from fastmiseg.scans.cohort import load_cohort
    from fastmiseg.scans.phantom import make_phantom
    from fastmiseg.scans.recipe import Recipe
    from fastmiseg.study.preset import presets
    Path(folder).mkdir(parents=True, exist_ok=True)
    for cohort in cohorts:
        name,_,data = cohort.partition('=')
        with tempfile.TemporaryDirectory() as tmp:
            df = load_cohort(data) if data else make_phantom(Path(tmp)/'scans', n_subjects=40, seed=0)
            file = pack_slices(df, Recipe.named(presets[name].recipe, df),
                               Path(folder)/f'{name}.slices.npz', Path(tmp)/'slices')
        print(f'{file}: {file.stat().st_size/2**20:.1f} MiB')

def plans_of(words):
    "(study, preset) of each PLAN@PRESET:LABELLED"
    from fastmiseg.study.plans import find_study
    from fastmiseg.study.preset import presets
    for word in words:
        plan,_,where = word.partition('@')
        name,_,numbers = where.partition(':')
        for n in numbers.split(',') if numbers else [None]:
            yield find_study(plan), replace(presets[name], **(dict(labeled=int(n)) if n else {}))

def all_jobs(carried, evidence, words, args):
    "Label -> arguments of `make_run`, seed after seed over all plans"
    from fastmiseg.study.run import missing_runs
    jobs = {}
    for study,preset in plans_of(words):
        changes = {k:getattr(args, k) for k in ('epochs','n_iters') if getattr(args, k)}
        preset = replace(preset, settings=replace(preset.settings, **changes))
        data = Path(carried)/f'{preset.name}.slices.npz'
        _,missing = missing_runs(study, data, evidence, preset, args.seeds, args.score)
        jobs.update({f'{study.name} {preset.name} {preset.labeled} {k}':o for k,o in missing.items()})
    return dict(sorted(jobs.items(), key=lambda o: o[1]['run']['settings']['seed']))

def copy(evidence, out):
    for name in FILES:
        if (file:=evidence/name).exists():
            shutil.copy(file, out/f'.{name}')
            os.replace(out/f'.{name}', out/name)

def run(carried, out, words, args):
    begun = time.monotonic()
    without_scans()
    from fastmiseg.study.evidence import Evidence
    from fastmiseg.study.work import make_runs, versions
    out,evidence = Path(out),Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    there = Evidence(evidence)
    for o in (carried, out): there.merge(o)
    jobs = all_jobs(carried, evidence, words, args)
    print(f'{versions()}: {len(jobs)} runs to make, {len(there.runs())} are there, '
          f'{time.monotonic()-begun:.0f} s so far', flush=True)
    done = []
    def ended(label):
        copy(evidence, out)
        done.append(label)
        print(f'{time.monotonic()-begun:.0f} s: {len(done)} of {len(jobs)}: {label}', flush=True)
    seconds = None if args.limit is None else args.limit-(time.monotonic()-begun)
    left = []
    try: left = make_runs(jobs, args.processes, seconds, ended)
    finally: copy(evidence, out)
    print(f'{len(done)} runs made, {len(left)} left, {time.monotonic()-begun:.0f} s', flush=True)

def merge(folder, outs):
    from fastmiseg.study.evidence import Evidence
    for o in outs: print(f'{o}: {Evidence(folder).merge(o)} new runs')

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['pack','run','merge'])
    parser.add_argument('folder')
    parser.add_argument('more', nargs='+')
    parser.add_argument('--processes', type=int, default=14)
    parser.add_argument('--limit', type=float, help='seconds')
    parser.add_argument('--seeds', type=int, default=3)
    parser.add_argument('--score', default='valid-slices')
    for k in ('epochs','n_iters'): parser.add_argument(f"--{k.replace('_', '-')}", type=int)
    args = parser.parse_intermixed_args()
    if args.what=='run': run(args.folder, args.more[0], args.more[1:], args)
    else: dict(pack=pack, merge=merge)[args.what](args.folder, args.more)

"""This library's base, trained on labels alone, beside nnU-Net's own 2D pipeline: same slices, equal processor time.

    pip install nnunetv2             # for this comparison only
    python studies/nnunet.py DATA    # the runs that are not in studies/nnunet/ yet, then the page
    python studies/nnunet.py         # studies/nnunet.md again, from studies/nnunet/

DATA is a folder of ACDC's scans, or a file of slices from `python benchmarks/gpu_studies.py pack`; --rows and --seeds
take some of the runs. nnU-Net gets the prepared slices of the labelled scans as a raw dataset, plans, preprocesses and
trains on all of it on one core of a CPU, until it has spent the processor time of the base's first run here, or `times`
that.
"""
import argparse, json, os, random, tempfile, time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import mean

here = Path(__file__).parent
hearts = 'background','RV','Myo','LV'
base = 'Labels only'
ours = {base: {}, "Labels only, augment='strong'": dict(augment='strong')}
theirs = {'nnU-Net, batches of 8': dict(batch=8), 'nnU-Net as planned': {},
          'nnU-Net, batches of 8, 4 times the time': dict(batch=8, times=4)}

about = """# Beside nnU-Net's own 2D pipeline

    python studies/nnunet.py DATA

What the labels alone give, in this library and in nnU-Net, for the same processor time: ACDC, 3 annotated patients
(6 scans; other patients in each draw), scored on the 20 validation patients (40 scans) on the grid of the slices,
64×64 at 2.5 mm. No test scan was scored. Final checkpoint, mean of the draws (and each). *Not found*: structures
that are only in the mask or only in the prediction of a scan; their Dice is 0, and they have no HD95.

{table}

At equal processor time this library's base is ahead in each of the three draws. A step of nnU-Net with batches of 8
costs 4 times as much here (it has 3.6 times the parameters and takes slices of 64 instead of crops of 48), so that it
makes 230 to 270 steps, or 360 to 540 with the smaller batches that it plans, with a pipeline made for 250,000. With
four times the time it comes closer (1,308 steps, one draw) and is still behind. What it reaches with hours these
trainings do not say.

- **This library**: U-Net of width 16 (2.2 million parameters), cross-entropy + Dice, 1,000 steps of 8 slices, crops
  of 48, rotations of 45°, both flips, intensities by 0.3, Adam, one cycle up to 0.005: the preset `acdc-64`.
  `augment='strong'` adds nnU-Net's changes (turns, scale, noise, blur, brightness, contrast, low resolution,
  gamma).
- **nnU-Net**: the prepared slices of the labelled scans are its raw dataset (NIfTI; nothing is left to resample),
  planned with `-c 2d`: 64×64, five stages of 32 to 512 channels (7.8 million parameters), instance norm, batches of
  5 in draw 0 and of 3 in the others (nnU-Net lets a batch hold at most a twentieth of all pixels). Its own
  augmentation, deep supervision, loss, foreground sampling (a third) and SGD (0.01, momentum 0.99, polynomial decay,
  which follows the processor time here instead of 1,000 epochs of 250 steps); trained on all labelled scans (fold
  `all`), without its looks at validation batches. Predicted by its sliding window, without mirroring (its default
  mirrors; this library is scored without, too).
- **Processor time**: user and system time of training on one thread, augmentation in the same process. Planning,
  preprocessing and prediction do not count. Other work shared the cores, in both trainings.
- Rows with (GPU) are trainings of `choice/README.md` with the same settings, draws and validation scans.

Every setting and nnU-Net's plan are in `nnunet/runs.jsonl`, scores by scan and class in `nnunet/scores.csv`. Made
with {made_with}.
"""

def processor_seconds(): return sum(os.times()[:4])

def n_parameters(model): return sum(p.numel() for p in model.parameters())

def jobs_of(data, labeled, seeds, evidence):
    "Row, seed -> arguments of `make_run`: settings, the cohort with its split, and the slices"
    from fastmiseg.study.plans import Study, strong
    from fastmiseg.study.preset import presets
    from fastmiseg.study.run import missing_runs
    rows = {k:dict(method='partial', **strong, **o) for k,o in ours.items()}
    study = Study('nnunet', 'Beside nnU-Net', rows, draws=True)
    preset = replace(presets['acdc-64'], labeled=labeled)
    wanted,jobs = missing_runs(study, data, evidence, preset, seeds, 'valid-slices')
    where = [(k, run['settings']['seed']) for k,run in wanted]
    return {(k, seed): jobs[f'{k}, seed {seed}'] for k,seed in where}

def train_ours(job):
    "Scores of validation scans, and what describes the run"
    from fastmiseg.scans.recipe import Recipe
    from fastmiseg.settings import Settings
    from fastmiseg.study.work import evaluate_slices
    from fastmiseg.training import fit
    s,begun = Settings.from_dict(job['run']['settings']),processor_seconds()
    learn,_ = fit(s, job['df'], Recipe.from_dict(job['run']['recipe']), job['store'], quiet=True)
    seconds = processor_seconds()-begun
    scores,steps = evaluate_slices(learn, job['df'], job['store'], 'valid'),s.epochs*s.n_iters
    return scores,dict(seconds=round(seconds), steps=steps, parameters=n_parameters(learn.model), settings=s.to_dict())

def write_raw(slices, scans, folder):
    "Scans of slices as nnU-Net's raw dataset: NIfTI, millimetres between pixels and slices"
    import SimpleITK as sitk
    for part in ('imagesTr','labelsTr'): (folder/part).mkdir(parents=True)
    for scan in scans:
        arrays = {f'imagesTr/{scan}_0000': slices.image(scan, slice(None))[:,0],
                  f'labelsTr/{scan}': slices.mask(scan, slice(None))}
        for file,array in arrays.items():
            image = sitk.GetImageFromArray(array)
            image.SetSpacing([float(o) for o in slices.where(scan).slice_spacing[::-1]])
            sitk.WriteImage(image, str(folder/f'{file}.nii.gz'))
    dataset = dict(channel_names={'0':'MRI'}, labels={k:i for i,k in enumerate(hearts)}, numTraining=len(scans),
                   file_ending='.nii.gz')
    (folder/'dataset.json').write_text(json.dumps(dataset))

def plan_and_preprocess(batch):
    "As `nnUNetv2_plan_and_preprocess -d 1 -c 2d`; then batches of another size, where one is given"
    from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
    extract_fingerprints([1], num_processes=1, show_progress_bar=False)
    name = plan_experiments([1])
    preprocess([1], name, ['2d'], [1], show_progress_bar=False)
    file = Path(os.environ['nnUNet_preprocessed'])/'Dataset001_Hearts'/f'{name}.json'
    plans = json.loads(file.read_text())
    if batch: plans['configurations']['2d']['batch_size'] = batch
    return plans,json.loads((file.parent/'dataset.json').read_text())

def train_for(trainer, seconds):
    "Training steps until the processor time is spent; nnU-Net's polynomial schedule over that time"
    trainer.on_train_start()
    trainer.network.train()
    begun,steps = processor_seconds(),0
    while (spent := processor_seconds()-begun)<seconds:
        for o in trainer.optimizer.param_groups: o['lr'] = trainer.initial_lr*(1-spent/seconds)**.9
        trainer.train_step(next(trainer.dataloader_train))
        steps += 1
    trainer.set_deep_supervision_enabled(False)
    trainer.network.eval()
    return spent,steps

def predict_and_score(trainer, df, slices, recipe, mirror):
    import pandas as pd
    from fastmiseg.surface import score_volume
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    predictor = nnUNetPredictor(use_mirroring=mirror, device=trainer.device, allow_tqdm=False)
    predictor.manual_initialization(
        trainer.network, trainer.plans_manager, trainer.configuration_manager, [trainer.network.state_dict()],
        trainer.dataset_json, 'nnUNetTrainer', trainer.inference_allowed_mirroring_axes)
    found = []
    for r in df[df.split=='valid'].itertuples():
        image,spacing = slices.image(r.scan, slice(None))[:,0],[float(o) for o in slices.where(r.scan).slice_spacing]
        pred = predictor.predict_single_npy_array(image[None], dict(spacing=spacing))
        scores = score_volume(pred, slices.mask(r.scan, slice(None)), spacing, recipe.classes)
        found.append(scores.assign(subject=r.subject, scan=r.scan))
    return pd.concat(found)

def train_nnunet(job, seconds, batch=None, mirror=False):
    "Scores of validation scans, and what describes the run"
    import numpy as np, torch
    from fastmiseg.packed import open_store
    from fastmiseg.scans.recipe import Recipe
    df,recipe = job['df'],Recipe.from_dict(job['run']['recipe'])
    slices = open_store(job['store'], recipe).prepare(df[df.split!='test'])
    with tempfile.TemporaryDirectory() as tmp:
        for o in ('raw','preprocessed','results'): os.environ[f'nnUNet_{o}'] = f'{tmp}/{o}'
        os.environ.update(nnUNet_n_proc_DA='1', nnUNet_def_n_proc='1')
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
        write_raw(slices, list(df.scan[df.split=='labeled']), Path(tmp)/'raw'/'Dataset001_Hearts')
        plans,dataset = plan_and_preprocess(batch)
        os.environ['nnUNet_n_proc_DA'] = '0' # augmentation in this process, so that its time counts
        torch.set_num_threads(1)
        for o in (random.seed, np.random.seed, torch.manual_seed): o(job['run']['settings']['seed'])
        trainer = nnUNetTrainer({**plans, 'continue_training':False}, '2d', 'all', dataset, torch.device('cpu'))
        spent,steps = train_for(trainer, seconds)
        scores = predict_and_score(trainer, df, slices, recipe, mirror)
    plan = {k:o for k,o in plans['configurations']['2d'].items() if not k.startswith('resampling')}
    return scores,dict(seconds=round(spent), steps=steps, parameters=n_parameters(trainer.network), mirror=mirror,
                       plan=plan, nnunetv2=version('nnunetv2'))

def name(run): return f"{run['row']}|{run['labeled']}|{run['seed']}"

def made(): return [json.loads(o) for o in (here/'nnunet'/'runs.jsonl').read_text().splitlines()]

def add(run, scores):
    "One more run in studies/nnunet/"
    scores = scores.assign(run=name(run))[['run','scan','class','dice','hd95']]
    scores.to_csv(here/'nnunet'/'scores.csv', mode='a', header=False, index=False, float_format='%.4f')
    with open(here/'nnunet'/'runs.jsonl', 'a') as f: f.write(json.dumps(run)+'\n')

def make(data, labeled, seeds, rows):
    "The runs that are not there, seed after seed"
    import torch
    from fastmiseg.study.work import versions
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp: jobs = jobs_of(data, labeled, seeds, tmp)
    for seed,row in ((seed, row) for seed in seeds for row in rows):
        there = made()
        if (labeled,seed,row) in [(o['labeled'],o['seed'],o['row']) for o in there]: continue
        begun = time.time()
        if row in ours: scores,how = train_ours(jobs[row,seed])
        else:
            spent = next(o['seconds'] for o in there if (o['row'],o['labeled'])==(base,labeled))
            settings = dict(theirs[row])
            scores,how = train_nnunet(jobs[base,seed], settings.pop('times', 1)*spent, **settings)
        add(dict(row=row, labeled=labeled, seed=seed, versions=versions(), **how), scores)
        took = f"{how['steps']} steps in {how['seconds']} s; {time.time()-begun:.0f} s in all"
        print(f'{row}, seed {seed}: {scores.dice.mean():.3f}, {took}', flush=True)

def numbers(values, digits):
    each = [f'{o:.{digits}f}' for o in values]
    return f"{mean(values):.{digits}f} ({', '.join(each)})" if len(each)>1 else ''.join(each)

def chosen(labeled):
    "This library's runs on a GPU, by which settings were chosen: the same settings, draws and validation scans"
    for o in map(json.loads, (here/'choice'/'runs.jsonl').read_text().splitlines()):
        row = o['row'].capitalize()
        if (o['cohort'],o['round'],o['labeled'])==('acdc',2,labeled) and row in ours:
            steps = o['settings']['epochs']*o['settings']['n_iters']
            yield dict(row=f'{row} (GPU)', run=o['id'], seed=o['settings']['seed'], steps=steps, versions=o['versions'])

def table(runs):
    "A line for each row: mean of the draws (and each)"
    import pandas as pd
    from fastmiseg.study.report import markdown
    scores,lines = pd.concat([pd.read_csv(here/o/'scores.csv') for o in ('nnunet','choice')]),[]
    of_run = scores.groupby('run')[['dice','hd95']].mean()
    missed = scores.hd95.isna().groupby(scores.run).sum()
    for row in dict.fromkeys(o['row'] for o in runs):
        group = sorted((o for o in runs if o['row']==row), key=lambda o: o['seed'])
        found,minutes = of_run.loc[[o['run'] for o in group]],[o['seconds']/60 for o in group if 'seconds' in o]
        lines.append([row, ', '.join(str(o['seed']) for o in group), numbers(found.dice, 3), numbers(found.hd95, 1),
                      ', '.join(str(missed[o['run']]) for o in group), ', '.join(f"{o['steps']:,}" for o in group),
                      numbers(minutes, 1) if minutes else ''])
    return markdown(['','draws','Dice','HD95 (mm)','not found','steps','processor minutes'], lines)

def page(labeled=3):
    runs,order = [dict(o, run=name(o)) for o in made() if o['labeled']==labeled],[*ours, *theirs]
    runs = [*chosen(labeled), *sorted(runs, key=lambda o: order.index(o['row']))]
    made_with = sorted({o['versions']+(f", nnunetv2 {o['nnunetv2']}" if 'nnunetv2' in o else '') for o in runs})
    return about.format(table=table(runs), made_with='; '.join(made_with))

if __name__=='__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', nargs='?')
    parser.add_argument('--labeled', type=int, default=3)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    parser.add_argument('--rows', nargs='+', default=[*ours, *theirs], choices=[*ours, *theirs], metavar='ROW')
    args = parser.parse_args()
    if args.data: make(args.data, args.labeled, args.seeds, args.rows)
    (here/'nnunet.md').write_text(page(), encoding='utf-8')

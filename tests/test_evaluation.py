"Whose scores they are, and what a class costs that was missed"
import numpy as np, pandas as pd, pytest

from fastmiseg.evaluation import evaluate_cohort
from fastmiseg.scores import score_table, scores_text
from fastmiseg.surface import score_volume

def scores(masks, preds, spacing=(5.,1.,2.)):
    "As `evaluate_cohort` returns them"
    rows = []
    for i,(m,p) in enumerate(zip(masks, preds)):
        diagonal = np.linalg.norm(np.multiply(m.shape, spacing))
        one = score_volume(p, m, spacing, ('background','a','b'))
        rows.append(one.assign(subject=f's{i}', scan=f's{i}', split='test', diagonal=diagonal))
    return pd.concat(rows, ignore_index=True)

@pytest.fixture
def cases():
    "Three scans: all right; b is missed; b is found where there is none"
    rng = np.random.default_rng(0)
    full = rng.integers(0, 3, (3,8,9)).astype(np.uint8)
    without = np.where(full==2, 0, full)
    return [full, full, without],[full, without, full]

def test_a_missed_class_counts_as_the_diagonal(cases):
    s = scores(*cases)
    assert s.hd95.isna().sum()==2==s['assd'].isna().sum()
    b = score_table(s).set_index('class').loc['b']
    assert b.hd95==pytest.approx(2*np.linalg.norm([15,8,18])/3)
    assert (b.missed,b.with_class,b.invented,b.scans)==(1,2,1,3)
    assert score_table(s, 'nan').set_index('class').hd95['b']==0
    assert score_table(s, 374).set_index('class').hd95['b']==pytest.approx(2*374/3)

def test_a_missed_class_is_worse_than_one_in_the_farthest_corner(cases):
    mask,far = np.zeros((2,3,8,9), np.uint8)
    mask[0,0,0],far[-1,-1,-1] = 1,1
    a,b = (score_table(scores([mask], [o])).set_index('class').loc['a'] for o in (far, far*0))
    assert a.hd95<b.hd95 and a['assd']<b['assd']

def test_means_over_scans_then_over_classes(cases):
    s = scores(*cases)
    t = score_table(s).set_index('class')
    assert t.dice['mean']==pytest.approx(s.groupby('class').dice.mean().mean())
    assert t.dice['b']==pytest.approx(1/3)

def test_the_same_from_a_file(cases, tmp_path):
    s = scores(*cases)
    s.to_csv(tmp_path/'metrics.csv', index=False)
    pd.testing.assert_frame_equal(score_table(pd.read_csv(tmp_path/'metrics.csv')), score_table(s))

def test_the_text_says_what_it_is_about(cases):
    s = scores(*cases)
    said = scores_text(pd.concat([s, s.assign(split='labeled', subject='s')]))
    assert 'test: 3 scans of 3 subjects\n' in said
    assert 'labeled: 3 scans of 1 subject, which the network was trained on' in said
    assert '1 of 2' in said and '1 of 1' in said and 'Means over scans' in said and 'the diagonal of the scan' in said
    assert '374 mm' in scores_text(s, 374) and 'is left out of HD95' in scores_text(s, 'nan')
    assert 'was missed' not in scores_text(s[s.scan=='s0'])

def test_scores_that_do_not_say_the_diagonal(cases):
    s = scores(*cases).drop(columns='diagonal')
    with pytest.raises(ValueError, match="no column 'diagonal' .*give `missed` in mm"): score_table(s)
    assert len(score_table(s[s.scan=='s0']))==3

def test_parts_of_the_split(heart):
    df,go = heart.df,lambda df, **kw: evaluate_cohort(heart.learn, df, progress=False, **kw)
    held = go(df)
    assert set(held.split)=={'valid','test'} and held.attrs['left_out']=={'labeled':9}
    of = dict(zip(df.scan, df.split))
    assert all(of[s]==k for s,k in zip(held.scan, held.split))
    with pytest.raises(ValueError, match="no scan with a mask is in 'train'; there are labeled"): go(df, split='train')
    some = pd.concat([df[df.split=='labeled'][:1], df[df.split=='valid'][:1]])
    assert list(dict.fromkeys(go(some, split='all').split))==['labeled','valid']
    with pytest.warns(UserWarning, match='all scans with a mask are of the training'): go(some[:1])

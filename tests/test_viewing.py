"What a viewer of scans is handed"
import gzip, sys

import nibabel, numpy as np, pytest
from matplotlib.colors import to_rgb

from fastmiseg.scans.messages import VolumeError
from fastmiseg.scans.recipe import Recipe
from fastmiseg.scans.volume import Volume, resample, write_volume
from fastmiseg.show import class_color
from fastmiseg.viewing import ScanPicture, plot_volume, view_scan

rotated = (.8,-.6,0., .6,.8,0., 0.,0.,1.)

def files(tmp_path):
    "A scan of two channels with an oblique direction, its mask, and a prediction on a grid of its own"
    rng = np.random.default_rng(0)
    scan = Volume(rng.normal(size=(2,3,4,5)).astype(np.float32), (5.,1.5,1.), (10.,-20.,30.), rotated)
    mask = Volume(rng.integers(0, 3, (3,4,5)).astype(np.uint8), (5.,1.5,1.), (10.,-20.,30.), rotated)
    pred = Volume(rng.integers(0, 2, (6,4,5)).astype(np.uint8), (2.5,1.5,1.), (10.,-20.,28.75), rotated)
    for k,o in dict(scan=scan, mask=mask, pred=pred).items(): write_volume(o, tmp_path/f'{k}.nii.gz')
    return scan,mask,pred

def handed(volume):
    "A volume of the widget, as nibabel reads its bytes"
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(volume.data))

def test_image_mask_and_prediction_are_handed_over_in_their_own_geometry(tmp_path):
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    scan,mask,pred = files(tmp_path)
    for given in ([tmp_path/f'{k}.nii.gz' for k in ('scan','mask','pred')], [scan,mask,pred]):
        viewer = view_scan(*given, classes=['background','RV','LV']).children[0]
        assert [o.name for o in viewer.volumes]==['scan.nii.gz','mask.nii.gz','prediction.nii.gz']
        for o,vol in zip(viewer.volumes, (Volume(scan.array[0], *geometry(scan)), mask, pred)):
            im = handed(o)
            np.testing.assert_allclose(im.get_fdata(), vol.array.T)
            np.testing.assert_allclose(im.affine, affine_of(vol), atol=1e-5)

def geometry(vol): return vol.spacing,vol.origin,vol.direction

def affine_of(vol):
    "From voxel (x,y,z) to NIfTI's world, computed by SimpleITK"
    im = vol.to_sitk()
    corner = np.array(im.TransformIndexToPhysicalPoint((0,0,0)))
    steps = [np.array(im.TransformIndexToPhysicalPoint(i))-corner for i in ((1,0,0),(0,1,0),(0,0,1))]
    return np.diag([-1,-1,1,1])@np.vstack([np.column_stack([*steps, corner]), [0,0,0,1]])

def test_masks_have_the_colours_of_their_classes_and_a_slider(tmp_path):
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    scan,mask,_ = files(tmp_path)
    viewer,key,_,controls = view_scan(scan, mask.array).children
    image,overlay = viewer.volumes
    assert image.cal_min<image.cal_max and image.colormap=='gray'
    lut = np.reshape(overlay.colormap_label.lut, (-1,4))
    assert lut[0,3]==0 and overlay.colormap_label.labels==['background','class 1','class 2']
    for c in (1,2): assert lut[c].tolist()==[*np.round(255*np.array(to_rgb(class_color(c)))).astype(int), 255]
    for c in (1,2): assert f'{class_color(c)}">&#9632;</span> class {c}' in key.value
    view,*sliders = controls.children
    assert [o.description for o in sliders]==['scan','mask']
    sliders[1].value = .2
    assert (image.opacity,overlay.opacity)==pytest.approx((1,.2))
    view.value = view.options['axial']
    assert viewer.opts.slice_type==view.options['axial']

@pytest.mark.parametrize('turn', [np.eye(3), np.diag([-1.,1,-1]), np.eye(3)[[1,2,0]], np.reshape(rotated, (3,3))])
def test_the_viewer_opens_in_the_middle_of_the_mask_with_the_sides_of_the_plots(tmp_path, turn):
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    vol = Volume(np.random.rand(4,6,10).astype(np.float32), (5.,1.5,1.), (10.,-20.,30.), tuple(turn.ravel()))
    mask = np.zeros(vol.shape, np.uint8)
    mask[1,4,7] = 1
    viewer = view_scan(vol, mask).children[0]
    drawn = nibabel.as_closest_canonical(handed(viewer.volumes[1])) # right, anterior, superior, as NiiVue turns it
    where = np.argwhere(drawn.get_fdata())[0]
    np.testing.assert_allclose(viewer.scene.crosshair_pos, (where+.5)/drawn.shape, atol=1e-6)
    assert viewer.opts.is_radiological_convention

@pytest.mark.parametrize('kind, shown', [(np.int16,np.int16), (np.uint8,np.uint8), (np.int32,np.float32)])
def test_the_viewer_gets_a_scan_in_its_own_small_type(kind, shown):
    "A CT is large: as floats it would be compressed and sent for minutes"
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    vol = Volume(np.arange(240).reshape(4,6,10).astype(kind), (5.,1.5,1.))
    found = handed(view_scan(vol).children[0].volumes[0])
    assert found.get_data_dtype()==shown and np.array_equal(found.get_fdata().T, vol.array)

def test_the_viewer_opens_in_the_middle_of_an_empty_scan_and_names_large_values(tmp_path):
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    scan = files(tmp_path)[0]
    assert view_scan(scan).children[0].scene.crosshair_pos==[.5]*3
    mask = np.full(scan.shape, 0)
    assert view_scan(scan, mask, classes=['background','LV']).children[0].scene.crosshair_pos==[.5]*3
    mask[1,2,3] = 500
    overlay = view_scan(scan, mask).children[0].volumes[1]
    assert overlay.colormap_label.labels==['background','class 500'] and handed(overlay).get_fdata().max()==1

def test_the_viewer_says_what_is_at_the_crosshair(tmp_path):
    pytest.importorskip('ipyniivue', reason='ipyniivue is not installed')
    scan,mask,pred = files(tmp_path)
    viewer,_,words,_ = view_scan(scan, mask, pred, ['background','RV','LV']).children
    values = [dict(value=o) for o in (207.25, 2., 7.)] # the prediction has a class without a name
    viewer._handle_custom_msg(dict(event='location_change', data=dict(mm=[12.2,-30.,5.], values=values)), [])
    assert words.value=='at the crosshair (12 R, 30 P, 5 S mm): intensity 207.2; mask: LV; prediction: class 7'

def test_without_the_package_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'ipyniivue', None)
    with pytest.raises(ImportError, match='needs the package ipyniivue.*pip install ipyniivue, then restart'):
        view_scan(files(tmp_path)[0])

@pytest.mark.parametrize('which', ['mask','pred'])
def test_pictures_refuse_masks_on_another_grid(which, tmp_path):
    "Slices show a mask voxel by voxel, in whatever order its file has them"
    scan = Volume(np.random.rand(3,12,10).astype(np.float32), (5.,1.,1.), path='scan')
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[1,3:6,:3] = 1
    mirrored = Volume(np.ascontiguousarray(drawn[:,:,::-1]), (5.,1.,1.), (9.,0.,0.), (-1.,0.,0., 0.,1.,0., 0.,0.,1.))
    write_volume(mirrored, tmp_path/'m.nii.gz')
    for o,name in ((mirrored,'the mask'), (tmp_path/'m.nii.gz',str(tmp_path/'m.nii.gz'))):
        with pytest.raises(VolumeError, match=rf'{name}: its origin is \(9.0, 0.0, 0.0\), but that of scan is'):
            plot_volume(scan, **{which:o})
    with pytest.raises(VolumeError, match=r'has \(3, 6, 5\) voxels .*, but scan has \(3, 12, 10\); they must lie'):
        plot_volume(scan, **{which:drawn[:,::2,::2]})
    back = resample(mirrored, to=scan, nearest=True)
    np.testing.assert_array_equal(ScanPicture.of(scan, back, None, Recipe()).mask, drawn)

def test_the_map_of_disagreement_belongs_to_its_scan(tmp_path):
    from matplotlib import pyplot as plt
    from fastmiseg.viewing import plot_uncertainty
    scan = Volume(np.random.rand(3,12,10).astype(np.float32), (5.,1.,1.), path='scan')
    pred,doubt = np.zeros(scan.shape, np.uint8),np.zeros(scan.shape, np.float32)
    pred[1,3:6,3:6] = 1
    doubt[1,4,5] = .5
    write_volume(scan.like(doubt), tmp_path/'doubt.nii.gz')
    fig = plot_uncertainty(scan, tmp_path/'doubt.nii.gz', pred, n=1)
    shown = fig.axes[1].images[-1].get_array()
    assert np.argwhere(shown>0).tolist()==[[4,5]] and shown.max()==.5
    high = plot_uncertainty(Volume(scan.array, (1.,3.,1.)), doubt, pred, n=1, axis=0)
    assert [ax.get_aspect() for ax in high.axes[:2]]==[3,3] # of both rows, the patient's
    with pytest.raises(ValueError, match=r'uncertainty: has shape \(2, 12, 10\), but the scan has \(3, 12, 10\)'):
        plot_uncertainty(scan, doubt[:2])
    with pytest.raises(VolumeError, match=r'uncertainty: its origin is \(0.0, 0.0, 5.0\), but that of scan is'):
        plot_uncertainty(scan, Volume(doubt, scan.spacing, (0.,0.,5.)))
    plt.close('all')

def test_classes_without_a_name_are_in_the_legend():
    "They are drawn, so that the picture says what they are"
    from matplotlib import pyplot as plt
    scan = Volume(np.random.rand(3,12,10).astype(np.float32), (5.,1.,1.), path='scan')
    mask = np.zeros(scan.shape, np.uint8)
    mask[1,3:6,3:6],mask[1,7:9,3:6] = 1,3
    fig = plot_volume(scan, mask, classes=('background','RV'), n=1)
    assert [o.get_text() for o in fig.legends[0].get_texts()][:3]==['RV','class 2','class 3']
    plt.close('all')

def test_values_of_mask_files_are_what_the_recipe_says(tmp_path):
    "A mask and a prediction with the values of the files; arrays hold class indices"
    from matplotlib import pyplot as plt
    scan = Volume(np.random.rand(3,12,10).astype(np.float32), (5.,1.,1.), path='scan')
    drawn = np.zeros(scan.shape, np.uint8)
    drawn[1,3:6,3:6],drawn[1,7:9,3:6] = 1,2
    high = scan.like(np.array([0,850,205], np.int16)[drawn])
    write_volume(high, tmp_path/'m.nii.gz')
    recipe = Recipe(size=(12,10), classes=('background','LV','RV'), labels={850:1, 205:2})
    def shown(**kwargs):
        fig = plot_volume(scan, tmp_path/'m.nii.gz', zoom=False, n=1, **kwargs)
        errors = fig.axes[-1].images[-1].get_array()[...,3]
        plt.close(fig)
        return [o.get_text() for o in fig.legends[0].get_texts()][:2],int((errors>0).sum())
    for pred in (high, tmp_path/'m.nii.gz', drawn): assert shown(pred=pred, recipe=recipe)==(['LV','RV'], 0)
    assert shown(pred=high)==(['class 205','class 850'], 0) # without a recipe in the order of the values
    with pytest.raises(VolumeError, match='m.nii.gz: holds the value 850, declared are 0, 205'):
        plot_volume(scan, tmp_path/'m.nii.gz', recipe=Recipe(labels={205:1}))

"""Pictures that are segmented in tiles: the mask of the whole, at any size of tile, with damage, in little memory."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from finetune.predict import main
from finetune.tasks.segmentation.scenes import Mosaic
from tests.conftest import has, names
from tests.finetune.tasks.segmentation.helpers import config, png, scene, weights_file

VOID = 255


def add(mosaic: Mosaic, top: int, left: int, mask: np.ndarray) -> None:
    mosaic.add(top, left, mask, torch.from_numpy(np.repeat(mask[None].astype(np.uint8), 3, 0)))


def test_overlapping_tiles_make_the_whole():
    whole, mosaic = np.random.default_rng(0).integers(0, 5, (20, 30)), Mosaic(20, 30, 5)
    for top in (0, 8, 12):
        for left in (0, 8, 16, 22):
            add(mosaic, top, left, whole[top : top + 8, left : left + 8])
    assert (mosaic.mask == whole).all() and (mosaic.overview.numpy() == whole).all()
    assert (mosaic.small_mask() == whole).all()


def test_the_inside_of_a_tile_counts_more_than_the_border_of_another():
    whole, mosaic = np.random.default_rng(0).integers(0, 5, (8, 12)), Mosaic(8, 12, 5)
    for left in (0, 4):
        add(mosaic, 0, left, np.pad(whole[1:7, left + 1 : left + 7], 1, constant_values=9))
    assert (mosaic.mask[1:7, 1:11] == whole[1:7, 1:11]).all()


def test_pixels_without_a_tile_have_no_class():
    mosaic = Mosaic(8, 9, 5)
    add(mosaic, 0, 0, np.zeros((8, 8), int))
    assert mosaic.mask[:, 8].tolist() == [VOID] * 8
    assert Mosaic(1, 1, 255).mask[0, 0] == VOID and Mosaic(1, 1, 256).mask[0, 0] == 65535


@pytest.mark.parametrize("shape", [(9000, 50), (300, 8300)])
def test_a_large_scene_has_a_small_copy(shape):
    mosaic = Mosaic(*shape, 5)
    for top in range(0, shape[0], 50):
        for left in range(0, shape[1], 50):
            add(mosaic, top, left, np.full((50, 50), (top // 50 + left // 50) % 5))
    assert max(mosaic.overview.shape[1:]) == 4096 and mosaic.small_mask().shape == mosaic.overview.shape[1:]
    assert (mosaic.overview[0].numpy() == mosaic.small_mask()).mean() > 0.9


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "best.pt"
    weights_file(path, config())
    return path


def masks(capsys, weights, picture, out, *more) -> np.ndarray:
    main(list(map(str, [weights, picture, "--annotate", out, *more])))
    capsys.readouterr()
    return np.asarray(Image.open(out / f"00001-{picture.stem}.png"))


def test_a_picture_of_one_tile_as_without(weights, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    whole = masks(capsys, weights, tmp_path / "a.png", tmp_path / "whole")
    assert (masks(capsys, weights, tmp_path / "a.png", tmp_path / "tile", "--tile", 56) == whole).all()
    assert len(np.unique(whole)) > 1


def test_a_scene_of_many_tiles(weights, tmp_path, capsys):
    """Each tile's middle is that of the tile alone; the scene is a TIFF that is read by regions."""
    scenes = [[scene(10 * i + j, 64, 64)[0] for j in range(3)] for i in range(2)]
    whole = np.concatenate([np.concatenate(row, 1) for row in scenes])
    tifffile.imwrite(tmp_path / "big.tif", whole, photometric="rgb", tile=(64, 64), compression="deflate")
    out = masks(capsys, weights, tmp_path / "big.tif", tmp_path / "out", "--tile", 64, "--csv", tmp_path / "a.csv")
    assert out.shape == (128, 192) and names(tmp_path / "out") == {"00001-big.png", "00001-big-overlay.png"}
    (tmp_path / "one.png").write_bytes(png(scenes[1][2]))
    alone = masks(capsys, weights, tmp_path / "one.png", tmp_path / "one", "--tile", 64)
    assert (out[64:, 128:] == alone).all()
    shares = (tmp_path / "a.csv").read_text().splitlines()[1].split(",")[1:]
    assert list(map(float, shares)) == pytest.approx([(out == i).mean() for i in range(3)])


def test_what_cannot_be_read(weights, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(png(scene(0)[0])[:300])
    with pytest.raises(SystemExit) as error:
        main([str(weights), str(tmp_path / "cut.png"), "--tile", "32"])
    assert error.value.code == 2 and has(capsys.readouterr().err, "error: cut.png")


def test_options(weights, tmp_path, refused):
    (tmp_path / "a.png").write_bytes(png(scene(0)[0]))
    assert has(refused(main, weights, tmp_path / "a.png", "--tile", 32, "--overlap", 32), "--overlap 32 --tile")
    assert has(refused(main, weights, tmp_path / "a.png", "--overlap", 8), "--overlap 8 --tile")

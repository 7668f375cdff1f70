import numpy as np
import pytest
from PIL import Image

from unified_approx import image_folder


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path):
    """Three classes of 3, 2 and 1 plain images, whose colour says which image it is; and what is no image."""
    for c, (name, count) in enumerate((("n03", 3), ("n01", 2), ("n02", 1))):
        for i in range(count):
            save(tmp_path / name / f"{i}.JPEG", np.full((20, 30, 3), 60 * c + 20 * i, np.uint8))
    (tmp_path / "n01" / "notes.txt").write_text("no image")
    (tmp_path / "readme").write_text("no folder")
    return tmp_path


def colours(images):
    return images[:, 3, 3, 0].tolist()


def test_labels_follow_the_sorted_names(root):
    folder = image_folder.open_folder(root, classes=3, resize=16, crop=8)
    assert folder.classes == ("n01", "n02", "n03")
    assert folder.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert [f"{file.parent.name}/{file.name}" for file in folder.files[:3]] == [
        "n01/0.JPEG",
        "n01/1.JPEG",
        "n02/0.JPEG",
    ]
    assert folder.images().shape == (6, 8, 8, 3)
    np.testing.assert_allclose(colours(folder.images()), [60, 80, 120, 0, 20, 40], atol=2)  # JPEG


def test_batches_are_all_images_in_order(root):
    folder = image_folder.open_folder(root, resize=16, crop=8)
    batches = list(folder.batches(4))
    assert [len(x) for x, _ in batches] == [4, 2]
    np.testing.assert_array_equal(np.concatenate([x for x, _ in batches]), folder.images())
    assert np.concatenate([y for _, y in batches]).tolist() == folder.labels.tolist()
    with pytest.raises(ValueError, match="size: 0"):
        next(folder.batches(0))


def test_choose_is_a_seeded_sample_without_repetition(root):
    folder = image_folder.open_folder(root, resize=16, crop=8)
    few, again, other = (folder.choose(4, seed) for seed in (1, 1, 2))
    assert few.files == again.files != other.files
    assert len(set(few.files)) == 4
    assert [few.classes[label] for label in few.labels] == [file.parent.name for file in few.files]
    assert len(folder.choose(100, 0)) == 6


@pytest.mark.parametrize("transposed", [False, True])
def test_resize_keeps_the_shape_and_crops_the_centre(transposed):
    # A bright square in the middle of a long image: twice as large as the crop, so that the crop sees only it.
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[16:48, 48:80] = 200
    out = image_folder.resize_and_crop(Image.fromarray(pixels.transpose(1, 0, 2) if transposed else pixels), 32, 12)
    assert out.shape == (12, 12, 3)
    assert out.min() == out.max() == 200


def test_resize_averages_and_converts():
    stripes = np.tile(np.array([0, 200], np.uint8), (40, 20))  # grey, one pixel wide: without antialiasing 0 or 200
    out = image_folder.resize_and_crop(Image.fromarray(stripes), 10, 6)
    assert out.shape == (6, 6, 3)
    np.testing.assert_allclose(out, 100, atol=12)
    with pytest.raises(ValueError, match="crop=20, resize=10"):
        image_folder.resize_and_crop(Image.fromarray(stripes), 10, 20)


def test_enlarged():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    out = image_folder.enlarged(images, 24)
    assert out.shape == (2, 24, 24, 3)
    np.testing.assert_allclose(out[:, 1::3, 1::3], images, atol=1)  # centres of the 3×3 blocks


def test_bad_folders_are_named(root, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        image_folder.open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has 3 folders, expected one for each of 1000 classes.*n01440764"):
        image_folder.open_folder(root, classes=1000)
    with pytest.raises(ValueError, match="n01 has no folders; the images must be laid out as"):
        image_folder.open_folder(root / "n01")
    (root / "n02" / "0.JPEG").unlink()
    with pytest.raises(ValueError, match="n02 holds no images"):
        image_folder.open_folder(root)


@pytest.mark.parametrize("content", [b"not an image", b""])
def test_a_damaged_image_is_named(root, content):
    (root / "n02" / "0.JPEG").write_bytes(content)
    with pytest.raises(ValueError, match=r"n02/0\.JPEG is not a readable image"):
        image_folder.open_folder(root).images()


def test_a_truncated_image_is_named(root):
    file = root / "n02" / "0.JPEG"
    save(file, np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    file.write_bytes(file.read_bytes()[:-800])
    with pytest.raises(ValueError, match=r"n02/0\.JPEG is not a readable image"):
        image_folder.open_folder(root).images()

"""Splits, labels, decoding and batches, from real files to exact pixels."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from ccssl_hf.data import (
    OUT_OF_DISTRIBUTION,
    EvaluationDataset,
    PairedDataset,
    content_key,
    default_workers,
    drop_unreadable,
    fingerprint,
    read_class_names,
    read_labels,
    split_validation,
)
from ccssl_hf.data.pixels import CHUNK_BYTES, DECODED_AT_ONCE, ImageFiles, PixelTable
from ccssl_hf.data.sources import load_split
from ccssl_hf.sampling import UNLABELED, PairedBatchSampler
from ccssl_hf.transforms import View, ViewSettings, crop_boxes, make_view
from pictures import dataset, encoded, mixed_sizes, picture

SIZE = 16
VIEWS = (View.WEAK, View.STRONG, View.CONTRASTIVE)
SETTINGS = ViewSettings(image_size=SIZE, mean=(0.5,) * 3, std=(0.5,) * 3, weak_crop="resized")


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> None:
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# --------------------------------------------------------------------------------------------------------------- labels


def labeled(values: list[Any], feature: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"label": values}, features=datasets.Features({"label": feature}))


def test_a_fingerprint_is_of_content_wherever_it_is_stored(tmp_path: Path) -> None:
    pictures = [picture(seed) for seed in range(5)]
    for number, image in enumerate(pictures):
        (tmp_path / "folder" / "moth").mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / "folder" / "moth" / f"{number}.png", compress_level=number)
    in_memory = datasets.Dataset.from_dict(
        {"image": pictures, "label": ["moth"] * 5},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")}),
    )
    in_memory.to_parquet(tmp_path / "rows.parquet")
    stored = load_split(str(tmp_path / "folder"), role="test"), load_split(str(tmp_path / "rows.parquet"), role="test")
    assert {fingerprint(split, "image", ["moth"] * 5) for split in (in_memory, *stored)} == {"16e0100e96be06d0"}
    names = ["moth"] * 5
    others = [
        fingerprint(in_memory, "image"),
        fingerprint(in_memory, "image", [*names[:4], "fly"]),
        fingerprint(in_memory.select([1, 0, 2, 3, 4]), "image", names),
        fingerprint(in_memory.select(range(4)), "image", names[:4]),
    ]
    assert len({*others, fingerprint(in_memory, "image", names)}) == 5


def test_a_fingerprint_counts_unreadable_files_as_they_are() -> None:
    """A run whose unlabeled images were replaced still gets its card."""
    whole = encoded(picture(0, 60, 60))
    cut = {"bytes": whole["bytes"][:900], "path": None}
    bad = [None, {"bytes": None, "path": "/nowhere/1.png"}, {"bytes": None, "path": "http://example.com/1.png"}, cut]
    prints = [fingerprint(dataset([whole, each]), "image") for each in [*bad, whole]]
    assert len(set(prints)) == 3  # nothing to read three times, a part of the image, the image


def test_a_fingerprint_of_a_large_split_reads_images_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccssl_hf.data.splits.FINGERPRINTED_IMAGES", 3)
    pictures = [encoded(picture(seed), "JPEG") for seed in range(7)]

    def of(changed: int) -> str:
        rows = [encoded(picture(99), "JPEG") if row == changed else each for row, each in enumerate(pictures)]
        return fingerprint(datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()), "image")

    prints = [of(changed) for changed in range(8)]  # of the last one nothing has changed
    assert [changed for changed in range(7) if prints[changed] != prints[7]] == [0, 3, 6]


@pytest.mark.parametrize("whole", [True, False])
def test_the_key_of_a_resumed_run_depends_on_every_image(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a split that is too large to be read whole, on the size of every image."""
    monkeypatch.setattr("ccssl_hf.data.splits.FINGERPRINTED_IMAGES", 2)  # the first and the last
    monkeypatch.setattr("ccssl_hf.data.splits.KEYED_BYTES", 1 << 20 if whole else 0)
    one, two, three, four = (encoded(picture(seed), "BMP") for seed in range(4))
    large = encoded(picture(1, 9, 9), "BMP")
    key = content_key(dataset([one, two, three, four]), "image")
    changed = [[one, three, two, four], [one, large, three, four]]  # images that the fingerprint does not read
    assert [content_key(dataset(rows), "image") != key for rows in changed] == [whole, True]
    assert content_key(dataset([four, three, two, one]).select([3, 2, 1, 0]), "image") == key
    assert content_key(dataset([one, two, three, four]), "image", ["a", "b", "a", "b"]) != key


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ([0, 1, 2, 1], datasets.ClassLabel(names=["cat", "dog", "ant"]), [1, 2, 0, 2]),
        ([0, 1, 0, 1], datasets.ClassLabel(names=["dog", "cat"]), [2, 1, 2, 1]),
        (["dog", "ant", "ant", "cat"], datasets.Value("string"), [2, 0, 0, 1]),
        (["dog", "ant"], datasets.Value("large_string"), [2, 0]),
        ([2, 0, 1], datasets.Value("int64"), [2, 0, 1]),
        ([2, 0, 1], datasets.Value("uint8"), [2, 0, 1]),
        ([2.0, 0.0, 1.0], datasets.Value("float64"), [2, 0, 1]),  # as pandas writes integers beside nulls
        ([True, False], datasets.Value("bool"), [1, 0]),
    ],
)
def test_labels_are_aligned_by_name(values: list[Any], feature: Any, expected: list[int]) -> None:
    split = labeled(values, feature)
    read = read_labels(split, "label", ["ant", "cat", "dog"], role="validation", allow_ood=False)
    assert read.dtype == np.int64 and read.tolist() == expected


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        ([0, 1, -1, None], datasets.ClassLabel(names=["dog", "unicorn"]), [2, -1, -1, -1]),
        (["dog", "unicorn", None], datasets.Value("string"), [2, -1, -1]),
        ([2, -1, None], datasets.Value("int32"), [2, -1, -1]),
        ([-1, -1], datasets.ClassLabel(names=["dog", "unicorn"]), [-1, -1]),
        (["dog", "", "  "], datasets.Value("string"), [2, -1, -1]),
        ([2.0, None], datasets.Value("float32"), [2, -1]),
        ([None, None], datasets.Value("null"), [-1, -1]),
    ],
)
def test_other_classes_are_ood_only_if_ood_labels_are_allowed(
    values: list[Any], feature: Any, expected: list[int]
) -> None:
    split, names = labeled(values, feature), ["ant", "cat", "dog"]
    assert read_labels(split, "label", names, role="validation", allow_ood=True).tolist() == expected
    with pytest.raises(
        ValueError, match=r"labels of the labeled split are not among the 3 classes .*: drop those rows"
    ):
        read_labels(split, "label", names, role="labeled", allow_ood=False)


@pytest.mark.parametrize(
    ("values", "feature", "sentence"),
    [
        (["Ant", "Cat"], datasets.Value("string"), "2 labels .*Ant, Cat.*Did you mean 'ant'"),
        ([0, 1, -1], datasets.ClassLabel(names=["cats", "dogs"]), "2 labels .*cats, dogs.*Did you mean 'cat'"),
        ([0, 3], datasets.Value("int64"), r"1 labels .*\(3\)"),
        ([0, -2], datasets.Value("int64"), r"1 labels .*\(-2\)"),
        ([0.5, 1.0], datasets.Value("float32"), "not labels: set label_column"),
        ([1, 2, 3], datasets.Value("int64"), "holds 1 to 3, so its labels seem to start at 1 and not at 0: subtract 1"),
        (
            ["Ant", "CAT ", "ant", "fly"],
            datasets.Value("string"),
            r"\(Ant, CAT \): write 'Ant' as 'ant', 'CAT ' as 'cat'",
        ),
        ([[0], [1]], datasets.List(datasets.Value("int64")), "label_column to a column with one label per image"),
    ],
)
def test_labels_that_can_not_be_meant_are_an_error_anywhere(values: list[Any], feature: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_labels(labeled(values, feature), "label", ["ant", "cat", "dog"], role="validation", allow_ood=True)


ALIKE = [
    ("Cow", "cow"),
    ("Cafe\u0301", "Caf\u00e9"),
    ("sea-lion", "Sea_Lion"),
    ("\t_cow", "cow"),
    ("STRASSE", "straße"),
    ("01", "1"),
]


@pytest.mark.parametrize(("written", "name"), ALIKE)
@pytest.mark.parametrize("as_class_label", [False, True])
def test_a_class_that_is_written_in_another_way_is_no_ood_class(
    written: str, name: str, as_class_label: bool, fault_record: Callable[[str, str, str], None]
) -> None:
    """Such images would not count, and accuracy would be that of the other classes."""
    classes, names = [name, "sheep"], ["sheep", written, "unicorn", name]
    feature = datasets.ClassLabel(names=names) if as_class_label else datasets.Value("string")
    values: list[Any] = [0, 1, 2, 3] if as_class_label else names
    same = re.escape(f"write {written!r} as {name!r}")
    for role in ("validation", "test", "unlabeled"):
        with pytest.raises(ValueError, match=f"1 labels of the {role} split .*{same}"):
            read_labels(labeled(values, feature), "label", classes, role=role, allow_ood=True)
    with pytest.raises(ValueError, match="names that look like one"):
        read_class_names(labeled(values, feature), "label")
    if written == "Cow" and not as_class_label:
        fault_record("a validation class `Cow` where training has `cow`", "refused, both names named", "nothing")


def test_letters_and_signs_are_classes_of_their_own() -> None:
    names = ["A", "a", "-", "_"]
    assert read_class_names(labeled(names, datasets.Value("string")), "label") == sorted(names)
    read = read_labels(labeled(["A", "a"], datasets.Value("string")), "label", ["A", "b"], role="test", allow_ood=True)
    assert read.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("values", "names", "others", "expected"),
    [
        ([1, 2, 3, 2], ["1", "2", "3"], [3, 1, 7, -1], [2, 0, -1, -1]),  # from 1
        ([7, 0, 3], ["0", "3", "7"], [3, 3, 5, None], [1, 1, -1, -1]),  # with gaps
        ([2.0, 10.0], ["2", "10"], [10, 2], [1, 0]),
        ([True, False], ["0", "1"], [1, 0], [1, 0]),
    ],
)
def test_numbers_are_names_and_other_splits_follow_them(
    values: list[Any], names: list[str], others: list[Any], expected: list[int]
) -> None:
    split = datasets.Dataset.from_dict({"label": values})
    assert read_class_names(split, "label") == names
    own = read_labels(split, "label", names, role="labeled", allow_ood=False)
    assert [names[label] for label in own] == [str(int(value)) for value in values]
    for rows in (others, [None if value is None else float(value) for value in others]):
        read = read_labels(datasets.Dataset.from_dict({"label": rows}), "label", names, role="test", allow_ood=True)
        assert read.tolist() == expected
    text = labeled([None if value is None else str(value) for value in others], datasets.Value("string"))
    assert read_labels(text, "label", names, role="test", allow_ood=True).tolist() == expected


def test_numbers_of_two_splits_that_start_at_different_numbers_are_refused() -> None:
    for classes, values in ((["1", "2", "3"], [0, 1, 2]), (["0", "1"], [2, 1, 2])):
        with pytest.raises(
            ValueError, match=r"and the classes are numbered from [01]: number the labels of all splits alike"
        ):
            read_labels(labeled(values, datasets.Value("int64")), "label", classes, role="validation", allow_ood=True)


def test_rows_without_a_label_are_counted_and_named() -> None:
    split = labeled([None, "cat", " ", *["cat"] * 3, *[None] * 12], datasets.Value("string"))
    with pytest.raises(
        ValueError, match=r"14 labels of the labeled split .*\(null\).*\(rows 0, 2, 6, .*, 13 and 4 more\)"
    ):
        read_labels(split, "label", ["cat", "dog"], role="labeled", allow_ood=False)


@pytest.mark.parametrize(
    ("values", "feature", "sentence"),
    [
        ([0], datasets.ClassLabel(names=["a", " ", "b", ""]), r"have no name \(numbers 1, 3\)"),
        (["a b", "a-b", "d", "C_", "c_"], datasets.Value("string"), "'a-b' and 'a b', 'c_' and 'C_'"),
        ([-1, 1], datasets.Value("int8"), r"one class only \(1\).*not with -1, which means no class"),
        ([0.5, 1.5], datasets.Value("float64"), "not labels: set label_column"),
        ([[0, 1]], datasets.List(datasets.Value("int64")), "with one label per image"),
        ([None], datasets.Value("null"), r"one class only \(none\)"),
    ],
)
def test_class_names_that_cannot_be_meant_are_refused(values: list[Any], feature: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_class_names(labeled(values, feature), "label")


def test_a_validation_split_is_drawn_by_class_and_seed(caplog: pytest.LogCaptureFixture) -> None:
    split = labeled([*["a"] * 20, *["b"] * 10, *["c"] * 3], datasets.Value("string")).add_column("row", list(range(33)))
    kept, taken = split_validation(split, 0.2, seed=1)
    assert sorted([*kept["row"], *taken["row"]]) == list(range(33))
    assert [list(taken["label"]).count(name) for name in "abc"] == [4, 2, 1]
    by_class = "a 4 of 20, b 2 of 10, c 1 of 3"
    assert caplog.messages == [
        f"The validation split is 7 of the 33 labeled images, drawn by class with seed 1: {by_class}."
    ]
    assert split_validation(split, 0.2, seed=1)[1]["row"] == taken["row"]
    assert split_validation(split, 0.2, seed=2)[1]["row"] != taken["row"]


@pytest.mark.parametrize(
    ("labels", "fraction", "sentence"),
    [
        ([*"aaaabbbbcd"], 0.4, r"2 classes would keep no labeled image \(c, d\): label more images"),
        ([*"aabb"], 0.25, "0.25 of 4 labeled images does not suit 2 classes"),
        ([*"aabb"], 0.75, "0.75 of 4 labeled images does not suit 2 classes"),
        ([*"aabb"], 1.0, "fraction of validation images is 1.0: choose a value between 0 and 1"),
        ([*"aabb", None], 0.5, r"1 labels of the labeled split .*\(rows 4\)"),
    ],
)
def test_a_validation_split_leaves_labeled_images_of_each_class(
    labels: list[Any], fraction: float, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        split_validation(labeled(labels, datasets.Value("string")), fraction)


def test_labels_follow_the_rows_of_a_selection_in_any_format() -> None:
    split = labeled(["b", "a", "c", "a"], datasets.Value("string")).select([3, 2, 0]).with_format("torch")
    assert read_labels(split, "label", ["a", "b", "c"], role="test", allow_ood=False).tolist() == [0, 2, 1]


def test_a_million_labels_are_read_in_bulk() -> None:
    """Row by row this takes most of a minute. The test checks the result, not the time."""
    names = [f"species {i}" for i in range(1000)]
    numbers = np.random.default_rng(0).integers(0, 1000, 1_000_000)
    split = datasets.Dataset.from_dict({"label": np.array(names)[numbers], "number": numbers})
    split = split.cast_column("number", datasets.ClassLabel(names=names))
    wanted: dict[str, Any] = {"role": "unlabeled", "allow_ood": True}
    known = np.where(numbers < 500, numbers, OUT_OF_DISTRIBUTION)
    assert np.array_equal(read_labels(split, "label", names[::-1], **wanted), 999 - numbers)
    assert np.array_equal(read_labels(split, "number", names[:500], **wanted), known)


def test_class_names_come_from_a_class_label_or_from_strings() -> None:
    assert read_class_names(labeled([0], datasets.ClassLabel(names=["b", "a", "c"])), "label") == ["b", "a", "c"]
    assert read_class_names(labeled(["b", "a", None, "b"], datasets.Value("string")), "label") == ["a", "b"]


# ------------------------------------------------------------------------------------------------------------- decoding


def reference(image: Image.Image, size: int) -> torch.Tensor:
    """Shorter side to `size`, then the middle square, by PIL alone."""
    pixels = np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def rotated() -> tuple[dict[str, Any], Image.Image]:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    return encoded(picture(), exif=exif), picture().transpose(Image.Transpose.ROTATE_270)


def sixteen_bits() -> tuple[dict[str, Any], Image.Image]:
    grey = np.asarray(picture().convert("L"))
    return encoded(Image.fromarray(grey.astype(np.uint16) * 256 + 7)), Image.fromarray(grey)


def in_mode(mode: str, kind: str = "PNG") -> Callable[[], tuple[dict[str, Any], Image.Image]]:
    def make() -> tuple[dict[str, Any], Image.Image]:
        image = picture().convert(mode)
        return encoded(image, kind), image

    make.__name__ = mode
    return make


MODES = [in_mode(mode) for mode in ("L", "1", "RGBA", "LA", "P")] + [in_mode("CMYK", "TIFF"), rotated, sixteen_bits]


@pytest.mark.parametrize("make", MODES, ids=lambda make: make.__name__)
@pytest.mark.parametrize("decode", ["memory", "stream", "evaluation"])
def test_every_kind_of_image_becomes_upright_rgb(make: Callable[[], Any], decode: str) -> None:
    source, shown = make()
    split = dataset([source])
    if decode == "memory":
        read = PixelTable(split, image_column="image", size=SIZE, role="labeled").read(np.array([0]))[0]
        expected = reference(shown, SIZE)
    elif decode == "evaluation":
        view = EvaluationDataset(split, None, image_column="image", transform=np.asarray, role="test")
        read, expected = view[0]["pixel_values"], np.asarray(shown.convert("RGB"))
    else:
        read, expected = streamed(split, np.array([0]), np.array([5]))[0, 0], crop(shown, View.WEAK, 5)
        return assert_nearly_equal(read, expected)
    assert np.array_equal(read, expected)


def test_a_pixel_table_holds_what_pil_decodes_one_by_one() -> None:
    images = [picture(i, 20 + i % 5, 18 + i % 7) for i in range(12)] + [picture(99, SIZE, SIZE)]
    table = PixelTable(dataset(images), image_column="image", size=SIZE, role="labeled")
    index = np.array([12, 3, 3, 0, 11])
    assert len(table) == 13
    assert torch.equal(table.read(index), torch.stack([reference(images[i], SIZE) for i in index]))


@pytest.mark.parametrize("where", ["memory", "disk", "parquet"])
def test_a_pixel_table_follows_selections_and_formats_and_is_decoded_once(where: str, tmp_path: Path) -> None:
    split = mixed_sizes(9)
    if where == "disk":
        split.save_to_disk(tmp_path / "saved")
        split = datasets.load_from_disk(tmp_path / "saved")
    elif where == "parquet":
        split.to_parquet(tmp_path / "x.parquet")
        split = load_split(str(tmp_path / "x.parquet"), role="labeled")
    chosen = split.select([8, 2, 5]).with_format("torch")
    arguments = {"image_column": "image", "size": SIZE, "role": "labeled"}
    rows = PixelTable(chosen, **arguments).read(np.arange(3))
    assert torch.equal(rows, torch.stack([reference(picture(i, 20 + i % 5, 18 + i % 7), SIZE) for i in (8, 2, 5)]))

    [cached] = (tmp_path / "cache" / "ccssl_hf").glob("*.arrow")
    written = cached.stat().st_mtime_ns
    again = PixelTable(chosen, **{**arguments, "role": "unlabeled"})
    assert torch.equal(again.read(np.arange(3)), rows)
    assert [cached] == list((tmp_path / "cache" / "ccssl_hf").glob("*.arrow")) and cached.stat().st_mtime_ns == written
    PixelTable(chosen, **{**arguments, "size": 8})
    PixelTable(split.select([8, 2, 6]), **arguments)
    assert len(list((tmp_path / "cache" / "ccssl_hf").glob("*.arrow"))) == 3  # other pixels, other files


def test_a_pixel_table_of_many_chunks_survives_pickling_and_stays_on_disk() -> None:
    size = 512
    count = 2 * (CHUNK_BYTES // (3 * size * size)) + 3
    table = PixelTable(mixed_sizes(count), image_column="image", size=size, role="labeled")
    assert table._dataset.data.column("pixels").num_chunks == 3 and len(table) == count
    last = reference(picture(count - 1, 20 + (count - 1) % 5, 18 + (count - 1) % 7), size)
    packed = pickle.dumps(table)
    assert len(packed) < 20_000  # the pixels are 35 MB
    for other in (table, pickle.loads(packed)):
        assert torch.equal(other.read(np.array([0, count - 1]))[1], last)


def crop(image: Image.Image, view: View, draw: int) -> torch.Tensor:
    """The view's crop by PIL alone, from the box that `crop_boxes` draws."""
    height, width = torch.tensor([image.height]), torch.tensor([image.width])
    [[top, left, h, w]] = crop_boxes(
        view, SETTINGS, seed=3, stream=UNLABELED, draws=torch.tensor([draw]), heights=height, widths=width
    ).tolist()
    cut = image.convert("RGB").crop((left, top, left + w, top + h)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(cut).transpose(2, 0, 1).copy())


def streamed(split: datasets.Dataset, index: np.ndarray, draw: np.ndarray) -> torch.Tensor:
    files = ImageFiles(split, image_column="image", role="unlabeled", settings=SETTINGS, seed=3, stream=UNLABELED)
    return files.read(index, draw, VIEWS)


def assert_nearly_equal(left: torch.Tensor, right: torch.Tensor) -> None:
    """Each of the two passes of a resize may round to the neighbouring grey level."""
    difference = (left.to(torch.int16) - right.to(torch.int16)).abs()
    assert difference.max() <= 2 and (difference > 0).float().mean() < 0.05


def test_an_image_that_pillow_keeps_in_several_blocks_is_read_as_any_other() -> None:
    image = picture(0, 20, 18).resize((6000, 2900))  # blocks of 16 MiB, 4 bytes a pixel
    with pytest.raises(ValueError, match="blocks"):
        pa.array(image)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    split = datasets.Dataset.from_dict({"image": [{"bytes": buffer.getvalue(), "path": None}]})
    read = streamed(split.cast_column("image", datasets.Image()), np.array([0]), np.array([5]))
    for v, view in enumerate(VIEWS):
        assert_nearly_equal(read[0, v], crop(image, view, 5))


def test_streamed_crops_are_nearly_pils_and_depend_on_their_draw_alone() -> None:
    images = [picture(i, 20 + i % 5, 18 + i % 7) for i in range(DECODED_AT_ONCE + 3)]
    split = dataset(images).with_transform(lambda batch: {"image": ["transformed"] * len(batch["image"])})
    index = np.array([*range(len(images)), 2, 2])
    draw = np.arange(len(index)) + 100
    crops = streamed(split, index, draw)
    assert crops.shape == (len(index), 3, 3, SIZE, SIZE) and crops.dtype == torch.uint8
    for row, (i, d) in enumerate(zip(index, draw, strict=True)):
        assert_nearly_equal(crops[row], torch.stack([crop(images[i], view, int(d)) for view in VIEWS]))
    # In another batch and order, the same image and draw have the same crops. Another draw has other crops.
    again = streamed(split, index[[11, 4, 0]], draw[[11, 4, 0]])
    assert torch.equal(again, crops[[11, 4, 0]]) and not torch.equal(crops[11], crops[12])


def test_a_crop_that_a_worker_cut_is_that_of_the_view_of_the_whole_image() -> None:
    image = picture(7, 40, 40)
    whole = torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]
    arguments: dict[str, Any] = {"seed": 3, "stream": UNLABELED, "draws": torch.tensor([11])}
    crops = streamed(dataset([image]), np.array([0]), np.array([11]))
    made = make_view(crops[:, 0], View.WEAK, SETTINGS, cropped=True, **arguments)
    assert_nearly_equal(made, make_view(whole, View.WEAK, SETTINGS, cropped=False, **arguments))


# -------------------------------------------------------------------------------------------------------- broken images

BROKEN = {
    "text": {"bytes": b"not an image", "path": None},
    "cut": {"bytes": encoded(picture(0, 200, 200))["bytes"][:300], "path": None},
    "empty": {"bytes": b"", "path": None},
    "gone": {"bytes": None, "path": "/nowhere/1.png"},
    "none": None,
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_image_is_named_with_the_fix_and_the_fix_works(broken: str) -> None:
    split = dataset([picture(0), picture(1), BROKEN[broken], picture(2)], number=[0, 1, 2, 3])
    path = (BROKEN[broken] or {}).get("path") or "row 2"
    sentence = rf"1 of 4 images of the unlabeled split can't be decoded: .*drop_unreadable\(dataset\)\.\n  {path}: \w"
    with pytest.raises(ValueError, match=sentence):
        PixelTable(split, image_column="image", size=SIZE, role="unlabeled")
    sentence = rf"Image 2 of the unlabeled split can't be decoded \({path}: .*drop_unreadable"
    with pytest.raises(ValueError, match=sentence):
        streamed(split, np.array([0, 2]), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"Image 2 of the test split"):
        EvaluationDataset(split, None, image_column="image", transform=np.asarray, role="test")[2]
    kept = drop_unreadable(split)
    assert kept["number"] == [0, 1, 3] and kept.features == split.features
    assert len(PixelTable(kept, image_column="image", size=SIZE, role="unlabeled")) == 3


# -------------------------------------------------------------------------------------------------------------- batches


def paired(decode: str, unlabeled: datasets.Dataset | None, hidden: np.ndarray | None = None) -> PairedDataset:
    return PairedDataset(
        mixed_sizes(6),
        np.array([0, 1, 2, 0, 1, 2]),
        unlabeled,
        hidden_labels=hidden,
        image_column="image",
        views=VIEWS,
        settings=SETTINGS,
        seed=3,
        decode=decode,
    )


def loader(data: PairedDataset, workers: int, method: str | None = None) -> DataLoader:
    sampler = PairedBatchSampler(
        num_labeled=6, num_unlabeled=10 if data.unlabeled else 0, batch_size=2, mu=2, num_batches=4, seed=3
    )
    return DataLoader(
        data,
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=_same,
        num_workers=workers,
        multiprocessing_context=method,
    )


def _same(batch: Any) -> Any:
    return batch


@pytest.mark.parametrize(("decode", "method"), [("memory", "fork"), ("stream", "fork"), ("memory", "spawn")])
def test_workers_give_the_batches_that_the_main_process_gives(decode: str, method: str) -> None:
    data = paired(decode, mixed_sizes(10, first=50), np.arange(10) % 4 - 1)
    alone, helped = list(loader(data, 0)), list(loader(data, 1 if method == "spawn" else 2, method))
    assert len(alone) == len(helped) == 4
    for one, other in zip(alone, helped, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("decode", ["memory", "stream"])
def test_a_batch_holds_the_rows_that_its_index_names(decode: str) -> None:
    data = paired(decode, mixed_sizes(10, first=50), np.arange(10) % 4 - 1)
    batch = next(iter(loader(data, 0)))
    crops = {"memory": [], "stream": [1]}[decode], {"memory": [], "stream": [len(VIEWS)]}[decode]
    assert batch["labeled_images"].shape == (2, *crops[0], 3, SIZE, SIZE)
    assert batch["unlabeled_images"].shape == (4, *crops[1], 3, SIZE, SIZE)
    assert batch["hidden_labels"].tolist() == (batch["unlabeled_index"] % 4 - 1).tolist()
    assert isinstance(batch["labeled_draws"], np.ndarray) and batch["labels"].dtype == torch.int64
    if decode == "memory":
        rows = [reference(picture(50 + i, 20 + i % 5, 18 + i % 7), SIZE) for i in batch["unlabeled_index"].tolist()]
        assert torch.equal(batch["unlabeled_images"], torch.stack(rows))
    else:
        index, draws = batch["unlabeled_index"].numpy(), batch["unlabeled_draws"]
        assert torch.equal(batch["unlabeled_images"], streamed(mixed_sizes(10, first=50), index, draws))


def test_an_accelerator_gets_a_worker_for_each_core_and_a_cpu_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers(torch.device("cpu")) == 0
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    workers = []
    for processes in ("1", "2", "8"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)  # as torchrun and accelerate set it
        workers.append(default_workers(torch.device("cuda")))
    assert workers == [6, 3, 1]
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(64)), raising=False)
    assert default_workers(torch.device("cuda", 1)) == 8


def test_without_unlabeled_images_a_batch_is_labeled_alone() -> None:
    assert next(iter(loader(paired("memory", None), 0))).keys() == {"labeled_images", "labels", "labeled_draws"}

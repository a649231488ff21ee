import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from ldm import seeds
from ldm.data import (
    DataConfig,
    batches,
    evaluation_batches,
    open_source,
    sheet_images,
)
from ldm.data.dataset import take_split
from ldm.data.loader import FaultCount
from ldm.data.transforms import CorruptImage, resize
from ldm.errors import LdmError, UsageError
from ldm.seeds import LISTED, generator, shuffled
from tests.ldm.data.pictures import Coded, CodedClasses, class_folder, noise, png_folder


class Fatal(Coded):
    """Kills the process that loads it."""

    def load(self, index):
        os._exit(9)


def stream(source, start=0, stop=48, batch_size=4, rank=0, world=1, **config):
    """The images of a run by their numbers: {k: (R, R, 3)}."""
    config = DataConfig(**{"source": "/", "crop": "random", "flip": True, "workers": 0} | config)
    seen = {}
    for images, k, *_ in batches(source, config, 16, 3, start, stop, batch_size, rank, world):
        assert images.shape == (batch_size // world, 3, 16, 16)
        assert (images.dtype, k.dtype) == (torch.uint8, torch.int64)
        seen |= dict(zip(k.tolist(), images.permute(0, 2, 3, 1).numpy(), strict=True))
    return seen


def same(one, other):
    assert one.keys() == other.keys()
    for k in one:
        np.testing.assert_array_equal(one[k], other[k])


def test_image_crop_and_flip_are_drawn_from_the_seed_and_k():
    source = Coded(20)
    seen = stream(source)
    assert list(seen) == list(range(48))
    flips = 0
    for k, image in seen.items():
        index = generator(3, "order", k // 20).permutation(20)[k % 20]
        rng = generator(3, "crop", k)
        top, left = rng.integers(24 - 16 + 1), rng.integers(20 - 16 + 1)
        expected = source.load(index)[top : top + 16, left : left + 16]
        if generator(3, "flip", k).integers(2):
            expected, flips = expected[:, ::-1], flips + 1
        np.testing.assert_array_equal(image, expected)
    assert 12 <= flips <= 36


def test_the_stream_is_the_same_however_it_is_cut():
    source = Coded(20)
    whole = stream(source)
    same(stream(source, batch_size=8), whole)
    same(stream(source, start=20), {k: whole[k] for k in range(20, 48)})
    first, second = (stream(source, batch_size=8, rank=rank, world=2) for rank in range(2))
    assert list(first)[:5] == [0, 2, 4, 6, 8]
    same(dict(sorted((first | second).items())), whole)


def test_an_incomplete_last_batch_is_left_out():
    assert list(stream(Coded(20), stop=47, batch_size=8)) == list(range(40))
    for rank in range(2):
        assert len(stream(Coded(20), stop=47, batch_size=8, rank=rank, world=2)) == 20


def test_center_crop_and_no_flip_by_config():
    seen = stream(Coded(20, height=16, width=20), crop="center", flip=False)
    assert all(image[0, 0].tolist()[1:] == [0, 2] for image in seen.values())
    assert all(image[0, -1].tolist()[1:] == [0, 17] for image in seen.values())


def test_photographs_are_cropped_at_random_whatever_the_config_says():
    source = open_source(DataConfig(), "train", 32)
    crops = [b.images for b in batches(source, DataConfig(crop="center"), 32, 0, 0, 16, 8)]
    assert len({bytes(crop.numpy().tobytes()) for crop in torch.cat(crops)}) == 16


def test_workers_give_the_same_stream_and_leave_signals_to_the_training_process():
    source = Coded(20)
    whole = stream(source)
    state = torch.get_rng_state()
    seen = {}
    config = DataConfig(source="/", crop="random", flip=True, workers=2)
    for images, k, *_ in batches(source, config, 16, 3, 0, 48, 4):
        workers = multiprocessing.active_children()
        for worker in workers if 4 in k else ():
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGTERM)
        seen |= dict(zip(k.tolist(), images.permute(0, 2, 3, 1).numpy(), strict=True))
    assert len(workers) == 2
    same(seen, whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_corrupt_image_is_named_once_and_replaced_by_the_next_good_one(caplog):
    source = Coded(200, corrupt=(5, 6))
    with caplog.at_level(logging.WARNING, "ldm"):
        seen = stream(source, stop=400, batch_size=8)
    assert sorted(record.getMessage() for record in caplog.records) == [
        "skipped a corrupt image: image 5 (truncated)",
        "skipped a corrupt image: image 6 (truncated)",
    ]
    whole = stream(Coded(200), stop=400, batch_size=8)
    for k, image in whole.items():
        index = image[0, 0, 0]
        assert seen[k][0, 0, 0] == (7 if index in (5, 6) else index)
    same(stream(source, stop=400, batch_size=8, start=200), {k: seen[k] for k in range(200, 400)})


def test_more_than_one_percent_corrupt_stops_the_run():
    with pytest.raises(LdmError, match=r"3 of 200 images are corrupt, more than 1%: image \d"):
        stream(Coded(200, corrupt=(5, 60, 100)), stop=200)
    with pytest.raises(LdmError, match="1 of 20 images"):
        stream(Coded(20, corrupt=range(20)))


def test_faults_and_errors_of_workers_reach_the_caller_as_one_line(caplog):
    with caplog.at_level(logging.WARNING, "ldm"):
        stream(Coded(200, corrupt=(5, 6)), stop=200, workers=1)
    assert len(caplog.records) == 2
    with pytest.raises(LdmError) as error:
        stream(Coded(20, width=15), workers=1)
    assert str(error.value) == (
        f"image {generator(3, 'order', 0).permutation(20)[0]} is 15×24, smaller than the 16×16 "
        "requested, as are 20 of 20 images that were looked at: set data.small=skip or "
        "data.small=enlarge, or lower the resolution"
    )


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_line():
    with pytest.raises(LdmError, match=r"a loader worker was killed, .*: lower data\.workers"):
        stream(Fatal(20), workers=1)


def test_a_batch_must_divide_over_the_processes():
    for call in (
        lambda: batches(Coded(20), DataConfig(), 16, 0, 0, 9, 9, 0, 2),
        lambda: evaluation_batches(Coded(20), 16, 9, world=2),
    ):
        with pytest.raises(UsageError, match="batch_size=9 does not divide over 2 processes"):
            call()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("limit", [None, 13])
def test_evaluation_sees_every_image_once_over_all_processes(world, limit):
    source, seen = Coded(21, height=16, width=20), []
    for rank in range(world):
        for images, k, *_ in evaluation_batches(source, 16, 8, limit, rank, world):
            assert 0 < len(k) <= 8 // world
            assert images[:, 0, 0, 0].tolist() == k.tolist()
            assert images[:, 1:, 0, 0].tolist() == [[0, 2]] * len(k)  # the centre, not mirrored
            seen += k.tolist()
    assert sorted(seen) == list(range(21 if limit is None else 13))


def test_evaluation_leaves_corrupt_images_out(caplog):
    source = Coded(200, corrupt=(0, 7))
    with caplog.at_level(logging.WARNING, "ldm"):
        seen = [k for batch in evaluation_batches(source, 16, 1) for k in batch.k.tolist()]
    assert seen == [k for k in range(200) if k not in (0, 7)]
    assert len(caplog.records) == 2
    with pytest.raises(LdmError, match="3 of 200 images are corrupt"):
        list(evaluation_batches(Coded(200, corrupt=(1, 2, 3)), 16, 4))


def test_evaluation_with_workers_reads_a_folder(tmp_path):
    folder = png_folder(tmp_path / "a", [noise(n) for n in range(10)])
    source = open_source(DataConfig(source=str(folder)), "all", 40)
    here = list(evaluation_batches(source, 40, 4))
    there = list(evaluation_batches(source, 40, 4, workers=2))
    assert [len(batch.k) for batch in here] == [4, 4, 2]
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.k, other.k)


def labels_by_number(stream):
    """{k: (index coded in the pixels, label)}, the types checked."""
    seen = {}
    for images, ks, labels, _ in stream:
        assert labels.dtype == torch.int64 and labels.shape == ks.shape
        pairs = zip(images[:, 0, 0, 0].tolist(), labels.tolist(), strict=True)
        seen |= dict(zip(ks.tolist(), pairs, strict=True))
    return seen


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_come_with_their_images_on_resuming_too(workers):
    config = DataConfig(source="/", crop="random", workers=workers)
    source = CodedClasses(20)
    whole = labels_by_number(batches(source, config, 16, 3, 0, 48, 4))
    assert all(label == index % 3 for index, label in whole.values())
    assert {label for _, label in whole.values()} == {0, 1, 2}
    rest = labels_by_number(batches(source, config, 16, 3, 24, 48, 8))
    assert rest == {k: whole[k] for k in range(24, 48)}
    halves = [labels_by_number(batches(source, config, 16, 3, 0, 48, 8, r, 2)) for r in range(2)]
    assert dict(sorted((halves[0] | halves[1]).items())) == whole


def test_the_replacement_of_a_corrupt_image_brings_its_own_label():
    config = DataConfig(source="/", workers=0)
    seen = labels_by_number(batches(CodedClasses(200, (5,)), config, 16, 3, 0, 200, 8))
    order = generator(3, "order", 0).permutation(200).tolist()
    assert seen[order.index(5)] == (6, 0)  # and not class 2, as image 5 is
    assert seen[order.index(8)] == (8, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_carries_labels_and_leaves_those_of_corrupt_images_out(workers):
    source = CodedClasses(200, corrupt=(3,))
    seen = labels_by_number(evaluation_batches(source, 16, 64, workers=workers))
    assert seen == {k: (k, k % 3) for k in range(200) if k != 3}


def test_without_classes_every_label_is_minus_one():
    config = DataConfig(source="/", workers=0)
    for stream in (
        batches(Coded(20), config, 16, 0, 0, 40, 4),
        evaluation_batches(Coded(20), 16, 8),
        batches(open_source(DataConfig(), "train", 32), DataConfig(), 32, 0, 0, 8, 8),
    ):
        assert {label for _, label in labels_by_number(stream).values()} == {-1}


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_of_a_folder_from_disk_to_batch(tmp_path, workers):
    files = {f"{name}/{n}.png": noise(n) for name in ("dog", "cat") for n in range(10)}
    config = DataConfig(
        source=str(class_folder(tmp_path / "a", files)), labels=True, held_out=4, workers=workers
    )
    train = open_source(config, "train", 32)
    assert train.classes == ("cat", "dog")
    seen = {k: label for _, ks, labels, _ in batches(train, config, 32, 0, 0, 16, 4)
            for k, label in zip(ks.tolist(), labels.tolist(), strict=True)}  # fmt: skip
    order = generator(0, "order", 0).permutation(16).tolist()
    assert seen == {k: int("/dog/" in train.name(order[k])) for k in range(16)}
    assert sorted(seen.values()) == [0] * 8 + [1] * 8


def test_leaving_early_ends_the_workers():
    config = DataConfig(source="/", workers=2)
    running = batches(Coded(20), config, 16, 0, 0, 4000, 4)
    next(running), next(running)
    assert len(multiprocessing.active_children()) == 2
    running.close()
    assert not multiprocessing.active_children()


def test_every_epoch_visits_every_image_once_in_an_order_of_its_own():
    epochs = [[shuffled(0, k, 50) for k in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_the_order_depends_on_the_seed_and_k_alone():
    forward = [shuffled(5, k, 30) for k in range(90)]
    backward = [shuffled(5, k, 30) for k in reversed(range(90))]
    assert forward == backward[::-1]
    assert forward != [shuffled(6, k, 30) for k in range(90)]


def test_orders_of_many_images_are_computed_not_kept(monkeypatch):
    monkeypatch.setattr(seeds, "_permutation", None)
    count = LISTED + 1
    seen = {shuffled(0, k, count) for k in range(2000)}
    assert len(seen) == 2000 and max(seen) < count and min(seen) < count // 100
    assert shuffled(0, 5, count) != shuffled(0, count + 5, count), "another epoch"
    monkeypatch.setattr(seeds, "LISTED", 10)
    epochs = [[shuffled(0, k, 50) for k in range(e * 50, e * 50 + 50)] for e in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)


def test_each_fault_is_logged_once_and_one_percent_is_tolerated(caplog):
    faults = FaultCount(200)
    with caplog.at_level(logging.WARNING, "ldm"):
        faults.add({"a.png": "truncated"})
        faults.add({"a.png": "truncated", "b.png": "empty"})
    assert [record.getMessage() for record in caplog.records] == [
        "skipped a corrupt image: a.png (truncated)",
        "skipped a corrupt image: b.png (empty)",
    ]
    with pytest.raises(LdmError, match=r"^3 of 200 images are corrupt, more than 1%: a.png, b.png"):
        faults.add({"c.png": "empty"})


def test_ten_are_named_and_the_rest_counted():
    with pytest.raises(
        LdmError, match=r"0\.png, .*9\.png and 3 more \(.+\); repair or remove them$"
    ):
        FaultCount(100).add({f"{n}.png": "empty" for n in range(13)})


def shown(source, count):
    """Indices of the images, coded in their pixels."""
    images = sheet_images(source, 16, count)
    assert images.dtype == torch.uint8 and images.shape[1:] == (3, 16, 16)
    return images[:, 0, 0, 0].tolist()


def test_the_first_images_cut_from_the_centre():
    assert shown(Coded(20), 4) == [0, 1, 2, 3]
    assert shown(Coded(3), 8) == [0, 1, 2]
    image = sheet_images(Coded(1, height=16, width=20), 16, 1)[0]
    assert image[:, 0, 0].tolist() == [0, 0, 2] and image[:, -1, -1].tolist() == [0, 15, 17]


def test_a_corrupt_one_is_replaced_by_the_next_good_one():
    assert shown(Coded(20, corrupt={0, 2}), 4) == [1, 3, 4, 5]
    assert shown(Coded(20, corrupt=range(19)), 4) == [19]
    assert shown(Coded(3, corrupt={1}), 3) == [0, 2]


def test_none_that_can_be_read():
    with pytest.raises(LdmError, match=r"no image can be read, not even image 0 \(truncated\)"):
        sheet_images(Coded(5, corrupt=range(5)), 16, 2)


def test_one_too_small():
    with pytest.raises(
        LdmError,
        match="image 0 is 20×24, smaller than the 32×32 requested, as are 5 of 5 images that",
    ):
        sheet_images(Coded(5), 32, 2)


def test_photographs():
    assert sheet_images(open_source(DataConfig(), "val", 64), 64, 8).shape == (8, 3, 64, 64)


# --------------------------------------------------------------------------------- small images
class Mixed(Coded):
    """Of which every fourth is too small."""

    def __init__(self, count, small="error"):
        super().__init__(count)
        self.small = small

    def load(self, index):
        image = super().load(index)
        return image[:12] if index % 4 == 0 else image


def test_small_images_are_skipped_and_counted_by_themselves(caplog):
    with caplog.at_level(logging.WARNING, "ldm"):
        seen = stream(Mixed(400, "skip"), stop=400)
    assert len(seen) == 400
    assert not any(image[0, 0, 0] % 4 == 0 for k, image in seen.items())
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "skipped small images: 1 so far",
        "skipped small images: 10 so far",
        "skipped small images: 100 so far",
    ]
    assert "(too small: 20×12)" in caplog.text


@pytest.mark.parametrize("count", [101, 303, 1111])
def test_one_corrupt_image_is_passed_whatever_the_number(count):
    assert len(stream(Coded(count % 256 or 1), stop=4)) == 4
    seen = stream(Coded(count, corrupt=(5,)), stop=count - count % 4)
    assert len(seen) == count - count % 4


def test_a_strip_is_too_narrow_to_be_enlarged():
    source = Coded(3, height=1, width=60000)
    source.small = "enlarge"
    with pytest.raises(CorruptImage, match="60000×1, too narrow to be enlarged"):
        source.load_at_least(0, 64)


def test_small_images_are_enlarged_with_lanczos():
    source = Mixed(8, "enlarge")
    whole = source.load_at_least(4, 16)
    assert whole.shape == (16, 27, 3)
    np.testing.assert_array_equal(whole, resize(source.load(4), 16, 27))
    assert len(stream(source, stop=8)) == 8
    np.testing.assert_array_equal(source.load_at_least(5, 16), source.load(5))


def test_a_part_does_with_small_images_as_its_whole():
    assert take_split(Mixed(8, "enlarge"), "val", 4).load_at_least(0, 16).shape == (16, 27, 3)


def test_evaluation_leaves_small_images_out(caplog):
    batch = next(evaluation_batches(Mixed(8, "skip"), 16, 8))
    assert batch.k.tolist() == [1, 2, 3, 5, 6, 7]


def test_a_data_set_of_small_images_is_one_clear_line():
    with pytest.raises(
        LdmError, match=r"20 images in a row were skipped, the last image .*lower the"
    ):
        source = Coded(20, width=15)
        source.small = "skip"
        stream(source)


def test_the_setting_reaches_the_source(tmp_path):
    folder = png_folder(tmp_path / "data", [noise(0, 12, 20), noise(1, 24, 20)])
    config = DataConfig(source=str(folder), held_out=1, small="enlarge")
    assert open_source(config, "train", 16).load_at_least(0, 16).shape == (16, 27, 3)
    assert open_source(config, "all", 16).size(0) == (20, 12)

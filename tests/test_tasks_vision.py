"""Image tasks: the choice of examples, every place that pictures come from in its own layout, and what a model sees."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100
from torchvision.datasets import Flowers102 as TorchvisionFlowers102

from svdpeft.models import Loaded
from svdpeft.registry import TASKS
from svdpeft.tasks.cifar100 import Cifar100
from svdpeft.tasks.flowers102 import Flowers102
from svdpeft.tasks.food101 import Food101
from svdpeft.tasks.imagefolder import Images
from svdpeft.tasks.images import Pictures, choose, evaluate, stratified_order, turns, view
from svdpeft.tasks.resisc45 import Resisc45
from svdpeft.tasks.sources import Source, Split, _read, read

# Another choice of examples makes old results incomparable: change this knowingly.
CHOSEN_OF_CIFAR100 = "b8ed936d3118189d"
CONFIG = {
    "input_size": (3, 24, 32),
    "mean": (0.5, 0.4, 0.3),
    "std": (0.2, 0.3, 0.4),
    "interpolation": "bicubic",
    "crop_pct": 0.875,
}
SEEDS = st.integers(0, 2**32)


def vision(model: nn.Module | None = None, **config: Any) -> Loaded:
    return Loaded(model or nn.Linear(2, 2), "tiny", CONFIG | config, "vision", None)


def painted(label: int, number: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """One colour, which says which picture it is: the label's two digits and the number, far enough apart for JPEG."""
    return Image.new("RGB", size, (label // 10 * 25, label % 10 * 25, number * 12))


def seen(data: Any) -> list[tuple[int, int]]:
    """(label, number) of painted pictures, read off the pixels that a model gets."""
    found = []
    for example in data:
        mean, std = (torch.tensor(CONFIG[key]).view(3, 1, 1) for key in ("mean", "std"))
        red, green, blue = ((example["x"] * std + mean) * 255).mean((1, 2)).tolist()
        found.append((round(red / 25) * 10 + round(green / 25), round(blue / 12)))
    return found


def examples(data: Any) -> list[dict[str, Tensor]]:
    return [data[i] for i in range(len(data))]


def paint(folder: Path, classes: list[str], count: int, first: int = 0) -> None:
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(first, first + count):
            painted(label, number).save(folder / name / f"{number:03}.jpg", quality=95)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


# -- the choice of examples


@st.composite
def sources(draw: Any) -> tuple[Source, int, int]:
    """Labels of a data set with uneven classes, and how many of each class are asked for."""
    shots, held = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    published = draw(st.sampled_from(["all", "test", "nothing"]))
    classes = draw(st.integers(1, 5))
    generator = np.random.default_rng(draw(SEEDS))

    def split(fewest: int) -> Split:
        labels = np.repeat(np.arange(classes), generator.integers(fewest, fewest + 12, classes))
        return Split(None, 0, torch.from_numpy(generator.permutation(labels)))

    needed = (shots + held) * (2 if published == "nothing" else 1)
    parts = {"all": (split(held), split(1)), "test": (None, split(1)), "nothing": (None, None)}[published]
    return Source(tuple("abcde"[:classes]), split(needed), *parts), shots, held


@given(sources(), SEEDS, SEEDS)
def test_the_splits_are_stratified_disjoint_and_the_same_every_time(drawn, seed, other):
    source, shots, held = drawn
    before = torch.get_rng_state()
    chosen = choose(source, shots, held, seed)
    again = choose(source, shots, held, seed)
    elsewhere = choose(source, shots, held, other)
    assert torch.equal(torch.get_rng_state(), before)
    taken: dict[int, set[int]] = {}
    for name, (split, indices) in chosen.items():
        assert torch.equal(indices, again[name][1])
        mine = set(indices.tolist())
        assert len(mine) == len(indices)
        assert not mine & taken.setdefault(id(split), set())  # no picture twice, within or between splits
        taken[id(split)] |= mine
        if name != "train":
            assert torch.equal(indices, elsewhere[name][1])  # the seed chooses training examples alone
    counts = {name: split.labels[indices].bincount().tolist() for name, (split, indices) in chosen.items()}
    assert counts["train"] == [shots] * len(source.classes)
    assert counts["validation"] == [held] * len(source.classes)
    assert chosen["validation"][0] is (source.validation or source.train)
    if source.test is not None:
        assert sorted(chosen["test"][1].tolist()) == list(range(len(source.test.labels)))  # all of it
    else:
        assert counts["test"] == [-(-n // 5) for n in source.train.labels.bincount().tolist()]


@given(sources(), SEEDS)
def test_a_prefix_is_stratified_and_more_shots_contain_fewer(drawn, seed):
    source, shots, held = drawn
    fewer, more = choose(source, max(1, shots - 1), held, seed), choose(source, shots, held, seed)
    assert set(fewer["train"][1].tolist()) <= set(more["train"][1].tolist())
    assert torch.equal(fewer["validation"][1], more["validation"][1])
    split, indices = more["train"]
    for size in range(1, len(indices) + 1):
        counts = split.labels[indices[:size]].bincount(minlength=len(source.classes))
        assert int(counts.max() - counts.min()) <= 1
    everything = choose(source, None, held, seed)
    rest = len(source.train.labels) - sum(len(i) for split, i in more.values() if split is source.train)
    assert len(everything["train"][1]) == rest + len(indices)


def test_another_seed_chooses_others_of_every_class():
    source = Source(tuple("abc"), Split(None, 0, torch.arange(3).repeat(200)))
    first, second = (set(choose(source, 20, 5, seed)["train"][1].tolist()) for seed in (0, 1))
    assert len(first & second) < 30  # 7.5 of 60 expected by chance
    places = turns(source.train.labels, 3)
    assert sorted(places[source.train.labels == 1].tolist()) == list(range(200))
    assert sorted(stratified_order(source.train.labels).tolist()) == list(range(600))


def test_a_class_with_too_few_pictures_is_named():
    labels = torch.tensor([0] * 30 + [1] * 11)
    source = Source(("plenty", "rare"), Split(None, 0, labels), None, Split(None, 0, labels))
    with pytest.raises(ValueError, match=r"class 'rare' has 9 pictures left for training, which needs 10 of each"):
        choose(source, 10, 2, 0)
    with pytest.raises(ValueError, match=r"class 'rare' has 11 pictures left for validation, which needs 12"):
        choose(source, 10, 12, 0)
    few = Source(("plenty", "rare"), source.train, Split(None, 0, torch.tensor([0, 0])), source.test)
    with pytest.raises(ValueError, match=r"class 'rare' has 0 pictures left for validation"):
        choose(few, 10, 1, 0)


def test_labels_outside_the_classes_are_refused():
    """The hub has test splits whose labels are kept secret: −1."""
    with pytest.raises(ValueError, match=r"label -1 of the test split is outside \[0, 1\]"):
        Source(("a", "b"), Split(None, 0, torch.tensor([0, 1])), None, Split(None, 0, torch.tensor([-1])))


# -- torchvision


@pytest.fixture(scope="module")
def cifar100(tmp_path_factory) -> Iterator[Path]:
    """CIFAR-100's own layout: pickled dicts of (N, 3072) rows, channels first, and of names; 14 and 2 of each class."""
    root = tmp_path_factory.mktemp("cifar")
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name, numbers in (("train", range(14)), ("test", range(14, 16))):
        pairs = [(label, number) for number in numbers for label in reversed(range(100))]
        rows = np.stack([np.asarray(painted(*pair, (32, 32))).transpose(2, 0, 1).ravel() for pair in pairs])
        fine = [label for label, _ in pairs]
        entry = {"data": rows, "fine_labels": fine, "coarse_labels": [label // 5 for label in fine]}
        (folder / name).write_bytes(pickle.dumps(entry))
    names = {"fine_label_names": [f"thing {i}" for i in range(100)], "coarse_label_names": list("abcdefghijklmnopqrst")}
    (folder / "meta").write_bytes(pickle.dumps(names))
    with pytest.MonkeyPatch.context() as patch:  # torchvision knows the checksums of the real files
        patch.setattr(CIFAR100, "train_list", [["train", md5(folder / "train")]])
        patch.setattr(CIFAR100, "test_list", [["test", md5(folder / "test")]])
        patch.setattr(CIFAR100, "meta", CIFAR100.meta | {"md5": md5(folder / "meta")})
        yield root


def test_cifar100(cifar100):
    task = Cifar100(root=str(cifar100))
    assert task.num_classes == 100
    assert task.source.classes[:2] == ("thing 0", "thing 1")
    data = task.prepare(vision())
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1000, 200, 200]
    trained, validated, tested = (seen(split) for split in map(examples, (data.train, data.validation, data.test)))
    assert [label for label, _ in trained] == data.train.labels.tolist()  # the pixels are those of the label
    assert len({*trained, *validated, *tested}) == 1400
    assert {number for _, number in tested} == {14, 15}
    digest = hashlib.sha256(repr((trained[:300], validated[:50], tested[:50])).encode()).hexdigest()[:16]
    assert digest == CHOSEN_OF_CIFAR100


def test_the_seed_of_the_run_chooses_only_where_it_is_asked_to(cifar100):
    def chosen(seed: int, **options: Any) -> list[list[int]]:
        data = Cifar100(root=str(cifar100), **options).prepare(vision(), seed)
        return [split.indices.tolist() for split in (data.train, data.validation, data.test)]

    fixed = chosen(0)
    assert chosen(7) == fixed
    assert chosen(7, data_seed=7)[0] != fixed[0]
    free = chosen(7, data_seed="run")
    assert free == chosen(0, data_seed=7)
    assert free[1:] == fixed[1:]
    assert [len(part) for part in chosen(0, shots="all")] == [1200, 200, 200]
    small = chosen(0, train_size=250, test_size=30)
    assert small == [fixed[0][:250], fixed[1], fixed[2][:30]]


@pytest.fixture(scope="module")
def food101(tmp_path_factory) -> Path:
    """Food-101's own layout: lists of names in JSON, and a folder of pictures per class."""
    root = tmp_path_factory.mktemp("food")
    dishes = ["apple_pie", "ramen", "waffles"]
    paint(root / "food-101" / "images", dishes, 9)
    meta = root / "food-101" / "meta"
    meta.mkdir()
    for name, numbers in (("train", range(6)), ("test", range(6, 9))):
        lists = {dish: [f"{dish}/{number:03}" for number in numbers] for dish in reversed(dishes)}
        (meta / f"{name}.json").write_text(json.dumps(lists))
    return root


def test_food101(food101):
    task = Food101(root=str(food101), shots=4)
    assert task.source.classes == ("apple_pie", "ramen", "waffles")
    assert task.num_classes == 3
    data = task.prepare(vision())
    assert [len(split) for split in (data.train, data.validation, data.test)] == [12, 6, 9]
    assert set(seen(examples(data.test))) == {(label, number) for label in range(3) for number in (6, 7, 8)}
    left = seen(examples(data.train)) + seen(examples(data.validation))
    assert sorted(left) == [(label, number) for label in range(3) for number in range(6)]


def test_the_labels_are_read_without_the_pictures(food101, monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    _read.cache_clear()
    assert len(read("torchvision:Food101", str(food101)).train.labels) == 18


def flowers(root, monkeypatch, published):
    """Flowers-102's own layout: MATLAB files of labels from 1 and of numbers of pictures, and numbered pictures.

    ``published`` is how many of each class the parts for training, validation and test have.
    """
    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    pairs = [(label, number) for number in range(sum(published)) for label in range(102)]
    for i, (label, number) in enumerate(pairs, 1):
        painted(label, number, (8, 6)).save(folder / "jpg" / f"image_{i:05}.jpg", quality=95)
    savemat(folder / "imagelabels.mat", {"labels": np.array([[label + 1 for label, _ in pairs]], dtype=np.uint8)})
    ids = np.arange(1, len(pairs) + 1, dtype=np.uint16)
    first, second = 102 * published[0], 102 * (published[0] + published[1])
    savemat(folder / "setid.mat", {"trnid": ids[:first], "valid": ids[first:second], "tstid": ids[second:]})
    sums = {"label": "imagelabels.mat", "setid": "setid.mat"}
    files = {key: (name, md5(folder / name)) for key, name in sums.items()}
    monkeypatch.setattr(TorchvisionFlowers102, "_file_dict", TorchvisionFlowers102._file_dict | files)


def test_flowers102(tmp_path, monkeypatch):
    flowers(tmp_path, monkeypatch, (2, 2, 1))
    data = Flowers102(root=str(tmp_path), shots=2, validation_shots=1).prepare(vision())
    assert [len(split) for split in (data.train, data.validation, data.test)] == [204, 102, 102]
    assert data.test.labels.tolist() == list(range(102))
    assert {number for _, number in seen(examples(data.train))} == {0, 1}  # all that were published for training
    validated = seen(examples(data.validation))
    assert {number for _, number in validated} <= {2, 3}  # the published validation split
    assert [label for label, _ in validated] == list(range(102))
    assert Flowers102(root=str(tmp_path)).source.classes[0] == "pink primrose"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        (Cifar100, "cifar-100-python/train, test and meta"),
        (Food101, "food-101/meta/train.json"),
        (Flowers102, "flowers-102/imagelabels.mat"),
    ],
)
def test_an_empty_root_is_named_with_what_belongs_there(tmp_path, task, expected):
    with pytest.raises(ValueError, match=rf"{tmp_path} does not hold torchvision's \w+, expected {expected}"):
        _ = task(root=str(tmp_path)).num_classes


def test_the_default_root_is_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SVDPEFT_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=str(tmp_path / "data")):
        read("torchvision:CIFAR10")


def test_torchvision_is_asked_to_download_only_on_demand(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(CIFAR100, "download", lambda self: asked.append(self.root))
    for download in (False, True):
        with pytest.raises(ValueError, match="does not hold"):
            read("torchvision:CIFAR100", str(tmp_path), download)
    assert asked == [tmp_path]


def test_data_sets_that_are_not_there_or_do_not_classify():
    with pytest.raises(ValueError, match="torchvision has no data set 'CIFAR-100': did you mean 'CIFAR100'"):
        read("torchvision:CIFAR-100")
    with pytest.raises(ValueError, match="there is no folder 'torchvison:CIFAR100': did you mean 'torchvision:NAME'"):
        read("torchvison:CIFAR100")
    with pytest.raises(ValueError, match="there is no folder 'nowhere/at all'; expected in it: <class>/"):
        read("at all", "nowhere")
    with pytest.raises(ValueError, match="torchvision cannot download ImageNet"):
        read("torchvision:ImageNet", "here", download=True)
    with pytest.raises(ValueError, match="download=True is for torchvision's data sets, not for 'hf:timm/resisc45'"):
        Resisc45(download=True).num_classes  # noqa: B018
    with pytest.raises(ValueError, match="label='fine' names a column of 'hf:' data"):
        Cifar100(label="fine").num_classes  # noqa: B018


def test_torchvisions_own_splits_are_found(monkeypatch):
    """Of every data set with a ``split`` the names that torchvision has for it, as it checks them itself."""
    import inspect

    from torchvision import datasets

    from svdpeft.tasks.sources import SPLITS

    assert all(hasattr(datasets, name) for name in SPLITS)
    for name in ("Food101", "GTSRB", "SVHN", "STL10", "StanfordCars", *SPLITS):
        text = inspect.getsource(getattr(datasets, name))
        for split in SPLITS.get(name, ("train", None, "test")):
            assert split is None or f'"{split}"' in text, (name, split)


# -- folders


def test_folders_of_train_val_and_test(tmp_path):
    for i, part in enumerate(("train", "val", "test")):
        paint(tmp_path / part, ["cat", "dog"], 5, first=5 * i)
    data = Images(data=str(tmp_path), shots=3, validation_shots=4).prepare(vision())
    numbers = [sorted({n for _, n in seen(examples(part))}) for part in (data.train, data.validation, data.test)]
    assert set(numbers[0]) < set(range(5))
    assert set(numbers[1]) <= set(range(5, 10))
    assert len(data.validation) == 8
    assert numbers[2] == [10, 11, 12, 13, 14]


def test_with_one_held_out_folder_it_is_the_test(tmp_path):
    paint(tmp_path / "train", ["cat", "dog"], 5)
    paint(tmp_path / "valid", ["cat", "dog"], 3, first=5)
    data = Images(data=tmp_path.name, root=str(tmp_path.parent), shots=3).prepare(vision())
    assert {n for _, n in seen(examples(data.test))} == {5, 6, 7}
    assert {n for _, n in seen(examples(data.validation))} <= set(range(5))


def test_one_folder_is_split_as_resisc45_is(tmp_path):
    classes = ["airplane", "airport", "beach"]
    paint(tmp_path / "NWPU-RESISC45", classes, 20)
    task = Resisc45(data="NWPU-RESISC45", root=str(tmp_path))
    assert task.source.classes == tuple(classes)
    data = task.prepare(vision())
    parts = [seen(examples(part)) for part in (data.train, data.validation, data.test)]
    assert [len(part) for part in parts] == [30, 6, 12]
    assert len({pair for part in parts for pair in part}) == 48
    assert Resisc45().data == "hf:timm/resisc45"


def test_a_class_that_only_the_test_has(tmp_path):
    paint(tmp_path / "train", ["cat", "dog"], 2)
    paint(tmp_path / "test", ["cat", "horse"], 2)
    with pytest.raises(ValueError, match=r"test has the class 'horse', which the training split has not"):
        read(str(tmp_path))


def test_a_test_folder_without_some_class_keeps_the_numbers(tmp_path):
    paint(tmp_path / "train", ["ant", "bee", "cat"], 1)
    paint(tmp_path / "test", ["bee", "cat"], 1)
    source = read(str(tmp_path))
    assert source.classes == ("ant", "bee", "cat")
    assert source.test.labels.tolist() == [1, 2]


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path} is no folder of pictures, expected <class>/\*.jpg, or train/"):
        read(str(tmp_path))


# -- datasets


@pytest.fixture(scope="module")
def table() -> Any:
    """Rows as on the hub: pictures and two kinds of labels."""
    datasets = pytest.importorskip("datasets", reason='pip install "svdpeft[data]"')
    datasets.disable_progress_bars()
    pairs = [(label, number) for number in range(6) for label in range(2)]
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["cat", "dog"]),
            "coarse_label": datasets.ClassLabel(names=["animal"]),
            "word": datasets.Value("string"),
        }
    )
    rows = {
        "img": [painted(*pair) for pair in pairs],
        "fine_label": [label for label, _ in pairs],
        "coarse_label": [0] * len(pairs),
        "word": ["zebra" if label == 0 else "ape" for label, _ in pairs],
    }
    return datasets.Dataset.from_dict(rows, features=features)


def test_what_datasets_saved(table, tmp_path):
    from datasets import DatasetDict

    DatasetDict(train=table, validation=table.select(range(4))).save_to_disk(tmp_path / "both")
    table.save_to_disk(tmp_path / "one")
    both = f"hf:{tmp_path / 'both'}"
    data = Images(data=both, label="fine_label", shots=3).prepare(vision())
    assert sorted(seen(examples(data.test))) == [(0, 0), (0, 1), (1, 0), (1, 1)]  # its only held-out split
    assert [label for label, _ in seen(examples(data.train))] == data.train.labels.tolist() == [0, 1] * 3
    named = Images(data=both, label="word").source
    assert named.classes == ("ape", "zebra")
    assert named.train.labels.tolist() == [1, 0] * 6
    alone = Images(data=f"hf:{tmp_path / 'one'}", label="fine_label", shots=2, validation_shots=1).prepare(vision())
    assert [len(part) for part in (alone.train, alone.validation, alone.test)] == [4, 2, 4]

    with pytest.raises(ValueError, match="has 2 columns of classes: choose label= from img, fine_label, coarse_label"):
        read(both)
    with pytest.raises(ValueError, match="has no column 'fine_labels': did you mean 'fine_label'"):
        read(both, label="fine_labels")
    DatasetDict(test=table).save_to_disk(tmp_path / "test")
    with pytest.raises(ValueError, match="has no training split"):
        read(f"hf:{tmp_path / 'test'}")
    table.remove_columns("img").save_to_disk(tmp_path / "blind")
    with pytest.raises(ValueError, match="has no column of pictures; its columns: fine_label"):
        read(f"hf:{tmp_path / 'blind'}")


def test_a_folder_that_datasets_loads(table, tmp_path):
    for i, part in enumerate(("train", "validation", "test")):
        paint(tmp_path / "pets" / part, ["cat", "dog"], 3, first=3 * i)
    task = Images(data=f"hf:{tmp_path / 'pets'}", root=str(tmp_path / "cache"), shots=2, validation_shots=1)
    data = task.prepare(vision())
    assert task.num_classes == 2
    assert {n for _, n in seen(examples(data.validation))} <= {3, 4, 5}
    assert {n for _, n in seen(examples(data.test))} == {6, 7, 8}


def test_a_name_that_the_hub_does_not_give(table, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'hf:nobody/nothing' cannot be read, expected the name of a data set on the"):
        read("hf:nobody/nothing")


# -- what a model sees


def test_the_transform_is_the_models_own(cifar100):
    """By hand: the shorter side to size / crop_pct, the centre, (v / 255 − mean) / std; or the whole picture."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    config = CONFIG | {"input_size": (3, 28, 28)}
    small = picture.resize((48, 32), Image.Resampling.BICUBIC).crop((10, 2, 38, 30))
    squashed = picture.resize((28, 28), Image.Resampling.BICUBIC)
    for crop, pixels in (("center", small), ("squash", squashed)):
        values = np.asarray(pixels, dtype=np.float64) / 255
        expected = ((values - np.array(CONFIG["mean"])) / np.array(CONFIG["std"])).transpose(2, 0, 1)
        torch.testing.assert_close(view(config, crop)(picture).double(), torch.tensor(expected), atol=1e-6, rtol=0)
    one = Cifar100(root=str(cifar100)).prepare(vision(nn.Linear(2, 2).bfloat16())).train[0]
    assert one["x"].dtype == torch.bfloat16
    assert one["x"].shape == (3, 24, 32)


def test_grey_and_transparent_pictures_become_colour(tmp_path):
    Image.new("L", (9, 9), 77).save(tmp_path / "grey.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 0)).save(tmp_path / "clear.png")
    items = [(tmp_path / "grey.png",), (tmp_path / "clear.png",), (Image.new("L", (9, 9), 5),)]
    split = Split(items, 0, torch.tensor([0, 0, 0]))
    assert [split.picture(i).getpixel((0, 0)) for i in range(3)] == [(77, 77, 77), (1, 2, 3), (5, 5, 5)]


def test_examples_go_to_workers_and_batches_are_decoded_side_by_side(food101):
    data = Food101(root=str(food101), shots=3).prepare(vision())
    expected = [data.train[i] for i in range(len(data.train))]
    copy = pickle.loads(pickle.dumps(data.train))
    in_workers = DataLoader(copy, 3, collate_fn=data.collate, num_workers=2, generator=torch.Generator())
    for loader in (DataLoader(data.train, 3, collate_fn=data.collate), in_workers):
        batches = list(loader)
        assert torch.equal(torch.cat([batch["x"] for batch in batches]), torch.stack([e["x"] for e in expected]))
        assert torch.equal(torch.cat([batch["labels"] for batch in batches]), data.train.labels)


class Counting(nn.Module):
    """Looks at the colours alone; notes the batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.sizes = nn.Linear(3, 100), []

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        self.sizes.append(len(x))
        return self.linear(x.mean((2, 3)))


def test_each_picture_is_judged_and_nothing_else_changes(cifar100):
    data = Cifar100(root=str(cifar100)).prepare(vision())
    model = Counting().train()
    before = torch.get_rng_state()
    found = data.evaluate(model, data.test)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert model.sizes == [64, 64, 64, 8]
    pictures = examples(data.test)
    x, labels = (torch.stack([example[key] for example in pictures]) for key in ("x", "labels"))
    logits = model.eval()(x).detach()
    assert found["accuracy"] == (logits.argmax(1) == labels).float().tolist()
    expected = [-float(row.log_softmax(0)[label]) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(torch.tensor(found["loss"]), torch.tensor(expected))
    assert evaluate(model, data.test, ("loss",)).keys() == {"loss"}
    with pytest.raises(ValueError, match="image tasks have no metric 'acuracy': did you mean 'accuracy'"):
        evaluate(model, data.test, ("acuracy",))


def test_a_model_learns_from_ten_of_each(food101):
    """End to end on the trainer's own terms: batches of the collate function, cross-entropy, the test split."""
    data = Food101(root=str(food101), shots=4).prepare(vision())
    model = Counting()
    batch = data.collate(examples(data.train))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(300):
        loss = F.cross_entropy(model.linear(batch["x"].mean((2, 3))), batch["labels"])
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    assert sum(data.evaluate(model, data.test)["accuracy"]) == len(data.test)


# -- options


def test_registered_and_with_honest_errors(cifar100):
    assert {"images", "cifar100", "food101", "flowers102", "resisc45"} <= set(TASKS)
    with pytest.raises(ValueError, match="cifar100 has no hyper-parameter 'shot': did you mean 'shots'"):
        TASKS.make("cifar100", {"shot": 3})
    for options, said in (
        ({"shots": 0}, "shots 0 of task 'cifar100' is no whole number from 1 nor 'all'"),
        ({"validation_shots": "all"}, "validation_shots 'all' of task 'cifar100' is no whole number from 1$"),
        ({"data_seed": -1}, "data_seed -1 of task 'cifar100' is no whole number from 0 nor 'run'"),
    ):
        with pytest.raises(ValueError, match=said):
            TASKS.make("cifar100", options)
    with pytest.raises(ValueError, match="crop 'centre' of task 'images' is neither"):
        Images(data="here", crop="centre")  # type: ignore[arg-type]
    task = Cifar100(root=str(cifar100), test_size=201)
    with pytest.raises(ValueError, match=r"test_size 201 is outside \[1, 200\] of task 'cifar100'"):
        task.prepare(vision())
    language = Loaded(nn.Linear(2, 2), "tiny", None, "language", None)
    with pytest.raises(ValueError, match="task 'cifar100' is for vision models, but 'tiny' is a language model"):
        Cifar100(root=str(cifar100)).prepare(language)
    assert isinstance(Cifar100(root=str(cifar100)).prepare(vision()).train, Pictures)
    json.dumps(vars(task))  # a record of a run holds the task's options

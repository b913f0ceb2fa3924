"""Subsets of a data set: which rows, that nothing else is read, and what is refused."""

import numpy as np
import pytest

from mf_lightning.cli import load, main
from mf_lightning.data.datamodule import LatentDataModule
from mf_lightning.data.subset import Subset
from mf_lightning.types import UserError
from tests.runs import RECIPES
from tests.test_data import write_dataset

COUNTS = (40, 1, 59)
LABELS = np.random.default_rng(0).choice(4, size=100, p=[0.4, 0.3, 0.2, 0.1])
NAMES = "abcd"


@pytest.fixture
def path(tmp_path):
    write_dataset(tmp_path, counts=COUNTS, labels=LABELS, flip=True)
    return str(tmp_path)


def values(data, name):
    """Return the rows of the stored split that a split of the module holds, read back from the latents, and their labels."""
    split = data.split(name)
    latents, labels = split.gather(np.arange(len(split)))
    return latents[:, 0, 0, 0].astype(int), labels


def module(path, **subset):
    return LatentDataModule(path, batch_size=1, subset=Subset(**subset))


def test_no_option_is_the_whole_set(path):
    data = LatentDataModule(path, batch_size=1)
    assert data.split("train").rows is None
    assert module(path).split("train").rows is None
    data.split("train")
    assert data.state_dict() == {"samples": 100, "batch_size": 1, "seed": 0}


@pytest.mark.parametrize("classes", [["b", "d"], [1, 3], [3, "b", 1]])
def test_classes_by_name_or_number_keep_their_labels(path, classes):
    data = module(path, classes=classes)
    rows, labels = values(data, "train")
    assert rows.tolist() == np.flatnonzero(np.isin(LABELS, [1, 3])).tolist()
    assert (labels == LABELS[rows]).all()
    assert data.latent_spec.num_classes == 4
    assert values(data, "val")[1].tolist() == [y for y in LABELS[:4] if y in (1, 3)]


def test_flipped_copies_are_those_of_the_same_rows(path):
    split = module(path, max_per_class=5).split("train")
    index = np.array([3, 0, 19, 7])
    plain, mirrored = split.gather(index)[0], split.gather(index, np.ones(4, bool))[0]
    assert (plain == -mirrored).all()


def test_a_cap_takes_so_many_of_each_class_and_grows_by_adding(path):
    small, large = (values(module(path, max_per_class=m), "train") for m in (5, 12))
    assert np.bincount(small[1]).tolist() == [5, 5, 5, 5]
    assert np.bincount(large[1]).tolist() == np.minimum(np.bincount(LABELS), 12).tolist()
    assert set(small[0]) < set(large[0])
    other = values(module(path, max_per_class=5, seed=1), "train")
    assert set(other[0]) != set(small[0])
    assert small[0].tolist() == values(module(path, max_per_class=5), "train")[0].tolist()


def test_balanced_is_the_size_of_the_smallest_class(path):
    assert np.bincount(values(module(path, balanced=True), "train")[1]).tolist() == [np.bincount(LABELS).min()] * 4
    both = module(path, balanced=True, max_per_class=3, classes=["a", "b"])
    assert np.bincount(values(both, "train")[1]).tolist() == [3, 3]


def test_a_held_out_share_of_each_class_validates(path):
    data = module(path, val_fraction=0.25, seed=3)
    (train, _), (val, val_labels) = values(data, "train"), values(data, data.val_split)
    assert sorted([*train, *val]) == list(range(100))
    assert np.bincount(val_labels).tolist() == [round(0.25 * n) for n in np.bincount(LABELS)]
    capped = module(path, val_fraction=0.25, seed=3, max_per_class=4)
    assert values(capped, capped.val_split)[0].tolist() == val.tolist()  # other training rows, the same validation
    assert set(values(capped, "train")[0]) < set(train)


def test_rows_are_chosen_without_reading_latents(path, monkeypatch):
    data = module(path, max_per_class=2)
    labels = data.place.labels("train")
    assert labels.tolist() == LABELS.tolist()
    rows = data.subset.training_rows(labels, NAMES)
    assert rows.tolist() == values(data, "train")[0].tolist()


# what is refused


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ({"classes": ["e"]}, r"Got the class 'e' .* a name or a number in \[0, 4\) of this data set: a, b, c, d"),
        ({"classes": [4]}, "Got the class 4 in subset.classes"),
        ({"classes": [-1]}, "Got the class -1 in subset.classes"),
        ({"classes": [True]}, "Got the class True in subset.classes"),
    ],
)
def test_unknown_classes(path, subset, message):
    with pytest.raises(UserError, match=message):
        module(path, **subset).split("train")


@pytest.mark.parametrize(
    ("subset", "message"),
    [
        ({"classes": []}, "without any class"),
        ({"max_per_class": 0}, "expected at least 1"),
        ({"val_fraction": 1.0}, r"expected a share in \[0, 1\)"),
        ({"val_fraction": -0.1}, r"expected a share in \[0, 1\)"),
        ({"seed": -1}, "Got subset.seed = -1"),
    ],
)
def test_values_out_of_range(subset, message):
    with pytest.raises(UserError, match=message):
        Subset(**subset)


def test_results_that_are_empty(tmp_path):
    write_dataset(tmp_path, counts=(6,), labels=np.array([0, 0, 0, 1, 1, 1]))
    with pytest.raises(UserError, match="Got no row to train with, of the subset classes d"):
        module(str(tmp_path), classes=["d"]).split("train")
    with pytest.raises(UserError, match=r"Got no training row of class 2 \(c\), expected some of each of the 4"):
        module(str(tmp_path), balanced=True).split("train")
    tiny = module(str(tmp_path), val_fraction=0.1)
    with pytest.raises(UserError, match="Got no row to validate with"):
        tiny.split(tiny.val_split)


def test_classes_of_a_set_without_classes(tmp_path):
    write_dataset(tmp_path, counts=(6,), labels=np.zeros(6, int), classes=0)
    with pytest.raises(UserError, match="a data set without classes"):
        module(str(tmp_path), classes=[0]).split("train")
    assert len(module(str(tmp_path), max_per_class=2).split("train")) == 2


def test_a_share_beside_a_split(path):
    with pytest.raises(UserError, match=r"Got data.init_args.val_split = test and subset.val_fraction = 0.5"):
        LatentDataModule(path, val_split="test", subset=Subset(val_fraction=0.5))


# in a run


def arguments(path, root, *more):
    quick = [
        "--data.init_args.autoencoder=null", "--data.init_args.batch_size=8", "--trainer.max_steps=4", "--sample_grid.rows=0",
        "--trainer.val_check_interval=2", "--sample_eval.num_samples=0", "--self_check.enabled=false",
        "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
        "--model.lr_schedule.init_args.warmup_steps=1", "--model.net.init_args.depth=1",
    ]  # fmt: skip
    return [f"--config={RECIPES / 'quickstart.yaml'}", f"--data.init_args.path={path}", f"--trainer.default_root_dir={root}",
            *quick, *more]  # fmt: skip


def test_resuming_with_another_subset_is_refused(path, tmp_path, capsys):
    given = ["--data.init_args.subset.max_per_class=10", "--data.init_args.subset.val_fraction=0.2"]
    root = tmp_path / "run"
    main(["fit", *arguments(path, root, *given)])
    capsys.readouterr()
    for other in (["--data.init_args.subset.seed=1"], ["--data.init_args.subset=null"]):
        with pytest.raises(SystemExit):
            main(["fit", *arguments(path, root, *given, *other, "--trainer.max_steps=6", "--ckpt_path=auto")])
        message = capsys.readouterr().err
        assert "subset = classes all; max_per_class 10; balanced False; val_fraction 0.2; seed 0: a resumed run" in message
    main(["fit", *arguments(path, root, *given, "--trainer.max_steps=6", "--ckpt_path=auto")])


def test_the_command_line_takes_a_list_of_classes(path, tmp_path):
    cli = load(arguments(path, tmp_path / "run", "--data.init_args.subset.classes=[a,3]"))
    assert cli.datamodule.subset == Subset(classes=["a", 3])

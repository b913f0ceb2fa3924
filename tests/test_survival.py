"""What must not be lost: checkpoints on a full disk; what must not run: code in them."""

import resource

import pytest
import torch

from mf_lightning.callbacks import AtomicCheckpointIO
from mf_lightning.types import UserError


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(tmp_path):
    """A file-size limit makes the write fail in the middle, as a full disk does."""
    import signal

    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"global_step": 1, "x": torch.ones(10)}, path)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"Got no checkpoint written .* is still whole"):
            io.save_checkpoint({"global_step": 2, "x": torch.ones(1_000_000)}, path)
        with pytest.raises(UserError, match="Nothing was written"):
            io.save_checkpoint({"global_step": 2, "x": torch.ones(1_000_000)}, tmp_path / "other.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert io.load_checkpoint(path)["global_step"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "step00000001.ckpt"]


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"x": Evil()}))
    torch.save({"x": Evil()}, tmp_path / "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        with pytest.raises(UserError, match="cannot be read"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / name)
    assert not (tmp_path / "made").exists()


def test_no_code_in_extractor_weights_is_run(tmp_path):
    """torch-fidelity unpickles them freely."""
    import pickle

    from mf_lightning.metrics.extractor import Extractor

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    for name, content in (("plain.pth", pickle.dumps({"x": Evil()})), ("zip.pth", None)):
        if content is None:
            torch.save({"x": Evil()}, tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="Got no feature extractor"):
            Extractor("inception-v3-compat", weights=str(tmp_path / name))
    assert not (tmp_path / "made").exists()

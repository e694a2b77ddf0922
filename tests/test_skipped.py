"""Mini-batches of skipped updates, saved and loaded again."""

from pathlib import Path

import numpy as np
import pytest

from crpo_jax.errors import InputError
from crpo_jax.store.skipped import load_batches, save_batches, skipped_path, skipped_paths, skipped_steps


def test_batches_come_back_and_a_damaged_file_is_refused(tmp_path: Path):
    mini = [
        {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3), "weights": np.array([1.0, np.nan], np.float32)},
        {"tokens": np.zeros((1, 2), np.int32)},
    ]
    path = skipped_path(tmp_path, 3, 1)
    save_batches(path, mini)
    assert (skipped_paths(tmp_path, 3), skipped_paths(tmp_path, 4), skipped_steps(tmp_path)) == ([path], [], [3])
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    for before, after in zip(mini, load_batches(path), strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(value, after[name], strict=True)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=f"{path}: expected a mini-batch that a run saved, got: "):
        load_batches(path)
    np.savez(path, **{"0/tokens": np.array([{"a": 1}], dtype=object)})
    with pytest.raises(InputError, match="pickle"):
        load_batches(path)

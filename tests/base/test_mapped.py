"""What holds of tensors in mapped files, in every format."""

import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tenfold.base import gguf
from tenfold.base.mapped import MappedTensors
from tenfold.nn import safetensors

Tensors = Mapping[str, np.ndarray]
FORMATS: dict[str, tuple[Callable[[Path, Tensors], None], Callable[[Path], MappedTensors]]] = {
    "gguf": (lambda path, tensors: gguf.write(path, {}, tensors), gguf.open),
    "safetensors": (safetensors.write, safetensors.open),
}
every_format = pytest.mark.parametrize("form", list(FORMATS))


@every_format
def test_views_outlive_the_file_and_its_handle(tmp_path: Path, form: str) -> None:
    path, (write, read) = tmp_path / "a", FORMATS[form]
    array = np.arange(100_000, dtype=np.float32)
    write(path, {"x": array, "y": array + 1})
    file = read(path)
    view = file["x"]
    file.will_need(view)
    file.release(view[10:-10])
    write(path, {"x": array * 0})
    del file
    gc.collect()
    np.testing.assert_array_equal(view, array)
    path.unlink()
    np.testing.assert_array_equal(view, array)


@every_format
def test_advice_about_other_memory_is_ignored(tmp_path: Path, form: str) -> None:
    path, (write, read) = tmp_path / "a", FORMATS[form]
    write(path, {"x": np.ones(3, np.float32)})
    file = read(path)
    own = np.ones(100_000, np.float32)
    file.release(own)
    file.release(file["x"][:0])
    assert own.sum() == 100_000


@every_format
def test_a_file_is_a_mapping_of_its_own(tmp_path: Path, form: str) -> None:
    """Equal to none but itself: comparing would read all tensors of both."""
    path, (write, read) = tmp_path / "a", FORMATS[form]
    write(path, {"x": np.ones(3, np.float32), "y": np.ones(2, np.float32)})
    file = read(path)
    assert set(file) == {"x", "y"}
    assert len(file) == 2
    assert file == file
    assert file != read(path)
    assert len({file, read(path)}) == 2

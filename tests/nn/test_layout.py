"""Layouts are bijections between a checkpoint's dims and ours."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenfold.nn.layout import check_layout, checkpoint_shape, to_checkpoint, to_model

LAYOUTS = [None, "O I -> I O", "(H K) D -> D H K", "D (H K) -> H K D", "(G R K) D -> G R D K", "(H K) -> H K"]


def dims(layout: str | None) -> int:
    return 2 if layout is None else len(layout.split("->")[1].split())


@given(layout=st.sampled_from(LAYOUTS), sizes=st.lists(st.integers(1, 5), min_size=4, max_size=4))
def test_there_and_back_is_the_identity(layout: str | None, sizes: list[int]) -> None:
    shape = tuple(sizes[: dims(layout)])
    ours = np.arange(np.prod(shape)).reshape(shape)
    theirs = to_checkpoint(ours, layout)
    assert theirs.shape == checkpoint_shape(layout, shape)
    np.testing.assert_array_equal(to_model(theirs, layout, shape), ours)


def test_heads_are_rows_of_the_projection() -> None:
    H, K, D = 3, 2, 4
    weight = np.arange(H * K * D).reshape(H * K, D)  # torch's Linear: y = weight @ x
    ours = to_model(weight, "(H K) D -> D H K", (D, H, K))
    x = np.arange(D)
    np.testing.assert_array_equal(np.einsum("d,dhk->hk", x, ours).reshape(-1), weight @ x)


def test_reading_is_a_view() -> None:
    stored = np.zeros((6, 4), np.float32)
    assert np.shares_memory(to_model(stored, "(H K) D -> D H K", (4, 3, 2)), stored)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        ("A B -> B A", (2, 3, 4)),
        ("A B -> B C", (2, 3)),
        ("A B -> (B A)", (6,)),
        ("A A -> A A", (2, 2)),
        ("A B -> A 1", (2, 1)),
        ("A B ->", (2, 3)),
    ],
)
def test_what_is_no_bijection_is_refused(layout: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is not a bijection"):
        check_layout(layout, shape)

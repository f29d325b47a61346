"""Programs that are kept on disk: found again without being traced, and never trusted when damaged or another's."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tenfold.engine import program_cache
from tenfold.engine.program_cache import Program, ProgramCache

SHAPE = jax.ShapeDtypeStruct((64, 64), jnp.float32)


def multiply(state: jax.Array, x: jax.Array) -> dict[str, jax.Array]:
    return {"state": state + 1, "product": jnp.sin(state @ x)}


def never(*_: Any) -> Any:
    raise AssertionError("this program was to be loaded, not traced")


def take(directory: Path | None, fn: Any, about: str = "") -> Any:
    cache = ProgramCache(directory, jax.devices()[0])
    return cache.take({("multiply", 64): Program(jax.jit(fn, donate_argnums=0), (SHAPE, SHAPE), about)})["multiply", 64]


def check(program: Any) -> None:
    given = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    state = jnp.asarray(given)
    made = program(state, jnp.eye(64))
    np.testing.assert_allclose(made["product"], np.sin(given), atol=1e-6)
    np.testing.assert_array_equal(made["state"], given + 1)
    assert state.is_deleted()  # donated


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "programs"


def test_a_kept_program_is_not_traced_again(directory: Path) -> None:
    check(take(directory, multiply))
    check(take(directory, never))


def test_values_that_are_bound_make_another_program(directory: Path) -> None:
    check(take(directory, multiply, "k=1"))
    with pytest.raises(AssertionError, match="not traced"):
        take(directory, never, "k=2")


@pytest.mark.parametrize("damage", [lambda kept: kept[: len(kept) // 2], lambda kept: b"not a program", lambda _: b""])
def test_a_damaged_program_is_compiled_anew(directory: Path, damage: Any) -> None:
    take(directory, multiply)
    [file] = directory.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    check(take(directory, multiply))
    check(take(directory, never))


def test_a_directory_that_others_may_write_is_not_used(directory: Path) -> None:
    take(directory, multiply)
    directory.chmod(0o777)
    with pytest.raises(AssertionError, match="not traced"):
        take(directory, never)


def test_without_a_directory_nothing_is_kept() -> None:
    check(take(None, multiply))


def test_what_was_used_longest_ago_makes_room(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take(directory, multiply, "old")
    [old] = directory.iterdir()
    monkeypatch.setattr(program_cache, "KEPT_BYTES", old.stat().st_size * 3 // 2)
    take(directory, multiply, "new")
    [left] = directory.iterdir()
    assert left != old


@pytest.mark.usefixtures("programs")
def test_what_jax_has_compiled_before_is_kept_too(directory: Path) -> None:
    """JAX's own cache gives executables back that cannot be kept."""
    jax.jit(multiply, donate_argnums=0).lower(SHAPE, SHAPE).compile()
    jax.clear_caches()
    check(take(directory, multiply))
    check(take(directory, never))

"""Products with a large matrix are those of NumPy in whichever form they are computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvjax.ops import matrices

WIDE, TALL = 256, 512
FORMS = {"times": (matrices.times, (TALL, WIDE)), "times_rows": (matrices.times_rows, (WIDE, TALL))}


def given(rows, shape, dtype=np.float32):
    random = np.random.default_rng(0)
    return random.normal(size=(rows, TALL)).astype(dtype), random.normal(size=shape).astype(dtype)


def exact(x, matrix):
    matrix = matrix if matrix.shape[0] == TALL else matrix.T
    return x.astype(np.float64) @ matrix.astype(np.float64)


def error(got, wanted):
    return np.abs(np.asarray(got, np.float64) - wanted).max() / np.abs(wanted).max()


def parts(x, matrix):
    """Contractions with a batch axis in what is traced."""
    made = jax.make_jaxpr(matrices.times)(x, matrix)
    return sum(bool(e.params["dimension_numbers"][1][0]) for e in made.eqns if e.primitive.name == "dot_general")


@pytest.mark.corner
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_product_is_that_of_float64_and_so_is_its_gradient(form, rows):
    product, shape = FORMS[form]
    x, matrix = given(rows, shape)
    assert matrix.nbytes >= matrices.LEAST
    wanted = exact(x, matrix)
    assert error(jax.jit(product)(x, matrix), wanted) < 1e-6  # 512 products in float32
    back = jax.jit(jax.grad(lambda x, m: (product(x, m) ** 2).sum() / 2))(x, matrix)
    assert error(back, wanted @ (matrix.T if shape[0] == TALL else matrix)) < 1e-6
    assert error(product(x[:, ::-1], matrix), wanted) > 0.1, "parts in another order"


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="only XLA:CPU keeps a single row on one core")
def test_a_single_row_goes_in_parts_where_nothing_is_lost_to_rounding():
    assert parts(*given(1, (TALL, WIDE))) == 1
    assert parts(*given(2, (TALL, WIDE))) == 0, "several rows are spread as they are"
    assert parts(*given(1, (TALL, 8))) == 0, "small"
    half = (jnp.asarray(a, jnp.bfloat16) for a in given(1, (TALL, 2 * WIDE)))
    assert parts(*half) == 0, "partial sums would be rounded"

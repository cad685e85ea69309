"""What the shapes in signatures are of: `Float[Array, "B T D"]`.

Axes: B rows of a batch, S tokens of a sequence, N patches, T visual tokens, K kept tokens, H heads,
D channels. A letter is one size within a signature. The tests check every call, the package none.
"""

import jax
import numpy as np

# Traced, concrete, or of NumPy, which JAX takes as well.
Array = jax.Array | np.ndarray

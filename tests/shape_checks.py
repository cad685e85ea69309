"""Checks the shapes in the package's signatures while tests run; the package itself does not.

Importing this file installs the hook, so it comes before the first import of the package.
"""

from collections.abc import Callable

from beartype import beartype
from jaxtyping import install_import_hook

CHECKED = ["efficient_vlm.nn", "efficient_vlm.compressors"]


def check(function: Callable) -> Callable:
    """beartype, but of no constructor.

    Modules raise a UserError for a wrong field themselves, and JAX rebuilds pytrees with leaves
    that are no arrays.
    """
    return function if function.__name__ == "__init__" else beartype(function)


install_import_hook(CHECKED, "shape_checks.check")

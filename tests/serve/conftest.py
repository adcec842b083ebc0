import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile faster: these tests spend their time in the compiler, and their programs are small."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)

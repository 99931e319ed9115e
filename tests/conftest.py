"""Settings under which every test runs: four virtual CPU devices, strict shapes, no silent warning."""

import gc
import importlib.metadata
import os
import pathlib

# Most of the time of these tests goes into compiling programs that run once, so they are optimized little.
FAST_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
    # A quarter of the time; later compilers know no other kind of fusions, and end at a flag that they do not know.
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=4 {FAST_COMPILATION}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # where libtpu is installed, it would look for a TPU

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Lets go of compiled programs after each file: thousands in one process are more mappings than Linux allows it."""
    yield
    jax.clear_caches()
    gc.collect()


BENCHMARKS = pathlib.Path(os.environ.get("FEDJAX_PEFT_DATA", pathlib.Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def benchmarks() -> pathlib.Path:
    """Folder of benchmark files in hub column names; they are not part of the project."""
    if not BENCHMARKS.is_dir():
        pytest.skip(f"benchmark files absent: set FEDJAX_PEFT_DATA (looked in {BENCHMARKS})")
    return BENCHMARKS

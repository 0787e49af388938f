"""Define XLA's flags for tests."""

# Unoptimized code from the older emitters compiles fastest.
FAST_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# On a busy machine, simulated devices may wait long for each other.
LONG_TIMEOUTS = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=1800 --xla_cpu_collective_call_terminate_timeout_seconds=3600"
)
# XLA's defaults, as compiler options of `jax.jit`, for programs that run longer than they compile.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}

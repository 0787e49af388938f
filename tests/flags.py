"""XLA's flags of the tests: code that is not optimized, of its older and simpler emitters, is ready soonest."""

FAST_COMPILE = (
  "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
# Devices that are simulated may have to wait for each other for as long as a busy machine takes.
LONG_TIMEOUTS = (
  "--xla_cpu_collective_call_warn_stuck_timeout_seconds=1800 --xla_cpu_collective_call_terminate_timeout_seconds=3600"
)
# For `jax.jit` of a program that runs for longer than it compiles: as XLA would by itself.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_cpu_use_fusion_emitters": True}

"""Provide operations that have a plain form and forms tuned for a platform.

Each file starts with the plain form, which calls JAX directly. The tuned forms follow. All forms agree up to rounding.

Every operation takes the argument `kernels`, which selects the forms that the operation may use:

- "plain": the plain form on every platform. Use it as a reference, or to estimate on a CPU how much memory a program
  would take on another platform.
- "tuned": the form tuned for the platform that runs the program. This choice suits every program.
- "single_device": like "tuned", but only for programs that run on one device. On a CPU, it also allows a faster form
  of convolution. That form would hang in a program that spans several devices.
- "loop": like "tuned", but gradients of convolutions stay fast inside loops on a CPU. These convolutions have no
  forward-mode derivatives (`jax.jvp`).

On a CPU, "single_device" and "loop" compute long attention one sample after another. This is faster for a batch on one
device, but gathers a batch that is sharded over devices outside of `jax.shard_map`.
"""

KERNELS = ("tuned", "single_device", "loop", "plain")

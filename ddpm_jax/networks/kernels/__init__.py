"""Provide operations that have a plain form and forms tuned for a platform.

Each file starts with the plain form, which calls JAX directly. The tuned forms follow. All forms agree to float32
rounding.

Every operation takes the argument `kernels`, which selects the forms it may use:

- "plain": the plain form on every platform. Use it as a reference, or to plan another platform's memory on a CPU.
- "tuned": the fastest form on the platform that compiles the program.
- "single_device": like "tuned", for programs that run on one device. On a CPU it adds a convolution that would hang
  in a program that spans several devices.
- "loop": like "tuned", with convolution gradients that stay fast inside loops on a CPU. These have no forward-mode
  derivatives (`jax.jvp`).
"""

KERNELS = ("tuned", "single_device", "loop", "plain")

"""Provide operations that have a plain form and forms tuned for a platform.

Each file starts with the plain form, which calls JAX directly. The tuned forms follow. All forms agree up to rounding.

Every operation takes the argument `kernels`, which selects the forms that the operation may use:

- "plain": the plain form on every platform. Use it as a reference, or on a CPU to plan the memory of another platform.
- "tuned": the form tuned for the platform of the program. It suits every program.
- "single_device": like "tuned", for programs that run on one device. On a CPU it adds a form of convolution that would
  hang in a program that spans several devices.
- "loop": like "tuned", with convolution gradients that stay fast inside loops on a CPU. Its convolutions have no
  forward-mode derivatives (`jax.jvp`).
"""

KERNELS = ("tuned", "single_device", "loop", "plain")

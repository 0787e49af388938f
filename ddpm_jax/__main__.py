"""Run the command line with `python -m ddpm_jax`."""

from ddpm_jax.main import main

if __name__ == "__main__":
  main()

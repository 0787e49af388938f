"""`python -m ddpm_jax`: the command line."""

from ddpm_jax.main import main

if __name__ == "__main__":
  main()

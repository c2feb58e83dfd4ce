"""`python -m swa_dist`, which torchrun needs."""

from swa_dist.cli import main

if __name__ == "__main__":
    main()

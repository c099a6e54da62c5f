"""`python -m nsabench`, and `torchrun -m nsabench train`."""

from nsabench.cli import main

if __name__ == "__main__":
    main()

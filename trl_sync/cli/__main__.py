"""`python -m trl_sync.cli`, the same as `trl-sync`."""

from trl_sync.cli import main

if __name__ == "__main__":
    main()
